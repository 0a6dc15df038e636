package jobs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/node/shares"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	// againWhenBlocked is the pause before jobs are tried again that had no permit, or no
	// free concurrency.
	againWhenBlocked = 50 * time.Millisecond
	// maxEndings bounds the records that are written at the same time for jobs that end
	// without running.
	maxEndings = 64
	// duplicateWait is how long a job that several sites accepted under one key is left to
	// the site that was first. Then this node runs it too.
	duplicateWait = time.Minute
)

// Reasons to cancel a running attempt.
var (
	errCancelAsked = errors.New("a client asked to cancel the job")
	errSuperseded  = errors.New("another owner ended the job")
	errLateResult  = errors.New("a result of an earlier owner arrived")
	errLateStart   = errors.New("the start was no longer permitted")
	errStopping    = errors.New("the node is stopping")
)

// executor runs the jobs of the streams that this node owns. One goroutine (run) decides
// which job starts. Each attempt has its own goroutine (attempt.go).
type executor struct {
	o       *Options
	log     *slog.Logger
	metrics *metrics
	streams *streams
	wake    chan struct{} // has room for one
	work    sync.WaitGroup

	mu sync.Mutex // guards all below
	q  queue
	// pending are submissions that are being written. observe moves them to q when the table
	// has their rows.
	pending      map[journal.JobID]*entry
	pendingBytes int64
	dirty        map[journal.JobID]struct{} // changed rows to read, of jobs in q or of its lanes
	endings      []*entry                   // held jobs that are to be ended
	running      int
	starting     int // of running: attempts whose start is not on disk yet
	ending       int
	stopped      bool
}

// run is a running attempt, or the writing of an end.
type run struct {
	cancel  context.CancelCauseFunc
	token   journal.Token
	writing bool            // the job's end is being written
	late    *journal.Record // a result of an earlier owner
}

func newExecutor(o *Options, m *metrics, s *streams) *executor {
	return &executor{
		o: o, log: o.Logger, metrics: m, streams: s, wake: make(chan struct{}, 1), q: newQueue(),
		pending: map[journal.JobID]*entry{}, dirty: map[journal.JobID]struct{}{},
	}
}

func (x *executor) nudge() {
	select {
	case x.wake <- struct{}{}:
	default:
	}
}

// run starts and ends jobs until ctx ends. Then running jobs get Options.Grace.
func (x *executor) run(ctx context.Context) error {
	work, abandon := context.WithCancelCause(context.WithoutCancel(ctx))
	defer abandon(errStopping)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		timer.Reset(x.round(work))
		select {
		case <-ctx.Done():
			x.stop(abandon)
			return nil
		case <-x.wake:
		case <-timer.C:
		}
	}
}

func (x *executor) stop(abandon context.CancelCauseFunc) {
	x.mu.Lock()
	x.stopped = true
	running := x.running
	x.mu.Unlock()
	if running > 0 {
		x.log.Info("jobs are running; no more are started", "running", running, "grace", x.o.Grace)
	}
	grace := time.AfterFunc(x.o.Grace, func() { abandon(errStopping) })
	x.work.Wait()
	grace.Stop()
}

// round starts and ends the jobs that are due, and returns the time until the next round at
// the latest.
func (x *executor) round(work context.Context) time.Duration {
	x.readDirty()
	usable := x.usableLanes()
	most, spare := x.o.config().Running(), x.o.Spare()
	x.mu.Lock()
	defer x.mu.Unlock()
	now := x.o.Host.Now()
	may := func(l *lane) bool { return usable[l] }
	for _, e := range x.q.popDue(now, may) {
		x.toEnd(e)
	}
	x.endSome(work, may)
	paused := x.paused()
	mayStart := func(l *lane) bool { return usable[l] && !(paused && x.streams.agreed(l.stream)) }
	for x.running < most && spare > 0 {
		e := x.q.next(now, mayStart)
		if e == nil {
			break
		}
		spare--
		x.start(work, e)
	}
	next := time.Minute
	if at, ok := x.q.wake(); ok {
		next = min(next, max(at.Sub(now), time.Millisecond))
	}
	if x.running < most && x.ready() || len(x.endings) > 0 {
		next = min(next, againWhenBlocked)
	}
	return next
}

