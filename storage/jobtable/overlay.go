package jobtable

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/notify"
)

const (
	// stripeCount is the number of locks, so that streams rarely wait for each other.
	stripeCount = 64
	// maxPending is about how many bytes of changes may wait for a commit before
	// Apply blocks. The changes being committed are in memory twice meanwhile.
	maxPending = 32 << 20
	// commitEarly is the number of pending bytes at which a commit begins at once.
	commitEarly = maxPending / 8
)

// stripe holds the changed rows of some jobs until a commit has written them.
type stripe struct {
	mu      sync.Mutex // guards entries, tickets
	entries map[journal.JobID]*entry
	tickets uint64 // number of changes that watchers are notified of

	order    sync.Mutex // guards notified; never held while mu is locked
	next     *sync.Cond
	notified uint64 // number of tickets whose watchers have been called
}

type entry struct {
	state
	version uint64 // increases with each change
	bytes   int64
	inFile  bool // the file has a row of the job
}

func (s *stripe) init() {
	s.entries = map[journal.JobID]*entry{}
	s.next = sync.NewCond(&s.order)
}

// stripe selects by the low bits of the id's last byte, which is random.
func (t *Table) stripe(id journal.JobID) *stripe { return &t.stripes[id[len(id)-1]%stripeCount] }

// ErrGap means that Apply was given records that don't follow the ones before. The
// records in between would be lost.
var ErrGap = errors.New("journal records are missing before the applied ones")

// Apply joins the records of one stream, in their order, beginning at or before
// Applied+1. It skips records that were applied before; a gap fails the table. When
// it returns the changes are visible; the next commit makes them durable. Different
// streams may be applied concurrently. Apply keeps no reference to records. It
// blocks while too many changes wait for a commit. Once the table has failed it does
// nothing: the error of Run stops the node.
func (t *Table) Apply(s journal.Stream, records []journal.Record) {
	t.mu.Lock()
	seen := t.position(s).seen
	t.mu.Unlock()
	applied := seen
	if skip := sort.Search(len(records), func(i int) bool { return records[i].Seq > seen }); skip > 0 {
		records = records[skip:]
	}
	if len(records) == 0 {
		return
	}
	absent, err := t.absent(records)
	if err != nil {
		return
	}
	for i := range records {
		r := &records[i]
		if r.Seq != applied+1 {
			_ = t.setFailed("apply", fmt.Errorf("%w: %d of %s after %d", ErrGap, r.Seq, s, applied)) // Run returns it
			return
		}
		if err := t.join(r.Job, records[i:i+1], absent.at(i)); err != nil {
			return
		}
		applied = r.Seq
	}
	t.mu.Lock()
	p := t.position(s)
	p.seen = max(p.seen, applied)
	t.mu.Unlock()
	notify.Wake(t.kick)
}

// Merge joins rows of another node, as returned by its Rows or Bucket. They are
// durable when it returns. When frames are malformed the error wraps ErrDamaged;
// then some rows may have been joined.
func (t *Table) Merge(ctx context.Context, frames []byte) error {
	if err := t.MergeSoon(frames); err != nil {
		return err
	}
	return t.flush(ctx)
}

// MergeSoon is Merge for a page of many. The rows of all pages are durable when a later
// Merge or SetAppliedAll returns; a sync for each page would take most of the time.
func (t *Table) MergeSoon(frames []byte) error {
	records, err := parseFrames(frames)
	if err != nil {
		return fmt.Errorf("merge rows: %w", err)
	}
	for from := 0; from < len(records); {
		to := from + 1
		for to < len(records) && records[to].Job == records[from].Job {
			to++
		}
		if err := t.join(records[from].Job, records[from:to], absenceUnknown); err != nil {
			return err
		}
		from = to
	}
	return nil
}

// absences says which jobs had no row in the file, as of a number of commits.
// Looking for many jobs at once costs a fraction of a lookup for each.
type absences struct {
	jobs    []bool
	commits uint64
}

// absence is that of one job.
type absence struct {
	absent  bool
	commits uint64
}

// absenceUnknown means that the file must be asked.
var absenceUnknown = absence{}

func (a *absences) at(i int) absence { return absence{a.jobs[i], a.commits} }

// absent looks for the jobs of records in the file. The caller holds no lock: a
// commit that grows the file waits for all readers.
func (t *Table) absent(records []journal.Record) (absences, error) {
	a := absences{jobs: make([]bool, len(records)), commits: t.retired.Load()}
	err := t.read("look for rows", func(tx *bbolt.Tx) error {
		c := bucket(tx, tableRows).Cursor()
		for i := range records {
			id := records[i].Job[:]
			k, _ := c.Seek(id)
			a.jobs[i] = !bytes.Equal(k, id)
		}
		return nil
	})
	return a, err
}

