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
	"github.com/dsnode/dsnode/storage/notify"
)

const (
	backoffMin = 50 * time.Millisecond
	backoffMax = time.Second
	// steadyAfter is how long a call must have lasted to reset the backoff.
	steadyAfter = 5 * time.Second

	probeBusy = 50 * time.Millisecond
	probeIdle = time.Second
	// busyFor is how long probes stay frequent after records have arrived.
	busyFor = time.Second
	// updateEvery is how long watermark changes other than acknowledgements are collected.
	updateEvery = 200 * time.Millisecond
	agesEvery   = 500 * time.Millisecond
	// maxProbes bounds the unanswered probes.
	maxProbes = 64
)

// puller pulls from one node. It repeats its call whenever that breaks.
type puller struct {
	r      *Replication
	source string
	stop   context.CancelFunc

	mu      sync.Mutex // guards origins
	origins []string
	changed chan struct{} // capacity 1
}

// want sets the origins to pull and reports whether they changed.
func (k *puller) want(origins []string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if slices.Equal(k.origins, origins) {
		return false
	}
	k.origins = origins
	notify.Wake(k.changed)
	return true
}

func (k *puller) wanted() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.origins
}

// run repeats the call until ctx ends.
func (k *puller) run(ctx context.Context) {
	wait := backoffMin
	for ctx.Err() == nil {
		began := k.r.opts.Boottime()
		err := k.pullOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if k.r.opts.Boottime()-began > steadyAfter {
			wait = backoffMin
		}
		k.r.metrics.breaks.Inc()
		k.r.opts.Logger.Info("pull call ended", "source", k.source, "err", err)
		// Half of the wait is random, so that the pullers of a failed node don't all retry at once.
		if !pause(ctx, wait/2+rand.N(wait/2)) { //nolint:gosec // not a secret
			return
		}
		wait = min(2*wait, backoffMax)
	}
}

// pullSession is the client side of one Pull call.
type pullSession struct {
	*puller
	ctx     context.Context // ends with the call
	group   *errgroup.Group // of the call: its first error ends ctx
	stream  grpc.BidiStreamingClient[replicationpb.PullRequest, replicationpb.PullResponse]
	updates *markUpdates
	records *recordReceiver
	rows    *rowReceiver

	mu          sync.Mutex // guards the fields below
	acks        map[journal.Stream]struct{}
	resume      map[journal.Stream]uint64
	page        uint64 // of a snapshot, to be acknowledged
	probes      map[uint64]time.Duration
	lastProbe   uint64
	roundTrip   time.Duration // the newest measurement
	lastRecords time.Duration // when records last arrived
	sourceEnds  map[journal.Stream]uint64
	wake        chan struct{} // capacity 1: there is something to send
}

func (k *puller) pullOnce(ctx context.Context) error {
	conn, err := k.r.opts.Dial(k.source)
	if err != nil {
		return fmt.Errorf("pull from %s: %w", k.source, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	stream, err := replicationpb.NewReplicationClient(conn).Pull(ctx)
	if err != nil {
		return fmt.Errorf("pull from %s: %w", k.source, err)
	}
	c := &pullSession{
		puller: k, ctx: ctx, group: g, stream: stream, updates: k.r.tracker.subscribe(k.source),
		acks: map[journal.Stream]struct{}{}, resume: map[journal.Stream]uint64{},
		probes: map[uint64]time.Duration{}, sourceEnds: map[journal.Stream]uint64{},
		lastRecords: -busyFor, wake: make(chan struct{}, 1),
	}
	defer c.updates.close()
	c.records = &recordReceiver{c: c, streams: map[journal.Stream]*receiveBuffer{}}
	c.rows = &rowReceiver{c: c, pages: make(chan *replicationpb.SnapshotPage, maxPages)}
	g.Go(c.send)
	g.Go(c.receive)
	g.Go(c.rows.merge)
	return fmt.Errorf("pull from %s: %w", k.source, g.Wait())
}

// send sends all messages of the session.
func (c *pullSession) send() error {
	var sent []string // the origins that the source was asked for
	var flush <-chan time.Time
	agesAt := -agesEvery
	snapshots := uint32(snapshotsOn) // what the source was told
	notify.Wake(c.changed)           // the first message must contain the wanted origins
	timer := time.NewTimer(0)
	defer timer.Stop()
	notify.Wake(c.updates.wake)
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
				q.Marks = wireMarks(c.updates.take())
			}
			sent = append([]string{}, origins...)
		case <-c.wake:
		case <-c.updates.wake:
			if flush == nil {
				flush = time.After(updateEvery)
			}
			continue
		case <-flush:
			flush = nil
			q.Marks = wireMarks(c.updates.take())
		case <-probe:
			c.probe(q)
			timer.Reset(c.probeAfter())
			if now := c.r.opts.Boottime(); now-agesAt >= agesEvery {
				agesAt = now
				q.Ages = c.r.ages()
			}
		}
		if c.addPending(q); !hasContent(q) {
			continue
		}
		want := uint32(snapshotsOn)
		if c.r.opts.Table.Partial() {
			want = snapshotsOff // completion gets all rows, once
		}
		if want != snapshots {
			q.Snapshots, snapshots = want, want
		}
		if err := c.stream.Send(q); err != nil {
			// io.EOF says only that the call has ended; Recv returns the reason.
			return nil //nolint:nilerr
		}
	}
}

