package replication

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

// maxPiece bounds the data of one message, far below what gRPC takes.
const maxPiece = 1 << 20

// source serves one puller.
type source struct {
	r      *Replication
	peer   string
	stream grpc.BidiStreamingServer[replicationpb.PullRequest, replicationpb.PullResponse]
	wake   chan struct{} // has room for one
	tell   *tell
	news   *headlines

	mu      sync.Mutex // guards what follows
	out     *outflow
	epoch   uint64 // of the puller's marks that cursors were begun by
	wanted  map[string]bool
	probes  []uint64
	changed map[journal.Stream]struct{} // ends that the puller wasn't told
	shot    *snapshot                   // being sent
	agesAt  time.Duration               // when to tell ages again
}

// Pull serves one puller until it goes, or calls again.
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
	defer s.r.replace(peer, cancel)()

	src := &source{
		r: s.r, peer: peer, stream: stream, wake: make(chan struct{}, 1),
		out: newOutflow(), wanted: map[string]bool{}, changed: map[journal.Stream]struct{}{},
		tell: s.r.ledger.subscribe(peer),
	}
	defer src.tell.close()
	src.news = s.r.news.subscribe(src.wake)
	defer src.news.close()
	if err := src.take(first); err != nil {
		return err
	}
	// Recv ends when this handler has returned, so nobody waits for it here.
	s.r.life.calls.Go(func() {
		defer cancel()
		s.r.opts.Logger.Debug("a puller has gone", "peer", peer, "err", src.receive())
	})
	err = src.send(ctx)
	if ctx.Err() != nil {
		return status.Error(codes.Unavailable, "the call was given up")
	}
	return err
}

// receive takes what the puller says until the call breaks, and gives the reason.
func (c *source) receive() error {
	for {
		q, err := c.stream.Recv()
		if err != nil {
			return err
		}
		if err := c.take(q); err != nil {
			return err
		}
	}
}

// take does what a puller asks.
func (c *source) take(q *replicationpb.PullRequest) error {
	marks, err := readMarks(q.GetMarks())
	if err != nil {
		return err
	}
	resume, err := readEnds(q.GetResume())
	if err != nil {
		return err
	}
	acks := maps.Clone(marks[c.peer].Ends)
	c.r.ledger.hear(c.peer, marks)
	c.r.hearAges(q.GetAges(), duration(q.GetRoundTripUs()))

	c.mu.Lock()
	defer c.mu.Unlock()
	for s, held := range acks {
		c.out.acked(s, held)
	}
	c.recall()
	if c.shot != nil && q.GetSnapshotPage() > 0 {
		c.shot.acked(q.GetSnapshotPage())
	}
	if q.GetProbe() != 0 && len(c.probes) < maxProbes {
		c.probes = append(c.probes, q.GetProbe())
	}
	if q.GetWant() != nil {
		c.want(q.GetWant().GetOrigins(), resume)
	} else {
		for s, held := range resume {
			if e, ok := c.r.opts.Log.End(s); ok && c.wanted[s.Origin] {
				c.out.add(s, held, e.Durable)
			}
		}
	}
	ring(c.wake)
	return nil
}

// recall begins the streams again when the puller's marks are of a new epoch: by
// the old ones it has what its disk has lost. mu is held.
func (c *source) recall() {
	epoch := c.r.ledger.epoch(c.peer)
	if epoch == c.epoch {
		return
	}
	first := c.epoch == 0
	c.epoch = epoch
	if first {
		return
	}
	for s, cur := range c.out.cursors {
		if held := c.r.ledger.held(c.peer, s); held+1 < cur.next && cur.next != never {
			c.out.add(s, held, cur.end)
		}
	}
}

// want changes the origins to send; with mu held.
func (c *source) want(origins []string, resume map[journal.Stream]uint64) {
	before := c.wanted
	c.wanted = make(map[string]bool, len(origins))
	for _, o := range origins {
		c.wanted[o] = true
	}
	c.out.want(c.wanted)
	clear(c.changed)
	for s, e := range c.r.opts.Log.Ends() {
		if c.wanted[s.Origin] && !c.retired(s) {
			c.changed[s] = struct{}{}
			if held, named := resume[s]; named || !before[s.Origin] {
				c.out.add(s, held, e.Durable)
			}
		}
	}
}

func (c *source) retired(s journal.Stream) bool {
	return c.r.opts.Retired != nil && c.r.opts.Retired(s)
}

