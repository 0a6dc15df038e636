// Package throttle limits repeated log lines. The mesh and gossip use it for lines that
// clients without a certificate can cause. Start reading at Lines.
package throttle

import (
	"sync"
	"time"
)

// Lines allows one log line for each reason every 10 seconds. Without it, whoever can
// open connections could fill a disk with log lines. It remembers at most 256 reasons
// and forgets all of them when there is one more.
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

// NewLines makes a throttle that has seen no reason yet.
func NewLines() *Lines {
	return &Lines{every: 10 * time.Second, seen: map[string]logged{}}
}

// Allow reports whether a line with this reason may be logged now, and how many lines
// were skipped since the last one that was logged.
func (l *Lines) Allow(reason string) (skipped int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	last, known := l.seen[reason]
	if known && time.Since(last.at) < l.every {
		last.skipped++
		l.seen[reason] = last
		return 0, false
	}
	if !known && len(l.seen) >= maxReasons {
		clear(l.seen)
	}
	l.seen[reason] = logged{at: time.Now()}
	return last.skipped, true
}