func (x *executor) ready() bool {
	return slices.ContainsFunc(x.q.lanes, func(l *lane) bool { return l.size > 0 })
}

// usableLanes are the lanes for which this node has a permit now, so that jobs without one
// stay in order. The permit of an attempt is taken later.
func (x *executor) usableLanes() map[*lane]bool {
	now := x.o.Host.Now()
	x.mu.Lock()
	lanes := slices.DeleteFunc(slices.Clone(x.q.lanes), func(l *lane) bool { return l.gone || l.jobs == 0 || now.Before(l.blocked) })
	x.mu.Unlock()
	usable := make(map[*lane]bool, len(lanes))
	for _, l := range lanes {
		if _, err := x.streams.check(l.stream); err == nil {
			usable[l] = true
		}
	}
	return usable
}

// paused reports whether the primary is being moved away from this node's site by a
// switchover. Until that is decided no job of an agreed stream starts here, so that the new
// primary's site can have the records of all starts. mu is held from this look to the starts:
// awaitStarted must see them.
func (x *executor) paused() bool {
	w := x.o.State().Switchover
	return w != nil && w.From == x.o.Site
}

// awaitStarted blocks until the start of every attempt is on this node's disk. While paused
// no new ones follow.
func (x *executor) awaitStarted(ctx context.Context) error {
	for {
		x.mu.Lock()
		starting := x.starting
		x.mu.Unlock()
		if starting == 0 {
			return nil
		}
		if err := clock.Sleep(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("%d jobs are being started: %w", starting, err)
		}
	}
}

// start starts an attempt; mu is held.
func (x *executor) start(work context.Context, e *entry) {
	ctx, cancel := context.WithCancelCause(work)
	e.running = &run{cancel: cancel}
	x.starting++
	started := sync.OnceFunc(func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.starting--
	})
	x.launch(e, &x.running, func() step {
		defer cancel(nil)
		defer started()
		return x.attempt(work, ctx, e, started)
	})
}

// launch works on an entry in a goroutine that count counts; mu is held.
func (x *executor) launch(e *entry, count *int, do func() step) {
	*count++
	x.work.Go(func() {
		next := do()
		x.mu.Lock()
		*count--
		x.settle(e, next)
		x.mu.Unlock()
		x.nudge()
	})
}

// endSome writes the ends of held jobs; mu is held.
func (x *executor) endSome(work context.Context, may func(*lane) bool) {
	later := x.endings[:0]
	for _, e := range x.endings {
		if x.q.byID[e.id] != e {
			continue // dropped meanwhile
		}
		if x.ending == maxEndings || !may(e.lane) {
			later = append(later, e)
			continue
		}
		e.toEnd = false
		e.running = &run{cancel: func(error) {}} // writing a record is not cancelled
		x.launch(e, &x.ending, func() step { return x.end(work, e) })
	}
	clear(x.endings[len(later):])
	x.endings = later
}

// step says what happens to an entry after an attempt: it is done, or waits again.
type step struct {
	done      bool
	notBefore time.Time
	after     time.Duration // from now, instead of notBefore
}

var (
	finished = step{done: true}
	// leftAlone: another owner has the job, or this node continues with it after a restart.
	leftAlone = step{done: true}
)

func again(in time.Duration) step { return step{after: in} }

// settle queues an entry again or drops it; mu is held.
func (x *executor) settle(e *entry, next step) {
	e.running = nil
	if next.done || e.lane.gone || x.q.byID[e.id] != e {
		x.q.drop(e)
		if !next.done { // the stream may be this node's again, with a new lane
			x.dirty[e.id] = struct{}{}
		}
		return
	}
	now := x.o.Host.Now()
	if e.notBefore = next.notBefore; next.after > 0 {
		e.notBefore = now.Add(next.after)
	}
	if e.cancel {
		x.toEnd(e)
		return
	}
	x.q.wait(e, now)
}