// join joins records into a job's row.
func (t *Table) join(id journal.JobID, records []journal.Record, seen absence) error {
	return t.change(id, true, seen, func(s state) (state, bool) {
		next, changed := s.with(records, t.clock())
		if !changed {
			return s, false
		}
		// Clone the payloads that come from the caller's buffer.
		for i := range next.records {
			for j := range records {
				if records[j].Sealed() {
					continue
				}
				if p := records[j].Payload; len(p) > 0 && len(next.records[i].Payload) > 0 && &next.records[i].Payload[0] == &p[0] {
					next.records[i].Payload = bytes.Clone(p)
				}
			}
		}
		return next, true
	})
}

// change replaces a row's state by the result of f; tell says whether to call
// watchers. It blocks while too many changes wait for a commit.
func (t *Table) change(id journal.JobID, tell bool, seen absence, f func(state) (state, bool)) error {
	if err := t.waitForSpace(); err != nil {
		return err
	}
	s, number := t.stripe(id), t.number.Load()
	s.mu.Lock()
	e := s.entries[id]
	var old state
	switch {
	case e != nil:
		old = e.state
	case seen.absent && seen.commits == t.retired.Load():
		// No commit has removed entries since the file was read, so the job is in
		// neither.
	default:
		var err error
		if old, err = t.load(t.view, id); err != nil {
			s.mu.Unlock()
			if err = t.damaged("load a row", err, number); err != nil {
				return err
			}
			return t.change(id, tell, absenceUnknown, f) // with another file
		}
	}
	next, changed := f(old)
	if !changed {
		s.mu.Unlock()
		return nil
	}
	if e == nil {
		e = &entry{inFile: !old.empty()}
		s.entries[id] = e
	}
	e.state = next
	e.version++
	size := next.size()
	t.pending.Add(size - e.bytes)
	e.bytes = size
	t.recount(&old, &next)
	row := next.row(id)
	watchers := t.watch.Load()
	var ticket uint64
	if tell && watchers != nil && row.visible() {
		s.tickets++
		ticket = s.tickets
	}
	s.mu.Unlock()
	notify.Wake(t.kick)
	if ticket > 0 {
		s.notify(*watchers, row, ticket)
	}
	return nil
}

// notify calls the watchers after those of all earlier tickets have been called.
func (s *stripe) notify(watchers []func(Row), row Row, ticket uint64) {
	s.order.Lock()
	for s.notified != ticket-1 {
		s.next.Wait()
	}
	s.order.Unlock()
	for _, w := range watchers {
		w(row)
	}
	s.order.Lock()
	s.notified = ticket
	s.order.Unlock()
	s.next.Broadcast()
}

// load reads a row's state from the file in a transaction, and copies its payloads. The
// caller found no entry in the row's stripe.
func (t *Table) load(in func(func(*bbolt.Tx) error) error, id journal.JobID) (s state, err error) {
	err = in(func(tx *bbolt.Tx) error {
		s = state{}
		v := bucket(tx, tableRows).Get(id[:])
		if v == nil {
			return nil
		}
		s, err = parseValue(id, bytes.Clone(v))
		return err
	})
	return s, err
}

// current returns a row's state.
func (t *Table) current(id journal.JobID) (state, error) {
	s := t.stripe(id)
	s.mu.Lock()
	e := s.entries[id]
	if e != nil {
		defer s.mu.Unlock()
		return e.state, nil
	}
	s.mu.Unlock()
	// An entry leaves the overlay only after the file has that version, so the file
	// is at least as new.
	return t.load(func(fn func(*bbolt.Tx) error) error { return t.read("load a row", fn) }, id)
}

// recount updates Counts and LiveCounts for a change from one state to another.
func (t *Table) recount(old, next *state) {
	from, was := old.counted()
	to, is := next.counted()
	if was != is || from != to {
		if was {
			t.counts[from].Add(-1)
		}
		if is {
			t.counts[to].Add(1)
		}
	}
	var left, come []journal.Stream
	if old.live() {
		left = Row{old.records}.AcceptedBy()
	}
	if next.live() {
		come = Row{next.records}.AcceptedBy()
	}
	if len(left) == 0 && len(come) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range left {
		if t.live[s]--; t.live[s] == 0 {
			delete(t.live, s)
		}
	}
	for _, s := range come {
		t.live[s]++
	}
}

// waitForSpace blocks while too many changes wait for a commit. The error is that
// of usable.
func (t *Table) waitForSpace() error {
	for {
		if err := t.usable(); err != nil {
			return err
		}
		if pending := t.pending.Load(); pending < maxPending {
			if pending > commitEarly {
				notify.Wake(t.urgent)
			}
			return nil
		}
		space := t.space.Next()
		if t.pending.Load() < maxPending {
			continue // a commit ended in between
		}
		notify.Wake(t.urgent)
		select {
		case <-space:
		case <-t.failed:
		}
	}
}

// flush waits until every change that is visible now is durable.
func (t *Table) flush(ctx context.Context) error {
	t.mu.Lock()
	want := t.begun + 1 // a commit that is running may not include all changes
	t.mu.Unlock()
	for {
		done := t.finished.Next()
		t.mu.Lock()
		enough := t.done >= want
		t.mu.Unlock()
		if enough {
			return nil
		}
		notify.Wake(t.urgent)
		select {
		case <-done:
		case <-t.failed:
			return t.usable()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
