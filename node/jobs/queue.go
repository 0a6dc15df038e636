package jobs

import (
	"cmp"
	"container/heap"
	"slices"
	"time"

	"github.com/dsnode/dsnode/node/shares"
	"github.com/dsnode/dsnode/storage/journal"
)

// entry is a job that this node executes. Its body stays in the table.
type entry struct {
	id       journal.JobID
	stream   journal.Stream // of the lane
	lane     *lane
	priority int
	created  journal.Clock
	tenant   string
	bytes    int64
	expires  time.Time
	accepted time.Time
	// notBefore is the earliest time of its start. The zero time and past times mean now.
	notBefore time.Time
	attempts  uint32 // begun so far
	cancel    bool   // a client asked to cancel it
	running   *run   // nil: it waits
	toEnd     bool   // it is in executor.endings

	readyAt int // index in its tenant's heap; -1: not there
	timedAt int // index in timers; -1: not there
	due     time.Time
}

// lane holds the jobs of one stream. Jobs that may start now are ordered by priority; within
// a priority tenants take turns, and each tenant's oldest job comes first.
type lane struct {
	stream journal.Stream
	levels [10]level
	size   int // entries that are ready
	jobs   int // all entries, also running ones
	// blocked is the time until which no job of the lane is started, because a permit
	// was refused.
	blocked time.Time
	gone    bool // the stream has another owner
	// incomplete: some jobs of the stream could not be read.
	incomplete bool
}

type level struct {
	tenants []*tenantJobs // those with ready jobs
	next    int           // index of the tenant whose turn it is
}

type tenantJobs struct {
	tenant string
	jobs   entryHeap
}

func (l *lane) push(e *entry) {
	v := &l.levels[e.priority]
	i := slices.IndexFunc(v.tenants, func(t *tenantJobs) bool { return t.tenant == e.tenant })
	if i < 0 {
		i = len(v.tenants)
		v.tenants = append(v.tenants, &tenantJobs{tenant: e.tenant, jobs: newReady()})
	}
	heap.Push(&v.tenants[i].jobs, e)
	l.size++
}

// best is the highest priority that has a ready job; -1: none has.
func (l *lane) best() int {
	if l.size == 0 {
		return -1
	}
	for p := len(l.levels) - 1; p >= 0; p-- {
		if len(l.levels[p].tenants) > 0 {
			return p
		}
	}
	return -1
}

// pop removes and returns the next job of a priority that has one.
func (l *lane) pop(priority int) *entry {
	v := &l.levels[priority]
	v.next %= len(v.tenants)
	e := v.tenants[v.next].jobs.entries[0]
	v.next++
	l.remove(e)
	return e
}

// remove removes a ready job.
func (l *lane) remove(e *entry) {
	v := &l.levels[e.priority]
	i := slices.IndexFunc(v.tenants, func(t *tenantJobs) bool { return t.tenant == e.tenant })
	heap.Remove(&v.tenants[i].jobs, e.readyAt)
	l.size--
	if v.tenants[i].jobs.Len() == 0 {
		v.tenants = slices.Delete(v.tenants, i, i+1)
		if v.next > i {
			v.next--
		}
	}
}

// entryHeap is a heap of entries. Each knows its place in it, so that it can be removed.
type entryHeap struct {
	entries []*entry
	before  func(a, b *entry) bool
	place   func(*entry) *int // the entry's field for its index
}

// newReady makes a heap that has the oldest job first.
func newReady() entryHeap {
	return entryHeap{
		before: func(a, b *entry) bool { return cmp.Or(cmp.Compare(a.created, b.created), a.id.Compare(b.id)) < 0 },
		place:  func(e *entry) *int { return &e.readyAt },
	}
}

// newTimers makes a heap by the time at which jobs become ready or expire.
func newTimers() entryHeap {
	return entryHeap{
		before: func(a, b *entry) bool { return a.due.Before(b.due) },
		place:  func(e *entry) *int { return &e.timedAt },
	}
}

func (h *entryHeap) Len() int           { return len(h.entries) }
func (h *entryHeap) Less(a, b int) bool { return h.before(h.entries[a], h.entries[b]) }
func (h *entryHeap) Swap(a, b int) {
	h.entries[a], h.entries[b] = h.entries[b], h.entries[a]
	*h.place(h.entries[a]), *h.place(h.entries[b]) = a, b
}

// Push implements heap.Interface.
func (h *entryHeap) Push(x any) {
	e := x.(*entry) //nolint:forcetypeassert // only entries are pushed
	*h.place(e) = len(h.entries)
	h.entries = append(h.entries, e)
}

// Pop implements heap.Interface.
func (h *entryHeap) Pop() any {
	last := len(h.entries) - 1
	e := h.entries[last]
	h.entries[last] = nil
	h.entries = h.entries[:last]
	*h.place(e) = -1
	return e
}

