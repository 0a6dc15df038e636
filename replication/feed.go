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
	"github.com/dsnode/dsnode/storage/notify"
)

const (
	// MaxFeedItem bounds an item of the feed: half of the maximum message size of the mesh.
	MaxFeedItem = 2 << 20
	// feedQueue and feedItems bound the bytes and items that wait for one site or neighbour,
	// even while it is away. Beyond them the oldest items are dropped.
	feedQueue = 16 << 20
	feedItems = 16384
	// feedWindow bounds the unacknowledged bytes to one node. On a slow link the journals may
	// have to wait for that many bytes.
	feedWindow    = 512 << 10
	feedPlanEvery = 250 * time.Millisecond
)

// ErrFeedItem means that an item is larger than MaxFeedItem.
var ErrFeedItem = errors.New("the item is too large for the feed")

// Offer sends an item to every site once; the receiving node forwards it within its site.
// For a site that is away the item waits in memory. Items may be lost, duplicated or
// reordered. The caller must not change the item afterwards. Offer never blocks: beyond the
// limits the oldest items are dropped. Before Run nothing is queued or sent.
func (r *Replication) Offer(item []byte) error {
	if len(item) > MaxFeedItem {
		return fmt.Errorf("%w: %d bytes", ErrFeedItem, len(item))
	}
	r.feed.enqueue(item, true)
	return nil
}

// feed sends items that may be lost.
type feed struct {
	r    *Replication
	pace pacer

	mu       sync.Mutex // guards outboxes, and the fields to and stop of each
	outboxes map[feedTarget]*outbox
}

// feedTarget is a receiver of this node's feed: a neighbour, or another site.
type feedTarget struct{ site, neighbour string }

// outbox holds the items for one target. It stays while the target is away.
type outbox struct {
	neighbour bool               // the target is a node of this site
	to        string             // node to send to, "" while none is heard
	stop      context.CancelFunc // stops sending to it
	wake      chan struct{}      // capacity 1

	mu    sync.Mutex // guards the fields below
	items []feedItem
	bytes int
}

type feedItem struct {
	data  []byte
	relay bool
}

// enqueue queues an item for the neighbours and, if own is true, for the other sites.
func (f *feed) enqueue(item []byte, own bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.outboxes {
		if l.neighbour || own {
			f.r.metrics.feedDropped.Add(float64(l.push(feedItem{data: item, relay: !l.neighbour})))
		}
	}
}

// push returns the number of dropped items.
func (l *outbox) push(item feedItem) (dropped int) {
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
	notify.Wake(l.wake)
	return dropped
}

// requeue puts back items that may not have arrived, oldest first, in front of all others.
// It returns the number of items for which there is no space.
func (l *outbox) requeue(items []feedItem) (dropped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := len(items)
	for first > 0 && l.bytes+len(items[first-1].data) <= feedQueue && len(l.items)+len(items)-first < feedItems {
		first--
		l.bytes += len(items[first].data)
	}
	l.items = append(slices.Clone(items[first:]), l.items...)
	notify.Wake(l.wake)
	return first
}

func (l *outbox) pop() (feedItem, bool) {
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

// targets returns the node to send to for each target: the neighbours, and one node of each
// other site; "" if none is heard.
func (f *feed) targets() map[feedTarget]string {
	heard := map[feedTarget][]string{}
	for _, m := range f.r.opts.Members() {
		if m.Node == f.r.opts.Self {
			continue
		}
		to := feedTarget{site: m.Site}
		if m.Site == f.r.opts.Site {
			to.neighbour = m.Node
		}
		nodes := heard[to]
		if m.Heard {
			nodes = append(nodes, m.Node)
		}
		heard[to] = nodes
	}
	targets := make(map[feedTarget]string, len(heard))
	for to, nodes := range heard {
		targets[to] = ""
		if len(nodes) > 0 {
			targets[to] = rendezvous(f.r.opts.Self, nodes)
		}
	}
	return targets
}

// run sends the outboxes until ctx ends.
func (f *feed) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	serve := func(node string, l *outbox) context.CancelFunc {
		lctx, stop := context.WithCancel(ctx)
		wg.Go(func() { f.serve(lctx, node, l) })
		return stop
	}
	defer f.setTargets(nil, serve)
	for {
		f.setTargets(f.targets(), serve)
		if !pause(ctx, clock.UntilTick(f.r.opts.Boottime(), feedPlanEvery)) {
			return nil
		}
	}
}

// setTargets removes the outboxes of former targets, and calls serve for each new node to
// send to.
func (f *feed) setTargets(targets map[feedTarget]string, serve func(node string, l *outbox) context.CancelFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.outboxes, func(to feedTarget, l *outbox) bool {
		_, wanted := targets[to]
		if !wanted && l.to != "" {
			l.stop()
		}
		return !wanted
	})
	for to, node := range targets {
		l := f.outboxes[to]
		if l == nil {
			l = &outbox{neighbour: to.neighbour != "", wake: make(chan struct{}, 1)}
			f.outboxes[to] = l
		}
		if l.to == node {
			continue
		}
		if l.to != "" {
			l.stop()
		}
		if l.to = node; node != "" {
			l.stop = serve(node, l)
			notify.Wake(l.wake)
		}
	}
}

// serve sends the items of an outbox, and repeats the call when it breaks.
func (f *feed) serve(ctx context.Context, node string, l *outbox) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.wake:
		}
		notify.Wake(l.wake)
		if err := f.call(ctx, node, l); err != nil && ctx.Err() == nil {
			f.r.opts.Logger.Debug("the feed to a peer broke off", "peer", node, "err", err)
			if !pause(ctx, backoffMax) {
				return
			}
		}
	}
}

// call sends until the call breaks.
func (f *feed) call(ctx context.Context, node string, l *outbox) error {
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
	taken := make(chan uint64, 1) // the peer's newest acknowledgement
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

func (f *feed) send(ctx context.Context, stream grpc.BidiStreamingClient[replicationpb.FeedItem, replicationpb.FeedTaken], l *outbox, taken <-chan uint64) error {
	var flight []feedItem // sent and not acknowledged
	var done uint64       // acknowledged items
	out := 0
	defer func() { f.r.metrics.feedDropped.Add(float64(l.requeue(flight))) }()
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
		notify.Wake(l.wake) // there may be more
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

// Feed receives a peer's items.
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
	// Recv only ends with the call, after this handler has returned.
	failed := make(chan error, 1)
	s.r.lifecycle.calls.Go(func() {
		for item, n := first, uint64(1); ; n++ {
			s.r.opts.Deliver(item.GetItem())
			if item.GetRelay() {
				s.r.feed.enqueue(item.GetItem(), false)
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
