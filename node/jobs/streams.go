package jobs

import (
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
	case !journal.Refused(err) && !errors.Is(err, journal.ErrTooManyStreams):
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

var _ Ownership = (*failover.Ownership)(nil)
