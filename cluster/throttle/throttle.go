// Package throttle limits repeated log lines. A package of its own because both the
// mesh and gossip log what strangers cause.
package throttle

import (
	"sync"
	"time"
)

// Lines lets each reason be logged once every 10 seconds: anybody who can
// open connections could fill a disk with log lines otherwise. At most 256 reasons are
// remembered; one more forgets them all.
type Lines struct {
	every time.Duration

	mu   sync.Mutex // guards seen
	seen map[string]logged
}

type logged struct {
	at      time.Time
	skipped int
}

const maxReasons = 256

// NewLines makes a throttle that allows each reason once every 10 seconds.
func NewLines() *Lines {
	return &Lines{every: 10 * time.Second, seen: map[string]logged{}}
}

// Allow reports whether the reason may be logged now, and how many lines of it were
// skipped since the last one that was.
func (t *Lines) Allow(reason string) (skipped int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	last, known := t.seen[reason]
	if known && time.Since(last.at) < t.every {
		last.skipped++
		t.seen[reason] = last
		return 0, false
	}
	if !known && len(t.seen) >= maxReasons {
		clear(t.seen)
	}
	t.seen[reason] = logged{at: time.Now()}
	return last.skipped, true
}
