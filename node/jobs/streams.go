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
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	lookAtStreams = 250 * time.Millisecond
	// leaseLoss is how long a node may be without a lease before it takes new
	// jobs in a stream that nobody else can get: longer than a new leader needs.
	leaseLoss = 2 * time.Second
	// openWait bounds one proposal, retryWait is the pause after one that failed.
	openWait  = 10 * time.Second
	retryWait = 2 * time.Second
	// agreeWait is how long a start waits for its stream to be agreed on, a failed
	// proposal included.
	agreeWait   = 3 * time.Second
	dropEvery   = 10 * time.Second
	loadAgain   = 5 * time.Second
	islandsFile = "islands.json"
	// listenFor is how long a node has had a lease before it takes those that it
	// hears for all that can be heard: several pings. Right after a start it hears
	// nobody, and would find that it has all that the others hold.
	listenFor = time.Second
)

// streams are those that this node writes, and those whose jobs it executes.
//
// A stream that nobody was told of is an island: only this node can execute it,
// and it needs no lease for that. Which streams are islands is noted on disk:
// before one is begun, and, before the cluster is asked to agree on it, that it is
// none any more, because from then on another may adopt it: it needs a permit for
// each start for ever after, also after a crash. What is not noted is no island:
// also own streams that come back from peers after a disk was lost.
type streams struct {
	o    *Options
	log  *slog.Logger
	path string

	mu      sync.Mutex // guards all below
	begun   bool
	now     journal.Stream              // zero before begun
	token   journal.Token               // of now
	islands map[journal.Stream]struct{} // own streams that were never proposed, as on disk
	leased  time.Time                   // since when there is a lease, zero: there is none
}

