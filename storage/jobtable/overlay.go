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
)

const (
	// stripeCount locks share the jobs, so that streams rarely wait for each other.
	stripeCount = 64
	// maxPending is about how many bytes of changes may wait for a commit before
	// Apply blocks. One batch of them is written and held twice while it is.
	maxPending = 32 << 20
	// commitEarly does not wait for the rest of a batch's time.
	commitEarly = maxPending / 8
)

// stripe holds the changed rows of some jobs until the file has them.
type stripe struct {
	mu      sync.Mutex // guards entries, tickets
	entries map[journal.JobID]*entry
	tickets uint64 // given to changes that watchers hear of

	turn   sync.Mutex // guards called; never held while mu is taken
	next   *sync.Cond
	called uint64 // tickets that watchers have heard of
}

type entry struct {
	state
	version uint64 // one more with each change
	bytes   int64
	filed   bool // the file has a row of the job
}

func (s *stripe) init() {
	s.entries = map[journal.JobID]*entry{}
	s.next = sync.NewCond(&s.turn)
}

// The last byte is random in every id; its low bits part the stripes.
func (t *Table) stripe(id journal.JobID) *stripe { return &t.stripes[id[len(id)-1]%stripeCount] }

// ErrGap means that records were applied which don't follow those before: what
// is between them would be missing for ever.
var ErrGap = errors.New("journal records are missing before the applied ones")

// Apply joins the records of one stream, which must come in their order,
// beginning at or before Applied+1; what was applied before is skipped, and a
// gap fails the table. The changes are visible when it returns, and durable with
// the next commit. It may be called at once for different streams, keeps nothing
// of records, and blocks while the commits of Run are too far behind. Once the
// table has failed it does nothing: Run's error stops the node.
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
			_ = t.setFailed("apply", fmt.Errorf("%w: %d of %s after %d", ErrGap, r.Seq, s, applied)) // Run says it
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
	signal(t.kick)
}

// Merge joins rows of another node, as Rows and Bucket gave them. They are
// durable when it returns. The error is ErrDamaged when they are no such rows:
// then some may have been joined.
func (t *Table) Merge(ctx context.Context, frames []byte) error {
	records, err := parseFrames(frames)
	if err != nil {
		return fmt.Errorf("merge rows: %w", err)
	}
	for from := 0; from < len(records); {
		to := from + 1
		for to < len(records) && records[to].Job == records[from].Job {
			to++
		}
		if err := t.join(records[from].Job, records[from:to], nothingSeen); err != nil {
			return err
		}
		from = to
	}
	return t.flush(ctx)
}

// absences says which jobs the file had no row of, before a number of commits.
// Asking for many at once costs a fraction of asking for each.
type absences struct {
	jobs    []bool
	commits uint64
}

// sight of one job.
type sight struct {
	absent  bool
	commits uint64
}

// nothingSeen says nothing: the file is asked.
var nothingSeen = sight{}

func (a *absences) at(i int) sight { return sight{a.jobs[i], a.commits} }

// absent asks the file for the jobs of records. No lock is held meanwhile: a
// commit that has to grow the file waits for all who read.
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
func (t *Table) join(id journal.JobID, records []journal.Record, seen sight) error {
	if err := t.waitForRoom(); err != nil {
		return err
	}
	return t.change(id, true, seen, func(s state) (state, bool) {
		next, changed := s.with(records, t.clock())
		if !changed {
			return s, false
		}
		// The caller's buffer is its own: copy what was taken from it.
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

// change replaces a row's state by what f makes of it; tell says whether
// watchers hear of it.
func (t *Table) change(id journal.JobID, tell bool, seen sight, f func(state) (state, bool)) error {
	s := t.stripe(id)
	s.mu.Lock()
	e := s.entries[id]
	var old state
	switch {
	case e != nil:
		old = e.state
	case seen.absent && seen.commits == t.retired.Load():
		// No entry has left for the file since it was looked at.
	default:
		var err error
		if old, err = t.load(id); err != nil {
			s.mu.Unlock()
			return err
		}
	}
	next, changed := f(old)
	if !changed {
		s.mu.Unlock()
		return nil
	}
	if e == nil {
		e = &entry{filed: !old.empty()}
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
	signal(t.kick)
	if ticket > 0 {
		s.tell(*watchers, row, ticket)
	}
	return nil
}

// tell calls the watchers when all earlier tickets were told.
func (s *stripe) tell(watchers []func(Row), row Row, ticket uint64) {
	s.turn.Lock()
	for s.called != ticket-1 {
		s.next.Wait()
	}
	s.turn.Unlock()
	for _, w := range watchers {
		w(row)
	}
	s.turn.Lock()
	s.called = ticket
	s.turn.Unlock()
	s.next.Broadcast()
}

// load gives a row's state in the file, with payloads of its own. The caller
// holds the stripe's lock and found no entry there.
func (t *Table) load(id journal.JobID) (s state, err error) {
	err = t.read("load a row", func(tx *bbolt.Tx) error {
		v := bucket(tx, tableRows).Get(id[:])
		if v == nil {
			return nil
		}
		s, err = parseValue(id, bytes.Clone(v))
		return err
	})
	return s, err
}

// current gives a row's state.
func (t *Table) current(id journal.JobID) (state, error) {
	s := t.stripe(id)
	s.mu.Lock()
	e := s.entries[id]
	if e != nil {
		defer s.mu.Unlock()
		return e.state, nil
	}
	s.mu.Unlock()
	// Entries leave the overlay only after the file has them, so what comes now
	// is no older.
	return t.load(id)
}

// recount moves what Counts and LiveCounts say from one state to another.
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
		left = Row{old.records}.Homes()
	}
	if next.live() {
		come = Row{next.records}.Homes()
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

// waitForRoom blocks while too much waits for the next commit. The error is
// that of usable.
func (t *Table) waitForRoom() error {
	for {
		if err := t.usable(); err != nil {
			return err
		}
		if pending := t.pending.Load(); pending < maxPending {
			if pending > commitEarly {
				signal(t.urgent)
			}
			return nil
		}
		room := t.room.wait()
		if t.pending.Load() < maxPending {
			continue // a commit came in between
		}
		signal(t.urgent)
		select {
		case <-room:
		case <-t.failed:
		}
	}
}

// flush waits until all that is visible is durable.
func (t *Table) flush(ctx context.Context) error {
	t.mu.Lock()
	want := t.begun + 1 // the one that is running may have begun before
	t.mu.Unlock()
	for {
		done := t.finished.wait()
		t.mu.Lock()
		enough := t.done >= want
		t.mu.Unlock()
		if enough {
			return nil
		}
		signal(t.urgent)
		select {
		case <-done:
		case <-t.failed:
			return t.usable()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default: // it is signalled already
	}
}
