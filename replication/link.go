package replication

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	backoffMin = 50 * time.Millisecond
	backoffMax = time.Second
	// steadyAfter is how long a call must have lasted for the next failure to be
	// the first one again.
	steadyAfter = 5 * time.Second

	probeBusy = 50 * time.Millisecond
	probeIdle = time.Second
	// busyFor is how long after records have come the probes are frequent.
	busyFor = time.Second
	// tellEvery is how long marks gather that are no acknowledgement.
	tellEvery = 200 * time.Millisecond
	agesEvery = 500 * time.Millisecond
	// maxProbes bounds the probes without an answer.
	maxProbes = 64
)

// link pulls from one node. Its call is made again whenever it breaks.
type link struct {
	r      *Replication
	source string
	stop   context.CancelFunc

	mu      sync.Mutex // guards origins
	origins []string
	changed chan struct{} // has room for one
}

func newLink(r *Replication, source string) *link {
	return &link{r: r, source: source, changed: make(chan struct{}, 1)}
}

// want sets the origins to pull and reports whether they are others than before.
func (k *link) want(origins []string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if slices.Equal(k.origins, origins) {
		return false
	}
	k.origins = origins
	ring(k.changed)
	return true
}

func (k *link) wanted() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.origins
}

// run calls until ctx ends.
func (k *link) run(ctx context.Context) {
	wait := backoffMin
	for ctx.Err() == nil {
		began := k.r.opts.Boottime()
		err := k.call(ctx)
		if ctx.Err() != nil {
			return
		}
		if k.r.opts.Boottime()-began > steadyAfter {
			wait = backoffMin
		}
		k.r.metrics.breaks.Inc()
		k.r.opts.Logger.Info("pulling broke off", "source", k.source, "err", err)
		// Half of it is chance, so that those who lost a node don't return as one.
		pause := time.NewTimer(wait/2 + rand.N(wait/2)) //nolint:gosec // not a secret
		wait = min(2*wait, backoffMax)
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
		}
	}
}

// session is one call of Pull, as the puller has it.
type session struct {
	*link
	ctx    context.Context // ends with the call
	stream grpc.BidiStreamingClient[replicationpb.PullRequest, replicationpb.PullResponse]
	tell   *tell
	intake *intake
	rows   *rowsIntake

	mu      sync.Mutex // guards what follows
	acks    map[journal.Stream]struct{}
	resume  map[journal.Stream]uint64
	page    uint64 // of a snapshot, to be acknowledged
	probes  map[uint64]time.Duration
	probed  uint64
	trip    time.Duration // the newest round trip
	arrived time.Duration // the newest records
	told    map[journal.Stream]uint64
	wake    chan struct{} // has room for one: something to send
}

func (k *link) call(ctx context.Context) error {
	conn, err := k.r.opts.Dial(k.source)
	if err != nil {
		return fmt.Errorf("pull from %s: %w", k.source, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := replicationpb.NewReplicationClient(conn).Pull(ctx)
	if err != nil {
		return fmt.Errorf("pull from %s: %w", k.source, err)
	}
	g, ctx := errgroup.WithContext(ctx)
	c := &session{
		link: k, ctx: ctx, stream: stream, tell: k.r.ledger.subscribe(k.source),
		acks: map[journal.Stream]struct{}{}, resume: map[journal.Stream]uint64{},
		probes: map[uint64]time.Duration{}, told: map[journal.Stream]uint64{},
		arrived: -busyFor, wake: make(chan struct{}, 1),
	}
	defer c.tell.close()
	c.intake, c.rows = newIntake(c), newRowsIntake(c)
	g.Go(func() error { return c.send() })
	g.Go(func() error {
		defer cancel() // a call that the source ends is over for the sender too
		return c.receive()
	})
	g.Go(func() error { return c.rows.merge() })
	g.Go(func() error {
		select {
		case <-ctx.Done():
		case err := <-c.intake.failed:
			cancel()
			return err
		}
		return nil
	})
	err = g.Wait()
	c.intake.workers.Wait()
	return fmt.Errorf("pull from %s: %w", k.source, err)
}

// send is the only one that sends.
func (c *session) send() error {
	var sent []string // the origins that the source knows to be wanted
	var flush <-chan time.Time
	agesAt := -agesEvery
	ring(c.changed) // what is wanted comes first
	timer := time.NewTimer(0)
	defer timer.Stop()
	ring(c.tell.wake)
	for {
		q := &replicationpb.PullRequest{Format: wireFormat}
		probe := timer.C
		if sent == nil {
			probe = nil
		}
		select {
		case <-c.ctx.Done():
			return nil
		case <-c.changed:
			origins := c.wanted()
			q.Want = &replicationpb.Want{Origins: origins}
			q.Resume = c.resumeAt(origins, sent)
			if sent == nil {
				q.Marks = c.marks()
			}
			sent = append([]string{}, origins...)
		case <-c.wake:
		case <-c.tell.wake:
			if flush == nil {
				flush = time.After(tellEvery)
			}
			continue
		case <-flush:
			flush = nil
			q.Marks = c.marks()
		case <-probe:
			c.probe(q)
			timer.Reset(c.probeAfter())
			if now := c.r.opts.Boottime(); now-agesAt >= agesEvery {
				agesAt = now
				q.Ages = c.r.ages()
			}
		}
		if c.pending(q); !somethingIn(q) {
			continue
		}
		if err := c.stream.Send(q); err != nil {
			// io.EOF says only that the call is over; the reason comes to the receiver.
			return nil //nolint:nilerr
		}
	}
}

func somethingIn(q *replicationpb.PullRequest) bool {
	return q.Want != nil || len(q.Resume)+len(q.Marks)+len(q.Ages) > 0 || q.Probe != 0 || q.SnapshotPage != 0
}

// marks are those to tell at leisure.
func (c *session) marks() []*replicationpb.HolderMarks {
	marks, more := c.tell.take()
	if more {
		ring(c.tell.wake)
	}
	return wireMarks(marks)
}

// pending adds the acknowledgements and what else waits.
func (c *session) pending(q *replicationpb.PullRequest) {
	c.mu.Lock()
	acks := make([]journal.Stream, 0, len(c.acks))
	for s := range c.acks {
		acks = append(acks, s)
	}
	clear(c.acks)
	for s, held := range c.resume {
		q.Resume = append(q.Resume, &replicationpb.StreamSeq{Stream: wireStream(s), Seq: held})
	}
	clear(c.resume)
	q.SnapshotPage, c.page = c.page, 0
	q.RoundTripUs = uint64(max(0, c.trip.Microseconds()))
	c.mu.Unlock()
	if len(acks) > 0 {
		q.Marks = append(q.Marks, wireMarks(c.tell.ack(acks))...)
	}
}

// resumeAt says where to go on with the streams of origins that are wanted newly.
func (c *session) resumeAt(origins, before []string) []*replicationpb.StreamSeq {
	var out []*replicationpb.StreamSeq
	for s, e := range c.r.opts.Log.Ends() {
		if !slices.Contains(origins, s.Origin) || slices.Contains(before, s.Origin) {
			continue
		}
		held := e.Durable
		if c.r.unwanted(s) {
			held = never
		}
		out = append(out, &replicationpb.StreamSeq{Stream: wireStream(s), Seq: held})
	}
	return out
}

// never is where a stream goes on that isn't wanted.
const never = ^uint64(0)

func (c *session) probe(q *replicationpb.PullRequest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.probes) >= maxProbes {
		return
	}
	c.probed++
	c.probes[c.probed] = c.r.opts.Boottime()
	q.Probe = c.probed
}

func (c *session) probeAfter() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.r.opts.Boottime()-c.arrived < busyFor {
		return probeBusy
	}
	return probeIdle
}