// queue has all jobs that this node executes. The caller holds a lock.
type queue struct {
	lanes  []*lane // in the order of their turns
	turn   int
	starts uint64
	byID   map[journal.JobID]*entry
	timers entryHeap
	bytes  int64 // of all entries' bodies
	// jobsOf and bytesOf are what each tenant has, with the executor's pending submissions.
	jobsOf, bytesOf shares.Counter
}

func newQueue() queue { return queue{byID: map[journal.JobID]*entry{}, timers: newTimers()} }

func (q *queue) lane(s journal.Stream) *lane {
	for _, l := range q.lanes {
		if l.stream == s {
			return l
		}
	}
	return nil
}

// add adds a job, which must not be in the queue.
func (q *queue) add(e *entry, now time.Time) {
	e.readyAt, e.timedAt = -1, -1
	q.byID[e.id] = e
	q.bytes += e.bytes
	q.jobsOf.Add(e.tenant, 1)
	q.bytesOf.Add(e.tenant, e.bytes)
	e.lane.jobs++
	q.wait(e, now)
}

// wait queues a new job, or a job after an attempt, by its times.
func (q *queue) wait(e *entry, now time.Time) {
	e.due = e.expires
	if e.notBefore.After(now) {
		if e.notBefore.Before(e.expires) {
			e.due = e.notBefore
		}
	} else if !e.lane.gone {
		e.lane.push(e)
	}
	heap.Push(&q.timers, e)
}

// hold removes a waiting job from its lane and from timers, to run it or to end it.
func (q *queue) hold(e *entry) {
	if e.readyAt >= 0 {
		e.lane.remove(e)
	}
	if e.timedAt >= 0 {
		heap.Remove(&q.timers, e.timedAt)
	}
}

// drop removes a job from the queue.
func (q *queue) drop(e *entry) {
	if q.byID[e.id] != e {
		return
	}
	q.hold(e)
	delete(q.byID, e.id)
	q.bytes -= e.bytes
	q.jobsOf.Add(e.tenant, -1)
	q.bytesOf.Add(e.tenant, -e.bytes)
	e.lane.jobs--
}

const (
	// Every agedShare-th start is of the job that was accepted first, if that was agedAfter
	// ago: else jobs of a low priority never start while enough others arrive. The others
	// still get most starts.
	agedShare = 8
	agedAfter = time.Minute
)

// next removes and returns the job that starts next, or nil. It has the highest priority of
// all usable lanes, or it has waited longest; lanes with the same priority take turns. usable
// says which lanes this node may execute now.
func (q *queue) next(now time.Time, usable func(*lane) bool) *entry {
	if (q.starts+1)%agedShare == 0 {
		if e := q.oldest(usable); e != nil && now.Sub(e.accepted) >= agedAfter {
			q.starts++
			q.hold(e)
			return e
		}
	}
	var from *lane
	priority, at := -1, 0
	for i := range q.lanes {
		k := (q.turn + i) % len(q.lanes)
		l := q.lanes[k]
		if p := l.best(); p > priority && usable(l) {
			from, priority, at = l, p, k
		}
	}
	if from == nil {
		return nil
	}
	q.turn = at + 1
	q.starts++
	e := from.pop(priority)
	q.hold(e)
	return e
}

// oldest is the ready job that was accepted first.
func (q *queue) oldest(usable func(*lane) bool) *entry {
	var oldest *entry
	for _, l := range q.lanes {
		if l.size == 0 || !usable(l) {
			continue
		}
		for i := range l.levels {
			for _, t := range l.levels[i].tenants {
				if e := t.jobs.entries[0]; oldest == nil || e.created < oldest.created {
					oldest = e
				}
			}
		}
	}
	return oldest
}

// popDue makes jobs ready whose notBefore has come, and removes and returns the expired
// ones. Expired jobs of lanes that are not usable stay, because only the owner may end them.
func (q *queue) popDue(now time.Time, usable func(*lane) bool) (expired []*entry) {
	const again = 250 * time.Millisecond
	for q.timers.Len() > 0 && !q.timers.entries[0].due.After(now) {
		e := q.timers.entries[0]
		switch {
		case e.expires.After(now): // it is ready
			q.hold(e)
			q.wait(e, now)
		case usable(e.lane):
			q.hold(e)
			expired = append(expired, e)
		default:
			e.due = now.Add(again)
			heap.Fix(&q.timers, 0)
		}
	}
	return expired
}

// wake is the next time at which popDue has work; false: none.
func (q *queue) wake() (time.Time, bool) {
	if q.timers.Len() == 0 {
		return time.Time{}, false
	}
	return q.timers.entries[0].due, true
}
