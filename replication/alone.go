package replication

import (
	"slices"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// Alone is what only one node has, as far as this node knows.
type Alone struct {
	// Records is how many records the node reported to have that no other member has.
	// Streams that their owner has retired don't count. Nil: it has reported nothing to
	// this process.
	Records *int64
	// Reported is how long ago it last reported all that it has. Nil: unknown.
	Reported *time.Duration
}

// Alone returns that of another node. What the node has accepted since it last reported is
// not known.
func (r *Replication) Alone(node string) Alone {
	var a Alone
	if n, known := r.tracker.onlyOn(node, r.opts.Retired); known {
		a.Records = &n
	}
	if ago, known := r.fresh.reported(node); known {
		a.Reported = &ago
	}
	return a
}

// onlyOn counts the records that a node holds and no other member does. It is false if no
// watermarks of the node are known.
func (l *tracker) onlyOn(node string, retired func(journal.Stream) bool) (n int64, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	theirs, known := l.marks[node]
	for s, seq := range theirs.Ends {
		others := uint64(0)
		for holder, h := range l.marks {
			if holder != node && (holder == l.self || slices.Contains(l.nodes, holder)) {
				others = max(others, h.Ends[s])
			}
		}
		if seq > others && !retired(s) {
			n += int64(seq - others) //nolint:gosec // far below the limit
		}
	}
	return n, known
}

// reported returns how long ago this node last knew what an origin had on its disk.
func (f *freshness) reported(origin string) (time.Duration, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.own[origin]
	if c == nil {
		return 0, false
	}
	return max(0, f.now()-c.known), true
}