func hasContent(q *replicationpb.PullRequest) bool {
	return q.Want != nil || len(q.Resume)+len(q.Marks)+len(q.Ages) > 0 || q.Probe != 0 || q.SnapshotPage != 0
}

// addPending adds the acknowledgements and requests that wait to be sent.
func (c *pullSession) addPending(q *replicationpb.PullRequest) {
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
	q.RoundTripUs = uint64(max(0, c.roundTrip.Microseconds()))
	c.mu.Unlock()
	if len(acks) > 0 {
		q.Marks = append(q.Marks, wireMarks(c.updates.ack(acks))...)
	}
}

// resumeAt returns where to continue the streams of the newly wanted origins.
func (c *pullSession) resumeAt(origins, before []string) []*replicationpb.StreamSeq {
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

// never, as the record to continue after, means that a stream is not wanted.
const never = ^uint64(0)

func (c *pullSession) probe(q *replicationpb.PullRequest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.probes) >= maxProbes {
		return
	}
	c.lastProbe++
	c.probes[c.lastProbe] = c.r.opts.Boottime()
	q.Probe = c.lastProbe
}

func (c *pullSession) probeAfter() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.r.opts.Boottime()-c.lastRecords < busyFor {
		return probeBusy
	}
	return probeIdle
}

// receive handles the source's messages.
func (c *pullSession) receive() error {
	for {
		p, err := c.stream.Recv()
		if err != nil {
			return err
		}
		if p.GetFormat() > wireFormat {
			return fmt.Errorf("%w: format %d, this node reads %d", errNewerPeer, p.GetFormat(), wireFormat)
		}
		if err := c.handle(p); err != nil {
			return err
		}
	}
}

var errNewerPeer = errors.New("the peer uses a replication format that this version does not know")

func (c *pullSession) handle(p *replicationpb.PullResponse) error {
	marks, err := readMarks(p.GetMarks())
	if err != nil {
		return err
	}
	if len(marks) > 0 {
		c.r.tracker.merge(c.source, marks)
	}
	for _, f := range p.GetFrames() {
		if err := c.records.put(f); err != nil {
			return err
		}
	}
	c.mu.Lock()
	if len(p.GetFrames()) > 0 {
		c.lastRecords = c.r.opts.Boottime()
	}
	trip := c.roundTrip
	c.mu.Unlock()
	c.r.mergeAges(p.GetAges(), trip)
	if err := c.rows.take(p.GetSnapshot()); err != nil {
		return err
	}
	return c.handleAnswer(p.GetProbe())
}

// handleAnswer handles the answer to a probe: what the source had of each origin when it
// was asked, or later.
func (c *pullSession) handleAnswer(a *replicationpb.ProbeAnswer) error {
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
		c.roundTrip = c.r.opts.Boottime() - sent
	}
	for s, end := range ends {
		if len(c.sourceEnds) < maxMarks {
			c.sourceEnds[s] = end
		}
	}
	byOrigin := map[string]map[journal.Stream]uint64{}
	for s, end := range c.sourceEnds {
		// This node has dropped a retired stream, or need not get it.
		if c.r.opts.Retired(s) {
			delete(c.sourceEnds, s)
			continue
		}
		if byOrigin[s.Origin] == nil {
			byOrigin[s.Origin] = map[journal.Stream]uint64{}
		}
		byOrigin[s.Origin][s] = end
	}
	c.mu.Unlock()
	if !ok {
		return nil
	}
	// An origin that is missing was not wanted when the source answered, or the source
	// doesn't know the age of its copy.
	for _, age := range a.GetAges() {
		o := age.GetOrigin()
		c.r.fresh.answered(o, sent-duration(age.GetAgeUs()), byOrigin[o], c.r.heldHere)
	}
	return nil
}

// acknowledge reports to the source at once that more of a stream is durable here.
func (c *pullSession) acknowledge(s journal.Stream) {
	c.mu.Lock()
	c.acks[s] = struct{}{}
	c.mu.Unlock()
	notify.Wake(c.wake)
}

// requestAfter asks the source to continue a stream after the given record.
func (c *pullSession) requestAfter(s journal.Stream, held uint64) {
	c.mu.Lock()
	c.resume[s] = held
	c.mu.Unlock()
	notify.Wake(c.wake)
}

// acknowledgePage reports to the source that a page of a snapshot is merged.
func (c *pullSession) acknowledgePage(page uint64) {
	c.mu.Lock()
	c.page = page
	c.mu.Unlock()
	notify.Wake(c.wake)
}
