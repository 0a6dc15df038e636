package jobs

import (
	"maps"
	"sync"
	"time"

	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// settleWait is how long a result stays hidden while it is less durable than the client
// asked, if min_durability allows less.
const settleWait = 2 * time.Second

// maxWaited bounds the streams whose waits are remembered. It is more than a journal
// holds.
const maxWaited = 2048

// waits remembers, for each stream, up to which record the wait (settleWait) of results is
// over. A result that was shown because of that stays shown, also when peers come back,
// the clock is set, or the node restarts.
type waits struct {
	mu   sync.Mutex // guards over
	over map[journal.Stream]uint64
}

// newWaits assumes that an earlier process has shown every result that is in the journal
// at the start.
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

// end notes that the wait of a result is over, and of all records before it in its stream.
// held returns the streams of the journal: results of other streams need no wait.
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

// shownEnd is the end of a job that clients see. Until a later owner's result is durable
// enough, it is the earlier durable one: a client may have seen it.
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

// settled reports whether a result may be shown. A result that was shown must survive what
// the client asked the job to survive.
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
	if j.o.Host.Now().Sub(fin.Clock.Time()) <= settleWait && j.o.Replication.Reachable(sub.Durability) {
		return false
	}
	j.waits.end(fin.Stream, fin.Seq, j.o.Journal.Ends)
	return true
}
