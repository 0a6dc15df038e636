package replication

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/replication/replicationpb"
)

const (
	// MaxFeedItem bounds an item of the feed, in bytes: half of what a message of
	// the mesh may have.
	MaxFeedItem = 2 << 20
	// feedQueue and feedItems bound what waits for one site or neighbour, also for
	// one that is away; the oldest goes first.
	feedQueue = 16 << 20
	feedItems = 16384
	// feedWindow bounds what is on its way to one node: on a slow link, that is how
	// much the journals may have to wait for.
	feedWindow = 512 << 10
	feedPlan   = 250 * time.Millisecond
)

// ErrFeedItem means that an item is larger than MaxFeedItem.
var ErrFeedItem = errors.New("the item is too large for the feed")

// Offer sends an item to every site, once, where one node passes it on to the
// others; for a site that is away it waits in memory. It may be lost, come twice or
// out of order. The item must not be changed afterwards. It never blocks: where too
// much waits the oldest items are dropped. Nothing is kept or sent before Run.
func (r *Replication) Offer(item []byte) error {
	if len(item) > MaxFeedItem {
		return fmt.Errorf("%w: %d bytes", ErrFeedItem, len(item))
	}
	r.feed.pass(item, true)
	return nil
}

// feed carries items that may be lost.
type feed struct {
	r    *Replication
	pace pacer

	mu    sync.Mutex // guards lanes, and to and stop of each
	lanes map[receiver]*lane
}

// receiver is who gets the feed from here: a neighbour, or another site.
type receiver struct{ site, neighbour string }

// lane is what waits for one receiver. It outlives that one's absence.
type lane struct {
	near bool               // a node of this site
	to   string             // the node that is sent to, "" while none is heard
	stop context.CancelFunc // ends the sending to it
	wake chan struct{}      // has room for one

	mu    sync.Mutex // guards what follows
	items []feedItem
	bytes int
}

type feedItem struct {
	data  []byte
	relay bool
}

func newFeed(r *Replication) *feed {
	return &feed{r: r, pace: pacer{now: r.opts.Boottime, perSecond: r.opts.Limits.FeedBytesPerSecond}, lanes: map[receiver]*lane{}}
}

// pass queues an item for the neighbours, and for the other sites when it is
// this node's own.
func (f *feed) pass(item []byte, own bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.lanes {
		if l.near || own {
			f.r.metrics.feedDropped.Add(float64(l.push(feedItem{data: item, relay: !l.near})))
		}
	}
}

// push gives how many items had to go.
func (l *lane) push(item feedItem) (dropped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.items = append(l.items, item)
	l.bytes += len(item.data)
	for l.bytes > feedQueue || len(l.items) > feedItems {
		l.bytes -= len(l.items[0].data)
		l.items[0] = feedItem{}
		l.items = l.items[1:]
		dropped++
	}
	ring(l.wake)
	return dropped
}

// back takes items that may not have arrived, oldest first, to be sent again before
// all others. It gives how many there is no room for.
func (l *lane) back(items []feedItem) (dropped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := len(items)
	for first > 0 && l.bytes+len(items[first-1].data) <= feedQueue && len(l.items)+len(items)-first < feedItems {
		first--
		l.bytes += len(items[first].data)
	}
	l.items = append(slices.Clone(items[first:]), l.items...)
	ring(l.wake)
	return first
}

func (l *lane) pop() (feedItem, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.items) == 0 {
		return feedItem{}, false
	}
	item := l.items[0]
	l.items[0] = feedItem{}
	l.items = l.items[1:]
	l.bytes -= len(item.data)
	return item, true
}

// targets are the nodes to send to: the neighbours, and one of each other site, ""
// for those of whom none is heard.
func (f *feed) targets() map[receiver]string {
	heard := map[receiver][]string{}
	for _, m := range f.r.opts.Members() {
		if m.Node == f.r.opts.Self {
			continue
		}
		to := receiver{site: m.Site}
		if m.Site == f.r.opts.Site {
			to.neighbour = m.Node
		}
		nodes := heard[to]
		if m.Heard {
			nodes = append(nodes, m.Node)
		}
		heard[to] = nodes
	}
	targets := make(map[receiver]string, len(heard))
	for to, nodes := range heard {
		targets[to] = ""
		if len(nodes) > 0 {
			targets[to] = rendezvous(f.r.opts.Self, nodes)
		}
	}
	return targets
}