// reserve reserves a place in the queue for a submission. The error is ErrBusy when a bound
// is reached, and a *shares.Error when the tenant has its share of it. A tenant may always
// have one job. share is in percent, 0: all.
func (x *executor) reserve(e *entry, maxJobs int, maxBytes int64, share int) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.stopped || len(x.q.byID)+len(x.pending) >= maxJobs || x.q.bytes+x.pendingBytes+e.bytes > maxBytes {
		return ErrBusy
	}
	most := shares.Part(int64(maxJobs), share)
	if !x.q.jobsOf.Take(e.tenant, 1, most) {
		return &shares.Error{Tenant: e.tenant, Of: "jobs that have not ended", Most: most, Percent: share}
	}
	most = max(shares.Part(maxBytes, share), e.bytes)
	if !x.q.bytesOf.Take(e.tenant, e.bytes, most) {
		x.q.jobsOf.Add(e.tenant, -1)
		return &shares.Error{Tenant: e.tenant, Of: "bytes of jobs that have not ended", Most: most, Percent: share}
	}
	x.pending[e.id] = e
	x.pendingBytes += e.bytes
	return nil
}

// release frees the place of a submission.
func (x *executor) release(e *entry) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.takePending(e.id)
}

func (x *executor) takePending(id journal.JobID) *entry {
	e := x.pending[id]
	if e != nil {
		delete(x.pending, id)
		x.pendingBytes -= e.bytes
		x.q.jobsOf.Add(e.tenant, -1)
		x.q.bytesOf.Add(e.tenant, -e.bytes)
	}
	return e
}

// observe is called with each changed row, by goroutines of the table. It queues new
// submissions and notes which rows the executor must read.
func (x *executor) observe(row jobtable.Row) {
	id := row.ID()
	status := row.Status()
	over := status == "" || status.Final()
	x.mu.Lock()
	defer x.mu.Unlock()
	if e := x.takePending(id); e != nil && !over {
		if e.lane = x.q.lane(e.stream); e.lane != nil && x.q.byID[id] == nil {
			x.q.add(e, x.o.Host.Now())
			x.nudge()
			return
		}
	}
	_, asked := row.CancelAsked()
	e := x.q.byID[id]
	switch {
	case e != nil && (over || asked && !e.cancel):
	case e == nil && !over && x.laneOf(row) != nil:
	default:
		return
	}
	x.dirty[id] = struct{}{}
	x.nudge()
}

// laneOf is the lane of the job's first stream that this node executes; mu is held.
func (x *executor) laneOf(row jobtable.Row) *lane {
	for _, s := range row.AcceptedBy() {
		if l := x.q.lane(s); l != nil && !l.gone {
			return l
		}
	}
	return nil
}

// readDirty reads the changed rows and updates their entries.
func (x *executor) readDirty() {
	x.mu.Lock()
	ids := slices.Collect(maps.Keys(x.dirty))
	clear(x.dirty)
	x.mu.Unlock()
	for _, id := range ids {
		row, known, err := x.o.Table.Get(id)
		if err != nil {
			x.log.Error("can't read the row of a job", "job", id, "err", err)
			continue
		}
		if known {
			x.update(row)
		}
	}
}

func (x *executor) update(row jobtable.Row) {
	id, status := row.ID(), row.Status()
	over := status == "" || status.Final()
	_, asked := row.CancelAsked()
	x.mu.Lock()
	e, l := x.q.byID[id], x.laneOf(row)
	if e != nil {
		x.change(e, row, over, asked)
	}
	x.mu.Unlock()
	if e != nil || over || l == nil {
		return
	}
	if err := x.admit(row, l); err != nil {
		x.log.Error("can't read a job, will try again", "job", id, "err", err)
		x.mu.Lock()
		l.incomplete = true
		x.mu.Unlock()
	}
}

// change reacts to a job's new records; mu is held.
func (x *executor) change(e *entry, row jobtable.Row, over, asked bool) {
	e.cancel = e.cancel || asked
	r := e.running
	switch {
	case r != nil && r.writing: // the records are most likely this node's own
	case over && r == nil:
		x.q.drop(e)
	case over:
		// A client may have seen the result of an earlier owner, so it is kept: this node
		// writes it again. A later owner's result counts as it is.
		if current, ok := row.Current(); ok && current.Token.Compare(r.token) < 0 && r.token != (journal.Token{}) {
			r.late = &current
			r.cancel(errLateResult)
			return
		}
		r.cancel(errSuperseded)
	case asked && r != nil:
		r.cancel(errCancelAsked)
	case asked:
		x.toEnd(e)
	}
}

