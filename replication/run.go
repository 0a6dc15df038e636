package replication

import (
	"context"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/notify"
)

const (
	// planEvery bounds how long a relay that is no longer heard is still used.
	planEvery = 125 * time.Millisecond
	// stallAfter is how long a stream may lack records that a living node has, without any
	// arriving, before a second node is pulled from.
	stallAfter = 2 * time.Second
)

// Run pulls and serves until ctx ends, and waits for everything that it started.
func (r *Replication) Run(ctx context.Context) error {
	r.allowCalls(ctx)
	defer r.endCalls()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.watchLog(ctx) })
	g.Go(func() error { return r.pullAll(ctx) })
	g.Go(func() error { return r.trimAll(ctx) })
	g.Go(func() error { return r.keepDurableNote(ctx) })
	g.Go(func() error { return r.completion.run(ctx) })
	g.Go(func() error { return r.compareAll(ctx) })
	g.Go(func() error { return r.feed.run(ctx) })
	return g.Wait()
}

// lifecycle admits calls of peers while Run runs, and waits for them afterwards.
type lifecycle struct {
	mu    sync.Mutex // guards ctx, pulls
	ctx   context.Context
	pulls map[string]*context.CancelFunc // one Pull call per peer
	calls sync.WaitGroup
}

func (r *Replication) allowCalls(ctx context.Context) {
	r.lifecycle.mu.Lock()
	defer r.lifecycle.mu.Unlock()
	r.lifecycle.ctx = ctx
}

func (r *Replication) endCalls() {
	r.lifecycle.mu.Lock()
	r.lifecycle.ctx = nil
	r.lifecycle.mu.Unlock()
	r.lifecycle.calls.Wait()
}

// enter admits a peer's call. Its context ends with Run; leave must be called.
func (r *Replication) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	r.lifecycle.mu.Lock()
	defer r.lifecycle.mu.Unlock()
	if r.lifecycle.ctx == nil || r.lifecycle.ctx.Err() != nil {
		return nil, nil, status.Error(codes.Unavailable, "replication is not running on this node")
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(r.lifecycle.ctx, cancel)
	r.lifecycle.calls.Add(1)
	return ctx, func() { stop(); cancel(); r.lifecycle.calls.Done() }, nil
}

// replacePull cancels the previous Pull call of a peer, which has made another one. gone
// must be called when the new call ends.
func (r *Replication) replacePull(peer string, cancel context.CancelFunc) (gone func()) {
	r.lifecycle.mu.Lock()
	defer r.lifecycle.mu.Unlock()
	if old := r.lifecycle.pulls[peer]; old != nil {
		(*old)()
	}
	r.lifecycle.pulls[peer] = &cancel
	return func() {
		r.lifecycle.mu.Lock()
		defer r.lifecycle.mu.Unlock()
		if r.lifecycle.pulls[peer] == &cancel {
			delete(r.lifecycle.pulls, peer)
		}
	}
}