// permit lets one start happen, like failover.Permit.
type permit struct {
	token  journal.Token
	inTime func() bool
	alone  bool // of an island
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

// begin opens a new stream for what is written from now on. The one before takes
// no more: whoever owns it then knows its end.
func (s *streams) begin(ctx context.Context, x *executor) error {
	next := journal.Stream{Origin: s.o.Node}
	_, _ = rand.Read(next.Incarnation[:]) // it never fails
	s.mu.Lock()
	islands := maps.Clone(s.islands)
	s.mu.Unlock()
	islands[next] = struct{}{}
	if err := writeIslands(s.path, islands); err != nil { // nobody else writes it now
		return fmt.Errorf("begin a job stream: %w", err)
	}
	if err := s.o.Journal.Create(ctx, next); err != nil {
		return fmt.Errorf("begin a job stream: %w", err)
	}
	// Before anybody writes there: a job without a lane counts for no bound.
	x.open(next)
	s.mu.Lock()
	before, begun := s.now, s.begun
	s.now, s.token, s.begun = next, s.islandToken(), true
	s.islands = islands
	s.mu.Unlock()
	if begun {
		if err := s.o.Journal.Freeze(before); err != nil {
			return fmt.Errorf("end a job stream: %w", err)
		}
	}
	return nil
}

func (s *streams) islandToken() journal.Token {
	if st := s.o.State(); st != nil {
		return journal.Token{Generation: st.Generation.Number}
	}
	return journal.Token{}
}

// current is where this node writes, and the token of what it accepts there;
// false before there is such a stream.
func (s *streams) current() (journal.Stream, journal.Token, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now, s.token, s.begun
}

// check permits one start of a job of a stream.
func (s *streams) check(st journal.Stream) (permit, error) {
	// That it is agreed on says more than the note: a disk may be an old image.
	if alone := func() bool { return s.island(st) && !s.known(st) }; alone() {
		return permit{token: s.islandToken(), inTime: alone, alone: true}, nil
	}
	p, err := s.o.Ownership.Check(keyOf(st))
	if err != nil {
		return permit{}, err
	}
	return permit{token: journal.Token(p.Token), inTime: p.InTime}, nil
}

// still reports whether what was permitted a moment ago is permitted now. A stream
// that was an island then and has been agreed on since belongs to the same node,
// and nobody was in between: that calls no job off. While the cluster is being
// asked nothing may start, so it waits.
func (s *streams) still(ctx context.Context, st journal.Stream, p permit) bool {
	until := time.Now().Add(agreeWait)
	for {
		now, err := s.check(st)
		if err == nil {
			return now.inTime() && (now.token == p.token || p.alone && s.neverOthers(st))
		}
		asked := p.alone && !s.island(st) && !s.known(st)
		if !asked || !time.Now().Before(until) || sleep(ctx, 10*time.Millisecond) != nil {
			return false
		}
	}
}

// neverOthers reports whether a stream is agreed on and had no other owner.
func (s *streams) neverOthers(st journal.Stream) bool {
	state := s.o.State()
	if state == nil {
		return false
	}
	j, agreed := state.Streams[keyOf(st)]
	return agreed && j.Owner == s.o.Node && j.Before == ""
}

// ours reports whether nobody but this process, or one before it alone, can have
// executed a stream.
func (s *streams) ours(st journal.Stream) bool {
	if state := s.o.State(); state != nil && state.Streams[keyOf(st)].Before != "" {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, island := s.islands[st]
	return island || st == s.now
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

// caring is what run keeps between its looks.
type caring struct {
	leasedAt time.Time
	retryAt  time.Time
	dropAt   time.Time
	loadAt   time.Time
	lanes    map[journal.Stream]taken
	work     sync.WaitGroup
}

// taken is a stream that is taken over.
type taken struct {
	stop  context.CancelFunc // ends a taking over that is under way
	token journal.Token      // zero while it is not agreed on
}

// run keeps the streams in line with what is agreed, until ctx ends.
func (s *streams) run(ctx context.Context, x *executor) error {
	if err := s.beginFirst(ctx, x); err != nil {
		return err
	}
	c := &caring{leasedAt: time.Now(), lanes: map[journal.Stream]taken{}}
	ctx, stop := context.WithCancel(ctx)
	defer c.work.Wait()
	defer stop()
	beat := time.NewTimer(0)
	defer beat.Stop()
	for {
		beat.Reset(clock.UntilTick(clock.Boottime(), lookAtStreams))
		changed := s.o.Ownership.Changed()
		if err := s.look(ctx, c, x); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-beat.C:
		}
	}
}

// beginFirst waits for room on the disk, if it has to.
func (s *streams) beginFirst(ctx context.Context, x *executor) error {
	for {
		err := s.begin(ctx, x)
		switch {
		case err == nil || ctx.Err() != nil:
			return nil
		case !errors.Is(err, journal.ErrFull):
			return err
		}
		s.log.Warn("no jobs are taken yet", "err", err)
		if sleep(ctx, retryWait) != nil {
			return nil
		}
	}
}

func (s *streams) look(ctx context.Context, c *caring, x *executor) error {
	now := time.Now()
	leased := s.o.Ownership.Leased()
	if leased {
		c.leasedAt = now
	}
	s.lease(leased, now)
	current, _, _ := s.current()
	switch {
	case s.lost(current):
		// Its owner lets go of it when its last job has ended: what came later would
		// be nobody's.
		if err := s.begin(ctx, x); err != nil {
			s.log.Error("no new stream in place of one that another node owns", "err", err)
		} else {
			s.log.Warn("another node owns the stream of this one: new jobs go to a new stream", "stream", current)
		}
	case !leased && now.Sub(c.leasedAt) > leaseLoss && !s.island(current):
		if err := s.begin(ctx, x); err != nil {
			s.log.Error("no stream of its own for a node without a lease", "err", err)
		} else {
			s.log.Warn("no lease: new jobs go to a stream that this node alone executes")
		}
	}
	s.follow(ctx, c, x)
	if leased && !now.Before(c.retryAt) {
		if err := s.propose(ctx); err != nil {
			c.retryAt = now.Add(retryWait)
			if errors.Is(err, errNote) {
				return err
			}
			s.log.Warn("the cluster did not agree on a job stream", "err", err)
		}
		s.inherit(ctx, c)
	}
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

// follow takes streams over that this node is to execute, and leaves those that
// it is not any more.
func (s *streams) follow(ctx context.Context, c *caring, x *executor) {
	mine := s.mine()
	for st, l := range c.lanes {
		token, still := mine[st]
		switch {
		case !still:
			s.log.Info("job stream has another owner, or is done with", "stream", st)
		case l.token == token:
			continue
		case l.token == (journal.Token{}):
			l.token = token
			c.lanes[st] = l
			continue
		default: // in between another had it, and may have executed some of it
			s.log.Info("job stream had another owner, and is this node's again", "stream", st)
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
		c.lanes[st] = taken{stop: stop, token: token}
		c.work.Go(func() { s.takeOver(taking, st, x) })
	}
}

// mine are the streams to execute, with their tokens as agreed. One that is
// proposed and not yet agreed on is kept: nobody else has it.
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
	alone[s.now] = struct{}{}
	for st := range alone {
		if !s.known(st) {
			mine[st] = journal.Token{}
		}
	}
	return mine
}

// known reports whether the cluster has agreed on a stream, or had.
func (s *streams) known(st journal.Stream) bool { return s.agreed(st) || s.lost(st) }

// lost reports whether a stream has another owner, or is done with.
func (s *streams) lost(st journal.Stream) bool {
	state := s.o.State()
	if state == nil {
		return false
	}
	j, agreed := state.Streams[keyOf(st)]
	return agreed && j.Owner != s.o.Node || !agreed && slices.Contains(state.DoneStreams, keyOf(st))
}

// agreed reports whether the cluster has agreed on a stream.
func (s *streams) agreed(st journal.Stream) bool {
	state := s.o.State()
	if state == nil {
		return false
	}
	_, agreed := state.Streams[keyOf(st)]
	return agreed
}

// lease notes since when there is one.
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

func (s *streams) listened() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.leased.IsZero() && time.Since(s.leased) >= listenFor
}

// takeOver queues what is in a stream. Of one that others may have executed, or
// whose records a lost disk has taken here, all that any living node holds comes
// first: a job that was finished there shall not run again.
func (s *streams) takeOver(ctx context.Context, st journal.Stream, x *executor) {
	began := time.Now()
	if !s.ours(st) {
		s.log.Info("taking over a job stream", "stream", st)
		for !s.listened() {
			if sleep(ctx, lookAtStreams) != nil {
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
		s.log.Error("not all jobs of a stream can be read; it is tried again", "stream", st, "err", err)
		x.incomplete(st)
	}
	if n > 0 || st.Origin != s.o.Node {
		s.log.Info("jobs of a stream are queued", "stream", st, "jobs", n, "took", time.Since(began))
	}
}

var errNote = errors.New("note that a job stream is proposed")

// propose makes the own streams known that have something in them, or may get it.
func (s *streams) propose(ctx context.Context) error {
	live := s.o.Table.LiveCounts()
	current, _, _ := s.current()
	var todo []journal.Stream
	for st := range s.o.Journal.Ends() {
		// One that was proposed before and is not agreed on was never heard of, or is
		// done with: then this node doesn't know yet how its jobs ended.
		if st.Origin == s.o.Node && (st == current || live[st] > 0) && !s.known(st) {
			todo = append(todo, st)
		}
	}
	for _, st := range todo {
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
			s.token = journal.Token(token)
		}
		s.mu.Unlock()
		s.log.Info("the cluster knows a job stream", "stream", st, "index", token.Index)
	}
	return nil
}

// inherit asks for streams that a node took alone and never told of, when it was
// removed from the cluster and left jobs here: an operator has said that it won't
// come back for them.
func (s *streams) inherit(ctx context.Context, c *caring) {
	for st, jobs := range s.o.Table.LiveCounts() {
		if jobs == 0 || st.Origin == s.o.Node || s.member(st.Origin) || s.known(st) {
			continue
		}
		asking, stop := context.WithTimeout(ctx, openWait)
		err := s.o.Ownership.Inherit(asking, st.Origin, st.Incarnation.String())
		stop()
		if err != nil {
			c.retryAt = time.Now().Add(retryWait)
			s.log.Warn("nobody executes the jobs that a removed node left", "stream", st, "jobs", jobs, "err", err)
			return
		}
		s.log.Warn("the cluster knows a job stream that a removed node had kept to itself", "stream", st, "jobs", jobs)
	}
}

// member reports whether a node belongs to the cluster, as far as this one knows.
func (s *streams) member(node string) bool {
	state := s.o.State()
	if state == nil || state.ClusterID == "" {
		return true
	}
	_, member := state.Nodes[node]
	return member
}

// note writes down that others may know of a stream from now on.
func (s *streams) note(st journal.Stream) error {
	s.mu.Lock()
	islands := maps.Clone(s.islands)
	s.mu.Unlock()
	if _, island := islands[st]; !island {
		return nil
	}
	delete(islands, st)
	if err := writeIslands(s.path, islands); err != nil { // nobody else writes it now
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.islands = islands
	return nil
}

// drop lets the cluster forget streams of which nothing is left to do. What is
// not this node's own may have an end that only its origin has.
func (s *streams) drop(ctx context.Context, x *executor) {
	current, _, _ := s.current()
	live := s.o.Table.LiveCounts()
	var done []string
	for _, j := range s.o.Ownership.Mine() {
		i, err := journal.ParseIncarnation(j.Incarnation)
		st := journal.Stream{Origin: j.Origin, Incarnation: i}
		if err != nil || st == current || live[st] > 0 || x.live(st) > 0 {
			continue
		}
		// What has not been caught up with looks as if it was done: a lost disk has
		// no jobs.
		if !x.has(st) {
			continue
		}
		if !s.o.Replication.Spread(st) || st.Origin != s.o.Node && (!s.movedOn(j) || !s.whole(ctx, st)) {
			continue
		}
		done = append(done, j.Key())
	}
	if len(done) == 0 {
		return
	}
	dropping, stop := context.WithTimeout(ctx, openWait)
	defer stop()
	if err := s.o.Ownership.Drop(dropping, done...); err != nil {
		s.log.Warn("job streams that are done with stay agreed", "streams", len(done), "err", err)
		return
	}
	s.log.Info("job streams are done with", "streams", done)
}

// movedOn reports whether the origin of a stream has a later one of its own, or was
// removed: then it writes to this one no more.
func (s *streams) movedOn(j agreed.JobStream) bool {
	if !s.member(j.Origin) {
		return true
	}
	for _, later := range s.o.State().Streams {
		if later.Origin == j.Origin && later.Owner == j.Origin && later.Before == "" && later.OpenedAt.After(j.OpenedAt) {
			return true
		}
	}
	return false
}

// whole reports that nothing of another node's stream can still come.
func (s *streams) whole(ctx context.Context, st journal.Stream) bool {
	if s.member(st.Origin) && !s.o.Heard(st.Origin) {
		return false
	}
	ctx, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	return s.o.Replication.AwaitCaughtUp(ctx) == nil && s.o.Table.LiveCounts()[st] == 0
}

var _ Ownership = (*failover.Ownership)(nil)
