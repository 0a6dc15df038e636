package jobs

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	updateEvery = 250 * time.Millisecond
	// leaseLoss is how long a node may be without a lease before it accepts new jobs in
	// an island stream. It is longer than the election of a Raft leader.
	leaseLoss = 2 * time.Second
	// openWait bounds one proposal, retryWait is the pause after a failed one. While this
	// node waits for a proposal it follows no change of owners.
	openWait  = 3 * time.Second
	retryWait = 2 * time.Second
	// agreeWait is how long a start waits until the cluster has agreed on its stream. It
	// allows for one failed proposal.
	agreeWait   = 3 * time.Second
	dropEvery   = 10 * time.Second
	loadAgain   = 5 * time.Second
	islandsFile = "islands.json"
	// steadyAfter is how long a node must have had a lease before it relies on which peers
	// it hears: several pings. Right after a start it hears no peer, and would conclude
	// that it has all records that the others hold.
	steadyAfter = time.Second

	// maxOpen is how many agreed streams of this node there may be when it proposes
	// another one. Beyond it the node stays with its island, whose jobs it can run. The
	// rest up to agreed.MaxStreamsPerNode is for streams that were proposed before, whose
	// jobs wait for the agreement. maxOpenDone is the same for streams whose jobs have
	// ended: they are proposed only so that all nodes drop them.
	maxOpen     = agreed.MaxStreamsPerNode * 3 / 4
	maxOpenDone = maxOpen / 2
	// disownedFirst to disownedMost is how long a node that lost the stream that it writes,
	// although it ran and had a lease for disownedFirst or since it opened the stream, runs
	// its jobs as an island before it proposes the next one, from the second loss on.
	// Others take it for gone, and each stream that it opens then is lost too. After
	// calmAfter without a loss the next one counts as the first.
	disownedFirst = 10 * time.Second
	disownedMost  = 40 * time.Second
	calmAfter     = 10 * time.Minute
	// refuseAfter is how long a node accepts jobs that it can't start.
	refuseAfter = 5 * time.Second
)

// streams are the streams that this node writes, and those whose jobs it executes.
//
// A stream that was never proposed to the cluster is an island: only this node can execute
// it, and needs no lease for that. A file on disk lists the islands. A new stream is added
// before it is begun. It is removed before it is proposed, because from then on another node
// may adopt it, and each start needs a permit, also after a crash. A stream that is not in
// the file is not an island: also an own stream that comes back from peers after the disk was
// lost.
type streams struct {
	o    *Options
	log  *slog.Logger
	path string

	mu      sync.Mutex // guards all below
	begun   bool
	now     journal.Stream              // zero before begun
	token   journal.Token               // of now
	opened  time.Time                   // when now, or the stream before it, was agreed on
	islands map[journal.Stream]struct{} // as on disk
	leased  time.Time                   // since when this node has a lease; zero: it has none
	waiting waiting
	// Others took the written stream away losses times in a row, so that the next one is
	// proposed only at openAt.
	losses int
	openAt time.Time
}

// waiting are the streams of this node that are no islands and not agreed on, so that no
// node can start their jobs.
type waiting struct {
	since time.Time // zero: there are none
	// refused is since when the stream that this node writes is one, or there is none to
	// write; zero: new jobs can start.
	refused time.Time
	jobs    int64
	why     error // of the last proposal that failed, nil: none did
}

// permit allows one start, like failover.Permit.
type permit struct {
	token  journal.Token
	inTime func() bool
	alone  bool // the stream is an island
}

func newStreams(o *Options) (*streams, error) {
	s := &streams{o: o, log: o.Logger, path: filepath.Join(o.Dir, islandsFile), islands: map[journal.Stream]struct{}{}}
	noted, err := s.readIslands()
	if err != nil {
		return nil, err
	}
	for st := range o.Journal.Ends() {
		if st.Origin == o.Node && slices.Contains(noted, st.Incarnation) {
			s.islands[st] = struct{}{}
		}
	}
	return s, nil
}

