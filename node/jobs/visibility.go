package jobs

import (
	"maps"
	"sync"
	"time"

	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// settleWait is how long a result waits to become as durable as was asked for,
// where less is enough for who asked.
const settleWait = 2 * time.Second

// maxWaited bounds the streams whose waits are remembered: more than a journal
// holds.
const maxWaited = 2048

// waits remembers up to where in each stream results have waited long enough for
// more than the least durability that was asked for. What was shown because of
// that stays shown: peers that come back in that moment, a clock that is set and
// a restart change nothing.
type waits struct {
	mu   sync.Mutex // guards over
	over map[journal.Stream]uint64
}

// newWaits knows no more than that an earlier process may have shown all that is
// in the journal at its start.
func newWaits(ends map[journal.Stream]journal.End) *waits {
	w := &waits{over: make(map[journal.Stream]uint64, len(ends))}
	for s, e := range ends {
		w.over[s] = e.Durable
	}
	return w
}

func (w *waits) isOver(s journal.Stream, seq uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.over[s] >= seq
}

// end notes that a result has waited, and with it all that is before it in its
// stream. held are the streams that a journal holds; what has gone from there is
// shown without a wait.
func (w *waits) end(s journal.Stream, seq uint64, held func() map[journal.Stream]journal.End) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over[s] >= seq {
		return
	}
	w.over[s] = seq
	if len(w.over) > maxWaited {
		kept := held()
		maps.DeleteFunc(w.over, func(o journal.Stream, _ uint64) bool { _, here := kept[o]; return !here && o != s })
	}
}

// shownEnd is the end that a client is shown: the best of those that may be. A
// later owner's word that isn't settled yet hides none that is, since that one may
// have been shown.
func (j *Jobs) shownEnd(row jobtable.Row, sub *journal.Submission) (journal.Record, bool) {
	current, ok := row.Current()
	if !ok || current.Kind != journal.Finished {
		return journal.Record{}, false
	}
	if j.settled(&current, sub) {
		return current, true
	}
	for _, late := range row.Late() {
		if j.settled(&late, sub) {
			return late, true
		}
	}
	return journal.Record{}, false
}

// settled reports whether a result may be shown: once shown it must not be lost
// with what the client asked to survive.
func (j *Jobs) settled(fin *journal.Record, sub *journal.Submission) bool {
	got, want := levelOf(j.reached(fin.Stream, fin.Seq)), levelOf(sub.Durability)
	if got >= want {
		return true
	}
	if sub.MinDurability == "" || got < levelOf(sub.MinDurability) {
		return false
	}
	if j.waits.isOver(fin.Stream, fin.Seq) {
		return true
	}
	if time.Since(fin.Clock.Time()) <= settleWait && j.o.Replication.Reachable(sub.Durability) {
		return false
	}
	j.waits.end(fin.Stream, fin.Seq, j.o.Journal.Ends)
	return true
}