// toEnd holds a waiting job so that endSome ends it; mu is held.
func (x *executor) toEnd(e *entry) {
	x.q.hold(e)
	if !e.toEnd {
		e.toEnd = true
		x.endings = append(x.endings, e)
	}
}

// admit makes an entry for a row that is not a new submission at this node.
func (x *executor) admit(row jobtable.Row, l *lane) error {
	rec, ok := row.Submitted()
	if !ok {
		return nil
	}
	sub, err := x.o.Sealer.OpenSubmission(&rec)
	if err != nil {
		return err
	}
	e := newEntry(rec.Job, &sub)
	e.lane, e.stream, e.created, e.attempts = l, l.stream, rec.Clock, row.Attempts()
	_, e.cancel = row.CancelAsked()
	if current, ok := row.Current(); ok && current.Kind == journal.Retrying {
		delay, err := x.o.Sealer.OpenDelay(&current)
		if err != nil {
			return err
		}
		e.notBefore = delay.NotBefore
	}
	if rec.Stream != l.stream {
		e.notBefore = x.o.Host.Now().Add(duplicateWait)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case x.q.byID[e.id] != nil || l.gone:
	case e.cancel:
		x.q.add(e, x.o.Host.Now())
		x.toEnd(e)
	default:
		x.q.add(e, x.o.Host.Now())
	}
	x.nudge()
	return nil
}

// newEntry makes an entry from a submission. The caller sets lane and stream.
func newEntry(id journal.JobID, sub *journal.Submission) *entry {
	return &entry{
		id: id, priority: min(max(sub.Priority, 0), len(lane{}.levels)-1), tenant: sub.Tenant,
		bytes: int64(len(sub.Body)), expires: sub.ExpiresAt, accepted: sub.CreatedAt,
		created: journal.ClockAt(sub.CreatedAt), readyAt: -1, timedAt: -1,
	}
}

// open adds a lane for a stream. load adds the jobs that are already in the stream.
func (x *executor) open(s journal.Stream) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if l := x.q.lane(s); l != nil {
		l.gone = false
		return
	}
	x.q.lanes = append(x.q.lanes, &lane{stream: s})
}

// load admits the jobs of a stream that have not ended.
func (x *executor) load(s journal.Stream) (jobs int, err error) {
	x.mu.Lock()
	l := x.q.lane(s)
	x.mu.Unlock()
	var errs error
	err = x.o.Table.Live(s, func(row jobtable.Row) bool {
		if bad := x.admit(row, l); bad != nil {
			errs = bad // the other jobs are still read
		} else {
			jobs++
		}
		return true
	})
	return jobs, errors.Join(err, errs)
}

// leave removes the lane of a stream that has another owner now. Running attempts continue:
// their results count as late ones.
func (x *executor) leave(s journal.Stream) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.q.lane(s)
	if l == nil {
		return
	}
	l.gone = true
	for _, e := range x.q.byID {
		if e.lane == l && e.running == nil {
			x.q.drop(e)
		}
	}
	x.q.lanes = slices.DeleteFunc(x.q.lanes, func(o *lane) bool { return o == l })
}

// has reports whether the stream has a lane.
func (x *executor) has(s journal.Stream) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.q.lane(s)
	return l != nil && !l.gone
}

// live counts the jobs of a stream in the queue, and its pending submissions.
func (x *executor) live(s journal.Stream) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	n := 0
	if l := x.q.lane(s); l != nil {
		n = l.jobs
	}
	for _, e := range x.pending {
		if e.stream == s {
			n++
		}
	}
	return n
}

// block makes a lane unusable for d.
func (x *executor) block(l *lane, d time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l.blocked = x.o.Host.Now().Add(d)
}

// incomplete marks a lane for loadAgain.
func (x *executor) incomplete(s journal.Stream) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if l := x.q.lane(s); l != nil {
		l.incomplete = true
	}
}

// loadAgain loads the incomplete lanes again.
func (x *executor) loadAgain() {
	x.mu.Lock()
	var again []journal.Stream
	for _, l := range x.q.lanes {
		if l.incomplete {
			l.incomplete = false
			again = append(again, l.stream)
		}
	}
	x.mu.Unlock()
	for _, s := range again {
		if _, err := x.load(s); err != nil {
			x.incomplete(s)
		}
	}
}