// run keeps a lane for each receiver until ctx ends.
func (f *feed) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	serve := func(node string, l *lane) context.CancelFunc {
		lctx, stop := context.WithCancel(ctx)
		wg.Go(func() { f.serve(lctx, node, l) })
		return stop
	}
	defer f.retarget(nil, serve)
	for {
		f.retarget(f.targets(), serve)
		if !pause(ctx, clock.UntilTick(f.r.opts.Boottime(), feedPlan)) {
			return nil
		}
	}
}

// retarget forgets the receivers that are no members any more, and lets serve send
// to the nodes that are new.
func (f *feed) retarget(targets map[receiver]string, serve func(node string, l *lane) context.CancelFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.lanes, func(to receiver, l *lane) bool {
		_, wanted := targets[to]
		if !wanted && l.to != "" {
			l.stop()
		}
		return !wanted
	})
	for to, node := range targets {
		l := f.lanes[to]
		if l == nil {
			l = &lane{near: to.neighbour != "", wake: make(chan struct{}, 1)}
			f.lanes[to] = l
		}
		if l.to == node {
			continue
		}
		if l.to != "" {
			l.stop()
		}
		if l.to = node; node != "" {
			l.stop = serve(node, l)
			ring(l.wake)
		}
	}
}

// serve sends what is in a lane, in one call after the other.
func (f *feed) serve(ctx context.Context, node string, l *lane) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.wake:
		}
		ring(l.wake)
		if err := f.call(ctx, node, l); err != nil && ctx.Err() == nil {
			f.r.opts.Logger.Debug("the feed to a peer broke off", "peer", node, "err", err)
			if !pause(ctx, backoffMax) {
				return
			}
		}
	}
}

// call sends until the call breaks.
func (f *feed) call(ctx context.Context, node string, l *lane) error {
	conn, err := f.r.opts.Dial(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	stream, err := replicationpb.NewReplicationClient(conn).Feed(ctx)
	if err != nil {
		return err
	}
	taken := make(chan uint64, 1) // the newest word of the peer
	g.Go(func() error {
		for {
			t, err := stream.Recv()
			if err != nil {
				return err
			}
			select {
			case <-taken:
			default:
			}
			taken <- t.GetItems()
		}
	})
	g.Go(func() error { return f.send(ctx, stream, l, taken) })
	return g.Wait()
}

func (f *feed) send(ctx context.Context, stream grpc.BidiStreamingClient[replicationpb.FeedItem, replicationpb.FeedTaken], l *lane, taken <-chan uint64) error {
	var flight []feedItem // on their way
	var done uint64       // items that were taken
	out := 0
	defer func() { f.r.metrics.feedDropped.Add(float64(l.back(flight))) }()
	for {
		wake := l.wake
		if out >= feedWindow {
			wake = nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case n := <-taken:
			for ; done < n && len(flight) > 0; done++ {
				out -= len(flight[0].data)
				flight = slices.Delete(flight, 0, 1)
			}
			continue
		case <-wake:
		}
		item, ok := l.pop()
		if !ok {
			continue
		}
		ring(l.wake) // there may be more
		flight, out = append(flight, item), out+len(item.data)
		if err := stream.Send(&replicationpb.FeedItem{Format: wireFormat, Item: item.data, Relay: item.relay}); err != nil {
			return err
		}
		f.r.metrics.fed.Add(float64(len(item.data)))
		if !pause(ctx, f.pace.take(len(item.data))) {
			return ctx.Err()
		}
	}
}

// Feed takes a peer's items.
func (s *server) Feed(stream grpc.BidiStreamingServer[replicationpb.FeedItem, replicationpb.FeedTaken]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if _, err := s.caller(stream.Context(), first.GetFormat()); err != nil {
		return err
	}
	ctx, leave, err := s.r.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	// Recv has no context but the call's, and ends when this handler returns.
	failed := make(chan error, 1)
	s.r.life.calls.Go(func() {
		for item, n := first, uint64(1); ; n++ {
			if s.r.opts.Deliver != nil {
				s.r.opts.Deliver(item.GetItem())
			}
			if item.GetRelay() {
				s.r.feed.pass(item.GetItem(), false)
			}
			err := stream.Send(&replicationpb.FeedTaken{Items: n})
			if err == nil {
				item, err = stream.Recv()
			}
			if err != nil {
				failed <- err
				return
			}
		}
	})
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-failed:
		return err
	}
}
