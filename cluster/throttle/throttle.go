package throttle

import (
	"sync"
	"time"
)

// lineThrottle lets each reason be logged once every 10 seconds: anybody who can
// open connections could fill a disk with log lines otherwise. At most 256 reasons are
// remembered; one more forgets them all.
type Lines struct {
	every time.Duration

	mu   sync.Mutex // guards seen
	seen map[string]throttledLine
}

type throttledLine struct {
	last    time.Time
	skipped int
}

const throttleKeys = 256

func NewLines() *Lines {
	return &Lines{every: 10 * time.Second, seen: map[string]throttledLine{}}
}

// allow reports whether the reason may be logged now, and how many lines of it were
// skipped since the last one that was.
func (t *Lines) Allow(reason string) (skipped int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	line, known := t.seen[reason]
	if known && time.Since(line.last) < t.every {
		line.skipped++
		t.seen[reason] = line
		return 0, false
	}
	if !known && len(t.seen) >= throttleKeys {
		clear(t.seen)
	}
	t.seen[reason] = throttledLine{last: time.Now()}
	return line.skipped, true
}
