package replication

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/notify"
)

// maxPiece bounds the data of one message, far below gRPC's limit.
const maxPiece = 1 << 20

// pieces yields data in at least one piece of up to maxPiece, and whether more follow.
func pieces(data []byte) iter.Seq2[[]byte, bool] {
	return func(yield func([]byte, bool) bool) {
		for len(data) > maxPiece {
			if !yield(data[:maxPiece], true) {
				return
			}
			data = data[maxPiece:]
		}
		yield(data, false)
	}
}

// sender serves one puller.
type sender struct {
	r       *Replication
	peer    string
	stream  grpc.BidiStreamingServer[replicationpb.PullRequest, replicationpb.PullResponse]
	wake    chan struct{} // capacity 1
	updates *markUpdates
	changes *changeSub

	mu         sync.Mutex // guards the fields below
	queue      *sendQueue
	epoch      uint64 // of the puller's watermarks, by which the cursors were placed
	wanted     map[string]bool
	probes     []uint64
	unreported map[journal.Stream]struct{} // ends that changed since the last answer to a probe
	snapshot   *snapshot                   // being sent
	// noSnapshots: the puller gets the whole table by itself.
	noSnapshots bool
	nextAges    time.Duration // when to send ages again
}

// Pull serves one puller until its call ends, or it makes another call.
func (s *server) Pull(stream grpc.BidiStreamingServer[replicationpb.PullRequest, replicationpb.PullResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	peer, err := s.caller(stream.Context(), first.GetFormat())
	if err != nil {
		return err
	}
	ctx, leave, err := s.r.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer s.r.replacePull(peer, cancel)()

	src := &sender{
		r: s.r, peer: peer, stream: stream, wake: make(chan struct{}, 1),
		queue: newSendQueue(), wanted: map[string]bool{}, unreported: map[journal.Stream]struct{}{},
		updates: s.r.tracker.subscribe(peer),
	}
	defer src.updates.close()
	src.changes = s.r.changes.subscribe(src.wake)
	defer src.changes.close()
	if err := src.handle(first); err != nil {
		return err
	}
	// Recv returns when this handler has returned, so don't wait for it here.
	s.r.lifecycle.calls.Go(func() {
		defer cancel()
		s.r.opts.Logger.Debug("a puller has disconnected", "peer", peer, "err", src.receive())
	})
	err = src.send(ctx)
	if ctx.Err() != nil {
		return status.Error(codes.Unavailable, "the call was cancelled")
	}
	return err
}

// receive handles the puller's messages until the call breaks, and returns the reason.
func (c *sender) receive() error {
	for {
		q, err := c.stream.Recv()
		if err != nil {
			return err
		}
		if err := c.handle(q); err != nil {
			return err
		}
	}
}

// handle handles one message of the puller.
func (c *sender) handle(q *replicationpb.PullRequest) error {
	marks, err := readMarks(q.GetMarks())
	if err != nil {
		return err
	}
	resume, err := readEnds(q.GetResume())
	if err != nil {
		return err
	}
	acks := maps.Clone(marks[c.peer].Ends)
	c.r.tracker.merge(c.peer, marks)
	c.r.mergeAges(q.GetAges(), duration(q.GetRoundTripUs()))

	c.mu.Lock()
	defer c.mu.Unlock()
	for s, held := range acks {
		c.queue.acked(s, held)
	}
	if q.GetSnapshots() != 0 {
		c.noSnapshots = q.GetSnapshots() == snapshotsOff
	}
	c.rewind()
	if c.snapshot != nil && q.GetSnapshotPage() > 0 {
		c.snapshot.acked(q.GetSnapshotPage())
	}
	if q.GetProbe() != 0 && len(c.probes) < maxProbes {
		c.probes = append(c.probes, q.GetProbe())
	}
	if q.GetWant() != nil {
		c.want(q.GetWant().GetOrigins(), resume)
	} else {
		for s, held := range resume {
			if e, ok := c.r.opts.Log.End(s); ok && c.wanted[s.Origin] {
				c.queue.add(s, held, e.Durable)
			}
		}
	}
	notify.Wake(c.wake)
	return nil
}

// rewind places the cursors again when the puller's watermarks are of a new epoch: under
// the old epoch they included records that its disk has lost. The caller holds mu.
func (c *sender) rewind() {
	epoch := c.r.tracker.epoch(c.peer)
	if epoch == c.epoch {
		return
	}
	first := c.epoch == 0
	c.epoch = epoch
	if first {
		return
	}
	for s, cur := range c.queue.cursors {
		if held := c.r.tracker.held(c.peer, s); held+1 < cur.next && cur.next != never {
			c.queue.add(s, held, cur.end)
		}
	}
}

// want changes the origins to send. The caller holds mu.
func (c *sender) want(origins []string, resume map[journal.Stream]uint64) {
	before := c.wanted
	c.wanted = make(map[string]bool, len(origins))
	for _, o := range origins {
		c.wanted[o] = true
	}
	c.queue.keepOrigins(c.wanted)
	clear(c.unreported)
	for s, e := range c.r.opts.Log.Ends() {
		if c.wanted[s.Origin] && !c.r.opts.Retired(s) {
			c.unreported[s] = struct{}{}
			if held, named := resume[s]; named || !before[s.Origin] {
				c.queue.add(s, held, e.Durable)
			}
		}
	}
}

// send sends until ctx ends or the call breaks.
func (c *sender) send(ctx context.Context) error {
	var flush, bulk <-chan time.Time
	bulkOpen := true
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-c.updates.wake:
			if flush == nil {
				flush = time.After(updateEvery)
			}
			continue
		case <-flush:
			flush = nil
			if err := c.stream.Send(&replicationpb.PullResponse{Format: wireFormat, Marks: wireMarks(c.updates.take())}); err != nil {
				return err
			}
		case <-bulk:
			bulk, bulkOpen = nil, true
		}
		for ctx.Err() == nil {
			did, slow, err := c.step(ctx, bulkOpen)
			if err != nil {
				return err
			}
			if slow > 0 {
				bulk, bulkOpen = time.After(slow), false
			}
			if !did {
				break
			}
		}
	}
}

