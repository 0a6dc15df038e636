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

	"github.com/dsnode/dsnode/replication/replicationpb"
)

const (
	// MaxFeedItem bounds an item of the feed, in bytes.
	MaxFeedItem = 1 << 20
	// feedQueue and feedItems bound what waits for one node; the oldest goes first.
	feedQueue = 16 << 20
	feedItems = 16384
	// feedWindow bounds what is on its way to one node: on a slow link, that is how
	// much the journals may have to wait for.
	feedWindow = 512 << 10
	feedPlan   = 250 * time.Millisecond
)

// ErrFeedItem means that an item is larger than MaxFeedItem.
var ErrFeedItem = errors.New("the item is too large for the feed")

// Offer sends an item to every site that can be heard, once, where one node
// passes it on to the others. It may be lost, come twice or out of order. The
// item must not be changed afterwards. It never blocks: where a node is too slow
// the oldest items are dropped. Nothing is sent before Run.
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

	mu    sync.Mutex // guards lanes
	lanes map[string]*lane
}

// lane is what waits for one node.
type lane struct {
	near bool // a node of this site
	stop context.CancelFunc
	wake chan struct{} // has room for one

	mu    sync.Mutex // guards what follows
	items []feedItem
	bytes int
}

type feedItem struct {
	data  []byte
	relay bool
}

func newFeed(r *Replication) *feed {
	return &feed{r: r, pace: pacer{now: r.opts.Boottime, perSecond: r.opts.Limits.FeedBytesPerSecond}, lanes: map[string]*lane{}}
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

// targets are the nodes to send to: the neighbours, and one of each other site.
func (f *feed) targets() map[string]bool {
	bySite := map[string][]string{}
	near := map[string]bool{}
	for _, m := range f.r.opts.Members() {
		switch {
		case m.Node == f.r.opts.Self || !m.Heard:
		case m.Site == f.r.opts.Site:
			near[m.Node] = true
		default:
			bySite[m.Site] = append(bySite[m.Site], m.Node)
		}
	}
	for _, nodes := range bySite {
		near[rendezvous(f.r.opts.Self, nodes)] = false
	}
	return near
}

// run keeps a lane for each target until ctx ends.
func (f *feed) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer f.retarget(nil)
	for {
		for node, l := range f.retarget(f.targets()) {
			lctx, stop := context.WithCancel(ctx)
			l.stop = stop
			wg.Go(func() { f.serve(lctx, node, l) })
		}
		if !pause(ctx, feedPlan) {
			return nil
		}
	}
}

// retarget ends the lanes that are no targets and gives those that are new.
func (f *feed) retarget(targets map[string]bool) map[string]*lane {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.lanes, func(node string, l *lane) bool {
		near, wanted := targets[node]
		if wanted && near == l.near {
			return false
		}
		l.stop()
		return true
	})
	begun := map[string]*lane{}
	for node, near := range targets {
		if f.lanes[node] == nil {
			f.lanes[node] = &lane{near: near, wake: make(chan struct{}, 1)}
			begun[node] = f.lanes[node]
		}
	}
	return begun
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
	var sizes []int // of the items on their way
	var done uint64 // items that were taken
	out := 0
	for {
		wake := l.wake
		if out >= feedWindow {
			wake = nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case n := <-taken:
			for ; done < n && len(sizes) > 0; done++ {
				out -= sizes[0]
				sizes = slices.Delete(sizes, 0, 1)
			}
			continue
		case <-wake:
		}
		item, ok := l.pop()
		if !ok {
			continue
		}
		ring(l.wake) // there may be more
		sizes, out = append(sizes, len(item.data)), out+len(item.data)
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