// begin creates a new stream for all records from now on, and freezes the previous one, so
// that its owner knows its end.
func (s *streams) begin(ctx context.Context, x *executor) error {
	next := journal.Stream{Origin: s.o.Node}
	_, _ = rand.Read(next.Incarnation[:]) // it never returns an error
	s.mu.Lock()
	islands := maps.Clone(s.islands)
	s.mu.Unlock()
	islands[next] = struct{}{}
	if err := writeIslands(s.path, islands); err != nil { // only this goroutine writes the file
		return fmt.Errorf("begin a job stream: %w", err)
	}
	if err := s.o.Journal.Create(ctx, next); err != nil {
		return fmt.Errorf("begin a job stream: %w", err)
	}
	// The lane comes before the first record: a job without a lane counts for no bound.
	x.open(next)
	s.mu.Lock()
	before, begun := s.now, s.begun
	s.now, s.token, s.begun = next, s.islandToken(), true
	s.islands = islands
	s.waiting.refused = time.Time{}
	s.mu.Unlock()
	if begun {
		if err := s.o.Journal.Freeze(before); err != nil {
			return fmt.Errorf("end a job stream: %w", err)
		}
	}
	return nil
}

func (s *streams) islandToken() journal.Token {
	return journal.Token{Generation: s.o.State().Generation.Number}
}

// current is the stream that this node writes, and the token for the jobs that it accepts
// there. It is false before the first stream is begun.
func (s *streams) current() (journal.Stream, journal.Token, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now, s.token, s.begun
}

// check returns a permit for one start of a job of a stream.
func (s *streams) check(st journal.Stream) (permit, error) {
	// The agreed state counts more than the file, because the disk may be an old image.
	if alone := func() bool { return s.island(st) && !s.known(st) }; alone() {
		return permit{token: s.islandToken(), inTime: alone, alone: true}, nil
	}
	p, err := s.o.Ownership.Check(keyOf(st))
	if err != nil {
		return permit{}, err
	}
	return permit{token: journal.Token(p.Token), inTime: p.InTime}, nil
}

// still reports whether a permit that was given before is valid now. A stream that was an
// island then may have been agreed on since. It still has the same owner, so the job goes on.
// While the stream is being proposed no job may start, so still waits.
func (s *streams) still(ctx context.Context, st journal.Stream, p permit) bool {
	until := time.Now().Add(agreeWait)
	for {
		now, err := s.check(st)
		if err == nil {
			return now.inTime() && (now.token == p.token || p.alone && s.neverOthers(st))
		}
		asked := p.alone && !s.island(st) && !s.known(st)
		if !asked || !time.Now().Before(until) || clock.Sleep(ctx, 10*time.Millisecond) != nil {
			return false
		}
	}
}

// neverOthers reports whether a stream is agreed on and had no other owner.
func (s *streams) neverOthers(st journal.Stream) bool {
	j, agreed := s.o.State().Streams[keyOf(st)]
	return agreed && j.Owner == s.o.Node && j.Before == ""
}

// ours reports whether this node knows how all jobs of a stream ended: only this process can
// have executed it, or an earlier one of this node, and this disk has all that it wrote.
func (s *streams) ours(st journal.Stream) bool {
	if s.o.State().Streams[keyOf(st)].Before != "" {
		return false
	}
	if now, _, _ := s.current(); st == now {
		return true
	}
	return s.island(st) && !s.o.Table.Partial() && !s.damaged()
}

// damaged reports whether a journal of this node lost records, which may be the ends of jobs
// of any of its streams.
func (s *streams) damaged() bool {
	for st, end := range s.o.Journal.Ends() {
		if st.Origin == s.o.Node && end.Damaged != 0 {
			return true
		}
	}
	return false
}

func (s *streams) island(st journal.Stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, island := s.islands[st]
	return island
}

func keyOf(st journal.Stream) string {
	return agreed.StreamKey(st.Origin, st.Incarnation.String())
}

// upkeep is the state of run.
type upkeep struct {
	leasedAt  time.Time // when this node last had a lease
	updatedAt time.Time // when update ran last
	beginAt   time.Time // of the next try to begin the first stream
	retryAt   time.Time
	dropAt    time.Time
	loadAt    time.Time
	config    config.Jobs    // as the executor has seen it
	lost      journal.Stream // the written stream that another node got last, at lostAt
	lostAt    time.Time
	lanes     map[journal.Stream]takeover
	work      sync.WaitGroup
}

// takeover is a stream that this node executes, or is taking over.
type takeover struct {
	stop  context.CancelFunc // ends a takeover that is running
	token journal.Token      // zero while the stream is not agreed on
}