// step sends one message if there is one. slow is how long to wait afterwards before more
// bulk data is sent.
func (c *sender) step(ctx context.Context, bulk bool) (did bool, slow time.Duration, err error) {
	c.mu.Lock()
	for _, s := range c.changes.take() {
		if c.wanted[s.Origin] {
			c.follow(s)
		}
	}
	if len(c.probes) > 0 {
		answer := c.answerProbe()
		c.mu.Unlock()
		return true, 0, c.stream.Send(answer)
	}
	cur := c.queue.next(bulk)
	if cur == nil {
		c.mu.Unlock()
		if !bulk {
			return false, 0, nil
		}
		return c.sendSnapshot(ctx)
	}
	from, isBulk := cur.next, cur.bulk
	c.mu.Unlock()

	size := liveBatch
	if isBulk {
		size = bulkBatch
	}
	frames, next, err := c.r.opts.Log.Read(cur.stream, from, size)
	if err := c.checkRead(cur, err); err != nil || len(frames) == 0 {
		return true, 0, err
	}
	c.mu.Lock()
	if c.queue.cursors[cur.stream] != cur { // removed or placed again meanwhile
		c.mu.Unlock()
		return true, 0, nil
	}
	c.queue.sent(cur, next, len(frames))
	c.mu.Unlock()
	if isBulk {
		slow = c.r.bulk.take(len(frames))
	}
	c.r.metrics.sent.Add(float64(len(frames)))
	return true, slow, c.sendFrames(cur.stream, from, next-1, frames)
}

// follow updates the queue for a wanted stream that advanced. The caller holds mu.
func (c *sender) follow(s journal.Stream) {
	e, ok := c.r.opts.Log.End(s)
	if !ok || c.r.opts.Retired(s) {
		return
	}
	if len(c.unreported) < maxMarks {
		c.unreported[s] = struct{}{}
	}
	if c.queue.cursors[s] == nil {
		// The stream is new on this node, but the puller may have it from another one.
		c.queue.add(s, c.r.tracker.held(c.peer, s), e.Durable)
	} else {
		c.queue.advance(s, e.Durable)
	}
}

// checkRead handles an error of reading a stream: trimmed records need a snapshot.
func (c *sender) checkRead(cur *cursor, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, journal.ErrTrimmed):
		c.mu.Lock()
		defer c.mu.Unlock()
		cur.parked = true
		notify.Wake(c.wake)
		return nil
	case errors.Is(err, journal.ErrNoStream), errors.Is(err, journal.ErrGap):
		c.mu.Lock()
		defer c.mu.Unlock()
		c.queue.remove(cur.stream)
		return nil
	}
	return status.Error(codes.Unavailable, fmt.Sprintf("read stream %s: %v", cur.stream, err))
}

func (c *sender) sendFrames(s journal.Stream, first, last uint64, frames []byte) error {
	for piece, more := range pieces(frames) {
		f := &replicationpb.Frames{Stream: wireStream(s), First: first, Last: last, Data: piece, More: more}
		if err := c.stream.Send(&replicationpb.PullResponse{Format: wireFormat, Frames: []*replicationpb.Frames{f}}); err != nil {
			return err
		}
	}
	return nil
}

// answerProbe answers the oldest probe. The caller holds mu.
func (c *sender) answerProbe() *replicationpb.PullResponse {
	a := &replicationpb.ProbeAnswer{Probe: c.probes[0]}
	c.probes = c.probes[1:]
	// Read the ages first: records that arrive in between only make the copies younger.
	for o := range c.wanted {
		if o == c.r.opts.Self {
			a.Ages = append(a.Ages, &replicationpb.OriginAge{Origin: o})
		} else if age, ok := c.r.fresh.age(o); ok {
			a.Ages = append(a.Ages, &replicationpb.OriginAge{Origin: o, AgeUs: micros(age)})
		}
	}
	for s := range c.unreported {
		if e, ok := c.r.opts.Log.End(s); ok {
			a.Ends = append(a.Ends, &replicationpb.StreamSeq{Stream: wireStream(s), Seq: e.Durable})
		}
	}
	clear(c.unreported)
	p := &replicationpb.PullResponse{Format: wireFormat, Probe: a}
	if now := c.r.opts.Boottime(); now >= c.nextAges {
		c.nextAges = now + agesEvery
		p.Ages = c.r.ages()
	}
	return p
}
