package jobs

import (
	"cmp"
	"container/heap"
	"slices"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// entry is one job that this node is to execute. The body stays in the table.
type entry struct {
	id       journal.JobID
	home     journal.Stream // the lane's
	lane     *lane
	priority int
	created  journal.Clock
	tenant   string
	bytes    int64
	expires  time.Time
	accepted time.Time
	// notBefore is when it may start; the zero time or one that is over: now.
	notBefore time.Time
	attempts  uint32 // begun so far
	cancel    bool   // somebody asked for it
	running   *run   // nil: it waits
	toEnd     bool   // it is in executor.endings

	readyAt int // index in its tenant's heap, -1: not there
	timedAt int // index in timers, -1: not there
	due     time.Time
}

// lane holds the waiting jobs of one stream: what may start now by priority,
// tenants of one priority in turn, the oldest job of each first.
type lane struct {
	stream journal.Stream
	levels [10]level
	size   int // entries that are ready
	jobs   int // all entries, running ones too
	// blocked is until when nothing of it is tried, because this node had no
	// permit a moment ago.
	blocked time.Time
	gone    bool // it has another owner
	// incomplete: some of its jobs could not be read.
	incomplete bool
}

type level struct {
	tenants []*tenantJobs // those with ready jobs
	next    int           // whose turn it is
}

type tenantJobs struct {
	tenant string
	jobs   readyHeap
}

func (l *lane) push(e *entry) {
	v := &l.levels[e.priority]
	i := slices.IndexFunc(v.tenants, func(t *tenantJobs) bool { return t.tenant == e.tenant })
	if i < 0 {
		i = len(v.tenants)
		v.tenants = append(v.tenants, &tenantJobs{tenant: e.tenant})
	}
	heap.Push(&v.tenants[i].jobs, e)
	l.size++
}

// best is the highest priority that has a ready job, -1 when there is none.
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

// pop takes the next job of a priority that has one.
func (l *lane) pop(priority int) *entry {
	v := &l.levels[priority]
	v.next %= len(v.tenants)
	e := v.tenants[v.next].jobs[0]
	v.next++
	l.remove(e)
	return e
}

// remove takes a ready job out.
func (l *lane) remove(e *entry) {
	v := &l.levels[e.priority]
	i := slices.IndexFunc(v.tenants, func(t *tenantJobs) bool { return t.tenant == e.tenant })
	heap.Remove(&v.tenants[i].jobs, e.readyAt)
	l.size--
	if len(v.tenants[i].jobs) == 0 {
		v.tenants = slices.Delete(v.tenants, i, i+1)
		if v.next > i {
			v.next--
		}
	}
}

// readyHeap has the oldest job first.
type readyHeap []*entry

func (h readyHeap) Len() int { return len(h) }
func (h readyHeap) Less(a, b int) bool {
	return cmp.Or(cmp.Compare(h[a].created, h[b].created), h[a].id.Compare(h[b].id)) < 0
}

func (h readyHeap) Swap(a, b int) {
	h[a], h[b] = h[b], h[a]
	h[a].readyAt, h[b].readyAt = a, b
}

// Push implements heap.Interface.
func (h *readyHeap) Push(x any) {
	e := x.(*entry) //nolint:forcetypeassert // only entries are pushed
	e.readyAt = len(*h)
	*h = append(*h, e)
}

// Pop implements heap.Interface.
func (h *readyHeap) Pop() any {
	last := len(*h) - 1
	e := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	e.readyAt = -1
	return e
}

// timers has the job first whose time comes first: to become ready, or to
// expire.
type timers []*entry

func (h timers) Len() int           { return len(h) }
func (h timers) Less(a, b int) bool { return h[a].due.Before(h[b].due) }
func (h timers) Swap(a, b int) {
	h[a], h[b] = h[b], h[a]
	h[a].timedAt, h[b].timedAt = a, b
}

// Push implements heap.Interface.
func (h *timers) Push(x any) {
	e := x.(*entry) //nolint:forcetypeassert // only entries are pushed
	e.timedAt = len(*h)
	*h = append(*h, e)
}

// Pop implements heap.Interface.
func (h *timers) Pop() any {
	last := len(*h) - 1
	e := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	e.timedAt = -1
	return e
}

// queue is all that this node is to execute. Its owner holds a lock.
type queue struct {
	lanes  []*lane // the order in which they take turns
	turn   int
	byID   map[journal.JobID]*entry
	timers timers
	bytes  int64 // of all entries' bodies
}

func newQueue() queue { return queue{byID: map[journal.JobID]*entry{}} }

func (q *queue) lane(s journal.Stream) *lane {
	for _, l := range q.lanes {
		if l.stream == s {
			return l
		}
	}
	return nil
}

// add takes a job in. It must not be there.
func (q *queue) add(e *entry, now time.Time) {
	e.readyAt, e.timedAt = -1, -1
	q.byID[e.id] = e
	q.bytes += e.bytes
	e.lane.jobs++
	q.wait(e, now)
}

// wait puts a job, new or after an attempt, where it belongs by its times.
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

// hold takes a waiting job out of the order, to run it or to end it.
func (q *queue) hold(e *entry) {
	if e.readyAt >= 0 {
		e.lane.remove(e)
	}
	if e.timedAt >= 0 {
		heap.Remove(&q.timers, e.timedAt)
	}
}

// drop forgets a job.
func (q *queue) drop(e *entry) {
	if q.byID[e.id] != e {
		return
	}
	q.hold(e)
	delete(q.byID, e.id)
	q.bytes -= e.bytes
	e.lane.jobs--
}

// next takes the job that is to start now, nil when there is none: the highest
// priority of all lanes, lanes of one priority in turn. usable says which lanes
// this node may execute.
func (q *queue) next(usable func(*lane) bool) *entry {
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
	e := from.pop(priority)
	q.hold(e)
	return e
}

// expired takes the jobs out whose time to start is over, and lets those start
// whose wait is. Jobs of lanes that can't be used now stay: only their owner may
// end them.
func (q *queue) ripen(now time.Time, usable func(*lane) bool) (expired []*entry) {
	const again = 250 * time.Millisecond
	for len(q.timers) > 0 && !q.timers[0].due.After(now) {
		e := q.timers[0]
		switch {
		case e.expires.After(now): // it has waited enough
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

// wake is when ripen has something to do; false: never.
func (q *queue) wake() (time.Time, bool) {
	if len(q.timers) == 0 {
		return time.Time{}, false
	}
	return q.timers[0].due, true
}