// send sends until ctx ends or the call breaks.
func (c *source) send(ctx context.Context) error {
	var flush, bulk <-chan time.Time
	bulkOpen := true
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-c.tell.wake:
			if flush == nil {
				flush = time.After(tellEvery)
			}
			continue
		case <-flush:
			flush = nil
			marks, more := c.tell.take()
			if more {
				ring(c.tell.wake)
			}
			if err := c.stream.Send(&replicationpb.PullResponse{Format: wireFormat, Marks: wireMarks(marks)}); err != nil {
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

// step sends one message, if there is one to send. slow is how long to send no
// more of the bulk after it.
func (c *source) step(ctx context.Context, bulk bool) (did bool, slow time.Duration, err error) {
	c.mu.Lock()
	for _, s := range c.news.take() {
		if c.wanted[s.Origin] {
			c.follow(s)
		}
	}
	if len(c.probes) > 0 {
		answer := c.answer()
		c.mu.Unlock()
		return true, 0, c.stream.Send(answer)
	}
	cur := c.out.choose(bulk)
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
	if err := c.sendable(cur, err); err != nil || len(frames) == 0 {
		return true, 0, err
	}
	c.mu.Lock()
	if c.out.cursors[cur.stream] != cur { // not wanted any more, or begun elsewhere
		c.mu.Unlock()
		return true, 0, nil
	}
	c.out.sent(cur, next, len(frames))
	c.mu.Unlock()
	if isBulk {
		slow = c.r.bulk.take(len(frames))
	}
	c.r.metrics.sent.Add(float64(len(frames)))
	return true, slow, c.sendFrames(cur.stream, from, next-1, frames)
}

// follow takes in that a wanted stream went on; with mu held.
func (c *source) follow(s journal.Stream) {
	e, ok := c.r.opts.Log.End(s)
	if !ok || c.retired(s) {
		return
	}
	if len(c.changed) < maxMarks {
		c.changed[s] = struct{}{}
	}
	if c.out.cursors[s] == nil {
		// New here, but the puller may have it from elsewhere.
		c.out.add(s, c.r.ledger.held(c.peer, s), e.Durable)
	} else {
		c.out.advance(s, e.Durable)
	}
}

// sendable judges what reading gave: trimmed records come as a snapshot instead.
func (c *source) sendable(cur *cursor, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, journal.ErrTrimmed):
		c.mu.Lock()
		defer c.mu.Unlock()
		c.out.park(cur)
		ring(c.wake)
		return nil
	case errors.Is(err, journal.ErrNoStream), errors.Is(err, journal.ErrGap):
		c.mu.Lock()
		defer c.mu.Unlock()
		c.out.remove(cur.stream)
		return nil
	}
	return status.Error(codes.Unavailable, fmt.Sprintf("read stream %s: %v", cur.stream, err))
}

func (c *source) sendFrames(s journal.Stream, first, last uint64, frames []byte) error {
	for {
		f := &replicationpb.Frames{Stream: wireStream(s), First: first, Last: last, Data: frames}
		if len(frames) > maxPiece {
			f.Data, f.More, frames = frames[:maxPiece], true, frames[maxPiece:]
		}
		if err := c.stream.Send(&replicationpb.PullResponse{Format: wireFormat, Frames: []*replicationpb.Frames{f}}); err != nil {
			return err
		}
		if !f.More {
			return nil
		}
	}
}

// answer says what this node has, for the oldest probe; with mu held.
func (c *source) answer() *replicationpb.PullResponse {
	a := &replicationpb.ProbeAnswer{Probe: c.probes[0]}
	c.probes = c.probes[1:]
	// The ages first: what came in between only makes the copies younger.
	for o := range c.wanted {
		if o == c.r.opts.Self {
			a.Ages = append(a.Ages, &replicationpb.OriginAge{Origin: o})
		} else if age, ok := c.r.fresh.age(o); ok {
			a.Ages = append(a.Ages, &replicationpb.OriginAge{Origin: o, AgeUs: micros(age)})
		}
	}
	for s := range c.changed {
		if e, ok := c.r.opts.Log.End(s); ok {
			a.Ends = append(a.Ends, &replicationpb.StreamSeq{Stream: wireStream(s), Seq: e.Durable})
		}
	}
	clear(c.changed)
	p := &replicationpb.PullResponse{Format: wireFormat, Probe: a}
	if now := c.r.opts.Boottime(); now >= c.agesAt {
		c.agesAt = now + agesEvery
		p.Ages = c.r.ages()
	}
	return p
}