// watchLog passes changes of this node's journals to the tracker and the senders.
func (r *Replication) watchLog(ctx context.Context) error {
	for {
		changed := r.opts.Log.Changed()
		r.advanced(durable(r.opts.Log.Ends()))
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// advanced handles a change of what is durable on this node.
func (r *Replication) advanced(ends map[journal.Stream]uint64) {
	streams := r.tracker.setOwn(ends)
	for _, s := range streams {
		r.fresh.advanced(s, r.heldHere)
	}
	r.changes.publish(streams)
}

func (r *Replication) heldHere(s journal.Stream) uint64 { return r.tracker.held(r.opts.Self, s) }

// streamChanges notifies the senders of the streams that advanced.
type streamChanges struct {
	mu   sync.Mutex // guards subs and the streams of each
	subs map[*changeSub]struct{}
}

// changeSub collects the streams that advanced since they were last taken.
type changeSub struct {
	n       *streamChanges
	streams map[journal.Stream]struct{} // guarded by n.mu
	wake    chan struct{}               // capacity 1
}

func (n *streamChanges) subscribe(wake chan struct{}) *changeSub {
	h := &changeSub{n: n, streams: map[journal.Stream]struct{}{}, wake: wake}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.subs[h] = struct{}{}
	return h
}

func (n *streamChanges) publish(streams []journal.Stream) {
	if len(streams) == 0 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for h := range n.subs {
		for _, s := range streams {
			h.streams[s] = struct{}{}
		}
		notify.Wake(h.wake)
	}
}

func (h *changeSub) take() []journal.Stream {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	if len(h.streams) == 0 {
		return nil
	}
	out := slices.Collect(maps.Keys(h.streams))
	clear(h.streams)
	return out
}

func (h *changeSub) close() {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	delete(h.n.subs, h)
}

// pullAll keeps one puller for each node that this node pulls from.
func (r *Replication) pullAll(ctx context.Context) error {
	links := map[string]*puller{}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		for _, k := range links {
			k.stop()
		}
	}()
	var stalls stallDetector
	var members []Member
	tick := time.NewTimer(0)
	defer tick.Stop()
	var marks <-chan struct{}
	for {
		tick.Reset(clock.UntilTick(r.opts.Boottime(), planEvery))
		now := slices.Clone(r.opts.Members()) // in any order
		slices.SortFunc(now, func(a, b Member) int { return strings.Compare(a.Node, b.Node) })
		same := slices.EqualFunc(now, members, sameMember)
		if !same {
			members = now
			r.tracker.setMembers(members)
			r.fresh.retain(members)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-marks:
			same = false
		default:
		}
		if same && len(stalls.streams) == 0 && marks != nil { // nothing that Plan depends on has changed
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
			continue
		}
		marks = r.tracker.changed.Next()
		plan := Plan(r.view(members, links, &stalls))
		for source, k := range links {
			if _, wanted := plan[source]; !wanted {
				r.opts.Logger.Info("stopped pulling", "source", source)
				k.stop()
				delete(links, source)
			}
		}
		for source, origins := range plan {
			k := links[source]
			if k == nil {
				k = &puller{r: r, source: source, changed: make(chan struct{}, 1)}
				links[source] = k
				lctx, stop := context.WithCancel(ctx)
				k.stop = stop
				wg.Go(func() { k.run(lctx) })
			}
			if k.want(origins) {
				r.opts.Logger.Info("pulling", "source", source, "origins", origins)
			}
		}
		r.pulled.Store(slices.Sorted(maps.Keys(plan)))
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func sameMember(a, b Member) bool {
	return a.Node == b.Node && a.Site == b.Site && a.City == b.City && a.Heard == b.Heard && maps.Equal(a.Hears, b.Hears)
}

// view returns the input of Plan.
func (r *Replication) view(members []Member, links map[string]*puller, stalls *stallDetector) View {
	v := View{Self: r.opts.Self, Members: members, Current: map[string][]string{}}
	for source, k := range links {
		for _, o := range k.wanted() {
			v.Current[o] = append(v.Current[o], source)
		}
	}
	v.Gain = map[string]map[string]uint64{}
	gains := r.tracker.gains()
	for s, nodes := range gains {
		if r.unwanted(s) {
			delete(gains, s)
			continue
		}
		if v.Gain[s.Origin] == nil {
			v.Gain[s.Origin] = map[string]uint64{}
		}
		for node, n := range nodes {
			v.Gain[s.Origin][node] += n
		}
	}
	v.Stalled = stalls.stalled(r.opts.Boottime(), maps.Keys(gains), r.heldHere)
	return v
}

// unwanted reports whether a stream is written by this node, or is retired.
func (r *Replication) unwanted(s journal.Stream) bool {
	if s.Origin == r.opts.Self {
		if e, ok := r.opts.Log.End(s); ok && e.Own {
			return true
		}
	}
	return r.opts.Retired(s)
}

// stallDetector tracks since when a stream lacks records without any arriving.
type stallDetector struct {
	streams map[journal.Stream]progress
}

type progress struct {
	held  uint64
	since time.Duration
}

// stalled returns the origins with a stalled stream.
func (l *stallDetector) stalled(now time.Duration, streams iter.Seq[journal.Stream], held func(journal.Stream) uint64) map[string]bool {
	since := map[journal.Stream]progress{}
	out := map[string]bool{}
	for s := range streams {
		is := progress{held: held(s), since: now}
		if was, before := l.streams[s]; before && was.held == is.held {
			is.since = was.since
		}
		since[s] = is
		out[s.Origin] = out[s.Origin] || now-is.since >= stallAfter
	}
	l.streams = since
	return out
}

// sources returns the nodes that this node pulls from at present.
func (r *Replication) sources() []string {
	sources, _ := r.pulled.Load().([]string)
	return sources
}