// run follows the agreed ownership of streams until ctx ends.
func (s *streams) run(ctx context.Context, x *executor) error {
	c := &upkeep{leasedAt: time.Now(), lanes: map[journal.Stream]takeover{}}
	ctx, stop := context.WithCancel(ctx)
	defer c.work.Wait()
	defer stop()
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		tick.Reset(clock.UntilTick(s.o.Host.Boottime(), updateEvery))
		changed := s.o.Ownership.Changed()
		if err := s.update(ctx, c, x); err != nil {
			return err
		}
		if cfg := s.o.config(); cfg != c.config { // jobs may have been unpaused
			c.config = cfg
			x.nudge()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

// beginFirst begins the first stream. While the disk is full, or the journal has too many
// streams, it tries again: the streams of other nodes are dropped meanwhile.
func (s *streams) beginFirst(ctx context.Context, c *upkeep, x *executor, now time.Time) error {
	if _, _, begun := s.current(); begun || now.Before(c.beginAt) {
		return nil
	}
	c.beginAt = now.Add(retryWait)
	err := s.begin(ctx, x)
	switch {
	case err == nil || ctx.Err() != nil:
		return nil
	case !errors.Is(err, journal.ErrFull) && !errors.Is(err, journal.ErrTooManyStreams):
		return err
	}
	s.log.Warn("can't accept jobs yet", "err", err)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting.why = err
	return nil
}

func (s *streams) update(ctx context.Context, c *upkeep, x *executor) error {
	now := time.Now()
	if err := s.beginFirst(ctx, c, x, now); err != nil {
		return err
	}
	ran := now.Sub(c.updatedAt) < leaseLoss
	c.updatedAt = now
	leased := s.o.Ownership.Leased()
	if leased {
		c.leasedAt = now
	}
	s.lease(leased, now)
	current, _, begun := s.current()
	switch {
	case !begun:
	case s.lost(current):
		// The owner drops the stream when its last job has ended: a later job would have no
		// owner.
		s.disowned(c, current, now, ran)
		if err := s.begin(ctx, x); err != nil {
			s.log.Error("can't begin a new stream in place of one that another node owns", "err", err)
		} else {
			s.log.Warn("another node owns this node's stream, new jobs go to a new stream", "stream", current)
		}
	case !leased && now.Sub(c.leasedAt) > leaseLoss && !s.island(current):
		if err := s.begin(ctx, x); err != nil {
			s.log.Error("no lease, and can't begin an island stream", "err", err)
		} else {
			s.log.Warn("no lease, new jobs go to a stream that only this node executes")
		}
	}
	s.follow(ctx, c, x)
	var failed error
	if leased && !now.Before(c.retryAt) {
		if failed = s.propose(ctx); failed != nil {
			c.retryAt = now.Add(retryWait)
			if errors.Is(failed, errNote) {
				return failed
			}
			s.log.Warn("the proposal of a job stream failed", "err", failed)
		}
		s.inherit(ctx, c)
	}
	s.noteWaiting(now, failed)
	if leased && !now.Before(c.dropAt) {
		c.dropAt = now.Add(dropEvery)
		s.drop(ctx, x)
	}
	if !now.Before(c.loadAt) {
		c.loadAt = now.Add(loadAgain)
		x.loadAgain()
	}
	return nil
}

// disowned notes that another node got the written stream. The next stream is proposed at once
// if this node was away, because it did not run or had no lease, and the first time.
func (s *streams) disowned(c *upkeep, current journal.Stream, now time.Time, ran bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.lost == current { // no new stream could be begun
		return
	}
	c.lost = current
	if !ran || s.leased.IsZero() || now.Sub(s.leased) < disownedFirst && !s.opened.After(s.leased) {
		return
	}
	if now.Sub(c.lostAt) > calmAfter {
		s.losses = 0
	}
	if s.losses > 0 {
		s.openAt = now.Add(min(disownedFirst<<min(s.losses-1, 10), disownedMost))
	}
	s.losses++
	c.lostAt = now
}

// noteWaiting notes which streams of this node no node can execute now. failed is the error
// of a proposal that was just made, if any.
func (s *streams) noteWaiting(now time.Time, failed error) {
	current, _, begun := s.current()
	live := s.o.Table.LiveCounts()
	found, refuses, jobs := !begun, !begun, int64(0)
	for st := range s.o.Journal.Ends() {
		if st.Origin == s.o.Node && (st == current || live[st] > 0) && !s.known(st) && !s.island(st) {
			found, refuses, jobs = true, refuses || st == current, jobs+live[st]
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.waiting
	s.waiting = waiting{jobs: jobs}
	if found {
		s.waiting.since = earlier(was.since, now)
		s.waiting.why = cmp.Or(failed, was.why)
	}
	if refuses {
		s.waiting.refused = earlier(was.refused, now)
	}
}

// earlier is since, or now if since is not set.
func earlier(since, now time.Time) time.Time {
	if since.IsZero() {
		return now
	}
	return since
}

// accepts is nil when the jobs that this node accepts now can start, or soon will. The error
// wraps ErrNoStream.
func (s *streams) accepts() error {
	s.mu.Lock()
	since := s.waiting.refused
	s.mu.Unlock()
	if since.IsZero() || time.Since(since) < refuseAfter {
		return nil
	}
	return fmt.Errorf("%w since %s", ErrNoStream, since.UTC().Format(time.RFC3339))
}

// problem says in words why jobs that this node accepted, or would accept, can't start, or are
// not safe from the loss of this node; empty: nothing is wrong.
func (s *streams) problem() string {
	s.mu.Lock()
	w, now, begun, leased, losses, openAt := s.waiting, s.now, s.begun, !s.leased.IsZero(), s.losses, s.openAt
	s.mu.Unlock()
	alone := leased && begun && s.island(now)
	switch open := s.openCount(); {
	case !w.since.IsZero() && time.Since(w.since) >= refuseAfter:
		why := "the raft leader has not answered"
		if w.why != nil {
			why = w.why.Error()
		}
		text := fmt.Sprintf("the cluster has not agreed on a job stream of it for %s (%s)", time.Since(w.since).Round(time.Second), why)
		if !begun {
			text = fmt.Sprintf("it can't begin a job stream (%s)", why)
		}
		if w.jobs > 0 {
			text += fmt.Sprintf(": %d jobs that it accepted wait", w.jobs)
		}
		if !w.refused.IsZero() {
			text += "; it refuses new jobs, send them to other nodes"
		}
		return text
	case alone && open >= maxOpen:
		return fmt.Sprintf("it has %d job streams whose jobs have not ended, too many to open another one: until some have ended "+
			"it runs new jobs alone, and no other node takes them over if it is lost", open)
	case alone && time.Now().Before(openAt):
		return fmt.Sprintf("the raft leader gave its job stream to another node %d times in a row, although it runs: until %s it runs new jobs "+
			"alone, and no other node takes them over if it is lost; check its connections to the leader", losses, openAt.UTC().Format(time.TimeOnly))
	}
	return ""
}

// openCount is how many agreed streams this node has written, whoever owns them.
func (s *streams) openCount() int {
	count := 0
	for _, j := range s.o.State().Streams {
		if j.Origin == s.o.Node {
			count++
		}
	}
	return count
}

// follow takes over streams that this node owns now, and leaves streams that it no longer
// owns.
func (s *streams) follow(ctx context.Context, c *upkeep, x *executor) {
	mine := s.mine()
	for st, l := range c.lanes {
		token, still := mine[st]
		switch {
		case !still:
			s.log.Info("job stream has another owner or was dropped", "stream", st)
		case l.token == token:
			continue
		case l.token == (journal.Token{}):
			l.token = token
			c.lanes[st] = l
			continue
		default: // meanwhile another node owned it, and may have executed jobs
			s.log.Info("job stream had another owner and is this node's again", "stream", st)
		}
		l.stop()
		x.leave(st)
		delete(c.lanes, st)
	}
	for st, token := range mine {
		if _, known := c.lanes[st]; known {
			continue
		}
		taking, stop := context.WithCancel(ctx)
		c.lanes[st] = takeover{stop: stop, token: token}
		c.work.Go(func() { s.takeOver(taking, st, x) })
	}
}

// mine are the streams that this node executes, with their agreed tokens. A stream that is
// proposed and not yet agreed on is included, because no other node has it.
func (s *streams) mine() map[journal.Stream]journal.Token {
	mine := map[journal.Stream]journal.Token{}
	for _, j := range s.o.Ownership.Mine() {
		if i, err := journal.ParseIncarnation(j.Incarnation); err == nil {
			mine[journal.Stream{Origin: j.Origin, Incarnation: i}] = journal.Token(j.Token)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	alone := maps.Clone(s.islands)
	if s.begun {
		alone[s.now] = struct{}{}
	}
	for st := range alone {
		if !s.known(st) {
			mine[st] = journal.Token{}
		}
	}
	return mine
}

// known reports whether the cluster has agreed on a stream, or has dropped it.
func (s *streams) known(st journal.Stream) bool { return s.agreed(st) || s.lost(st) }

// lost reports whether a stream has another owner or was dropped.
func (s *streams) lost(st journal.Stream) bool {
	state := s.o.State()
	j, agreed := state.Streams[keyOf(st)]
	return agreed && j.Owner != s.o.Node || !agreed && slices.Contains(state.DoneStreams, keyOf(st))
}

// agreed reports whether the cluster has agreed on a stream.
func (s *streams) agreed(st journal.Stream) bool {
	_, agreed := s.o.State().Streams[keyOf(st)]
	return agreed
}

// lease notes since when this node has a lease.
func (s *streams) lease(held bool, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !held:
		s.leased = time.Time{}
	case s.leased.IsZero():
		s.leased = now
	}
}

// leaseIsSteady reports whether this node has had a lease for steadyAfter.
func (s *streams) leaseIsSteady() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.leased.IsZero() && time.Since(s.leased) >= steadyAfter
}

// takeOver queues the jobs of a stream. If other nodes may have executed the stream, or this
// disk may have lost its records, it first waits until this node has the records of all living
// nodes, so that a job that has ended there does not run again.
func (s *streams) takeOver(ctx context.Context, st journal.Stream, x *executor) {
	began := time.Now()
	if !s.ours(st) {
		s.log.Info("taking over a job stream", "stream", st)
		for !s.leaseIsSteady() {
			if clock.Sleep(ctx, updateEvery) != nil {
				return
			}
		}
		if err := s.o.Replication.AwaitCaughtUp(ctx); err != nil {
			return // ctx has ended
		}
	}
	x.open(st)
	n, err := x.load(st)
	if ctx.Err() != nil {
		x.leave(st)
		return
	}
	if err != nil {
		s.log.Error("can't read all jobs of a stream, will try again", "stream", st, "err", err)
		x.incomplete(st)
	}
	if n > 0 || st.Origin != s.o.Node {
		s.log.Info("queued the jobs of a stream", "stream", st, "jobs", n, "took", time.Since(began))
	}
}

var errNote = errors.New("write the file of island streams")

// propose proposes this node's streams to the cluster: the current one unless it must wait,
// then those with jobs that have not ended, then the others, so that all nodes drop them in
// the end. It leaves islands alone for which there is no room.
func (s *streams) propose(ctx context.Context) error {
	var full error
	for _, st := range s.unknown() {
		if open, room := s.openCount(), s.room(st); open >= room {
			if room == agreed.MaxStreamsPerNode {
				full = fmt.Errorf("%d streams of it have jobs that have not ended", open)
			}
			continue
		}
		if err := s.note(st); err != nil {
			return fmt.Errorf("%w: %w", errNote, err)
		}
		opening, stop := context.WithTimeout(ctx, openWait)
		token, err := s.o.Ownership.Open(opening, st.Incarnation.String())
		stop()
		if err != nil {
			return err
		}
		s.mu.Lock()
		if st == s.now {
			s.token, s.opened = journal.Token(token), time.Now()
		}
		s.mu.Unlock()
		s.log.Info("the cluster agreed on a job stream", "stream", st, "index", token.Index)
	}
	return full
}

// unknown are this node's streams that are not agreed on, in the order of proposal, without
// the current one if that must wait. A stream that was proposed before may have been dropped:
// then this node doesn't know yet how its jobs ended.
func (s *streams) unknown() []journal.Stream {
	live := s.o.Table.LiveCounts()
	current, _, _ := s.current()
	s.mu.Lock()
	wait := time.Now().Before(s.openAt)
	s.mu.Unlock()
	var todo []journal.Stream
	for st := range s.o.Journal.Ends() {
		if st.Origin == s.o.Node && (st != current || !wait || !s.island(st)) && !s.known(st) {
			todo = append(todo, st)
		}
	}
	rank := func(st journal.Stream) int {
		switch {
		case st == current:
			return 0
		case live[st] > 0:
			return 1
		}
		return 2
	}
	slices.SortFunc(todo, func(a, b journal.Stream) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(keyOf(a), keyOf(b)))
	})
	return todo
}

// room is how many agreed streams of this node there may be before this one is proposed.
func (s *streams) room(st journal.Stream) int {
	current, _, _ := s.current()
	switch {
	case st != current && s.o.Table.LiveCounts()[st] == 0:
		return maxOpenDone
	case s.island(st):
		return maxOpen
	}
	return agreed.MaxStreamsPerNode
}

// inherit asks for the island streams of nodes that were removed from the cluster, if this
// node has jobs of them that have not ended. By the removal an operator has confirmed that
// their node does not come back.
func (s *streams) inherit(ctx context.Context, c *upkeep) {
	for st, jobs := range s.o.Table.LiveCounts() {
		if jobs == 0 || st.Origin == s.o.Node || s.member(st.Origin) || s.known(st) {
			continue
		}
		asking, stop := context.WithTimeout(ctx, openWait)
		err := s.o.Ownership.Inherit(asking, st.Origin, st.Incarnation.String())
		stop()
		if err != nil {
			c.retryAt = time.Now().Add(retryWait)
			s.log.Warn("can't inherit the jobs of a removed node yet", "stream", st, "jobs", jobs, "err", err)
			return
		}
		s.log.Warn("inherited an island stream of a removed node", "stream", st, "jobs", jobs)
	}
}

// member reports whether a node belongs to the cluster. It is true while this node does not
// know the members.
func (s *streams) member(node string) bool {
	state := s.o.State()
	if state.ClusterID == "" {
		return true
	}
	_, member := state.Nodes[node]
	return member
}

// note removes a stream from the islands, because it is going to be proposed.
func (s *streams) note(st journal.Stream) error {
	s.mu.Lock()
	islands := maps.Clone(s.islands)
	s.mu.Unlock()
	if _, island := islands[st]; !island {
		return nil
	}
	delete(islands, st)
	if err := writeIslands(s.path, islands); err != nil { // only this goroutine writes the file
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.islands = islands
	return nil
}

// drop drops the agreed streams whose jobs have all ended. A stream of another node may have
// records that only its origin has, so it is dropped only when no more can come.
func (s *streams) drop(ctx context.Context, x *executor) {
	current, _, _ := s.current()
	var done []string
	var foreign []agreed.JobStream
	for _, j := range s.o.Ownership.Mine() {
		st, ok := streamOf(j)
		// A stream that was not taken over may only look as if all its jobs had ended: a
		// disk that was lost has no jobs.
		switch {
		case !ok || st == current || !s.idle(st, x) || !x.has(st) || !s.o.Replication.Spread(st):
		case st.Origin == s.o.Node:
			done = append(done, j.Key())
		default:
			foreign = append(foreign, j)
		}
	}
	done = append(done, s.ended(ctx, foreign, x)...)
	if len(done) == 0 {
		return
	}
	dropping, stop := context.WithTimeout(ctx, openWait)
	defer stop()
	if err := s.o.Ownership.Drop(dropping, done...); err != nil {
		s.log.Warn("can't drop job streams whose jobs have ended", "streams", len(done), "err", err)
		return
	}
	s.log.Info("dropped job streams whose jobs have ended", "streams", done)
}

func streamOf(j agreed.JobStream) (journal.Stream, bool) {
	i, err := journal.ParseIncarnation(j.Incarnation)
	return journal.Stream{Origin: j.Origin, Incarnation: i}, err == nil
}

// idle reports whether no job of a stream is left to do.
func (s *streams) idle(st journal.Stream, x *executor) bool {
	return s.o.Table.LiveCounts()[st] == 0 && x.live(st) == 0
}

// ended returns the keys of those streams of other nodes that get no more records, whose
// records are all here, and whose jobs have ended.
func (s *streams) ended(ctx context.Context, foreign []agreed.JobStream, x *executor) (keys []string) {
	if len(foreign) == 0 {
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	if s.o.Replication.AwaitCaughtUp(ctx) != nil {
		return nil
	}
	ended, err := s.o.Replication.AwaitEnded(ctx)
	if err != nil {
		return nil
	}
	for _, j := range foreign {
		st, _ := streamOf(j)
		if (ended(st) || !s.member(j.Origin) || s.movedOn(j)) && s.idle(st, x) {
			keys = append(keys, j.Key())
		}
	}
	return keys
}

// movedOn reports whether the origin of a stream is heard and writes to a later agreed one:
// then this stream gets no more records. Nodes of older versions don't say which streams
// they write.
func (s *streams) movedOn(j agreed.JobStream) bool {
	if !s.o.Heard(j.Origin) {
		return false
	}
	for _, later := range s.o.State().Streams {
		if later.Origin == j.Origin && later.Owner == j.Origin && later.Before == "" && later.OpenedAt.After(j.OpenedAt) {
			return true
		}
	}
	return false
}

var _ Ownership = (*failover.Ownership)(nil)