// receive takes what the source sends.
func (c *session) receive() error {
	for {
		p, err := c.stream.Recv()
		if err != nil {
			return err
		}
		if p.GetFormat() > wireFormat {
			return fmt.Errorf("%w: format %d, this node reads %d", errNewerPeer, p.GetFormat(), wireFormat)
		}
		if err := c.take(p); err != nil {
			return err
		}
	}
}

var errNewerPeer = errors.New("the peer speaks a replication format that this version does not know")

func (c *session) take(p *replicationpb.PullResponse) error {
	marks, err := readMarks(p.GetMarks())
	if err != nil {
		return err
	}
	if len(marks) > 0 {
		c.r.ledger.hear(c.source, marks)
	}
	for _, f := range p.GetFrames() {
		if err := c.intake.put(f); err != nil {
			return err
		}
	}
	if len(p.GetFrames()) > 0 {
		c.mu.Lock()
		c.arrived = c.r.opts.Boottime()
		c.mu.Unlock()
	}
	c.mu.Lock()
	trip := c.trip
	c.mu.Unlock()
	c.r.hearAges(p.GetAges(), trip)
	if err := c.rows.take(p.GetSnapshot()); err != nil {
		return err
	}
	return c.answered(p.GetProbe())
}

// answered takes the answer of a probe: what the source had of each origin when
// it was asked, or later.
func (c *session) answered(a *replicationpb.ProbeAnswer) error {
	if a == nil {
		return nil
	}
	ends, err := readEnds(a.GetEnds())
	if err != nil {
		return err
	}
	c.mu.Lock()
	sent, ok := c.probes[a.GetProbe()]
	delete(c.probes, a.GetProbe())
	if ok {
		c.trip = c.r.opts.Boottime() - sent
	}
	for s, end := range ends {
		if len(c.told) < maxMarks {
			c.told[s] = end
		}
	}
	byOrigin := map[string]map[journal.Stream]uint64{}
	for s, end := range c.told {
		if byOrigin[s.Origin] == nil {
			byOrigin[s.Origin] = map[journal.Stream]uint64{}
		}
		byOrigin[s.Origin][s] = end
	}
	c.mu.Unlock()
	if !ok {
		return nil
	}
	// An origin that isn't named was not wanted when the answer was given, or the
	// source doesn't know how old its copy is.
	for _, age := range a.GetAges() {
		o := age.GetOrigin()
		c.r.fresh.answered(o, sent-duration(age.GetAgeUs()), byOrigin[o], c.r.heldHere)
	}
	return nil
}

// stored says that more of a stream is durable here: the source is told at once.
func (c *session) stored(s journal.Stream) {
	c.mu.Lock()
	c.acks[s] = struct{}{}
	c.mu.Unlock()
	ring(c.wake)
}

// again asks the source to go on after what is held.
func (c *session) again(s journal.Stream, held uint64) {
	c.mu.Lock()
	c.resume[s] = held
	c.mu.Unlock()
	ring(c.wake)
}

// merged says that a page of a snapshot is in the table.
func (c *session) merged(page uint64) {
	c.mu.Lock()
	c.page = page
	c.mu.Unlock()
	ring(c.wake)
}
