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
)

const (
	// planEvery bounds how long a dead relay stays one after it isn't heard.
	planEvery = 125 * time.Millisecond
	// stallAfter is how long a stream may lack records that a living node has
	// without getting on, before a second source is asked.
	stallAfter = 2 * time.Second
)

// Run pulls and serves until ctx ends, and waits for all that it started.
func (r *Replication) Run(ctx context.Context) error {
	r.open(ctx)
	defer r.shut()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.watchLog(ctx) })
	g.Go(func() error { return r.pullAll(ctx) })
	g.Go(func() error { return r.trimAll(ctx) })
	g.Go(func() error { return r.keepReached(ctx) })
	g.Go(func() error { return r.refill(ctx) })
	g.Go(func() error { return r.compareAll(ctx) })
	g.Go(func() error { return r.feed.run(ctx) })
	return g.Wait()
}

// life lets calls of peers in while Run runs, and waits for them after.
type life struct {
	mu    sync.Mutex // guards ctx, pulls
	ctx   context.Context
	pulls map[string]*context.CancelFunc // one call of Pull for each peer
	calls sync.WaitGroup
}

func (r *Replication) open(ctx context.Context) {
	r.life.mu.Lock()
	defer r.life.mu.Unlock()
	r.life.ctx = ctx
}

func (r *Replication) shut() {
	r.life.mu.Lock()
	r.life.ctx = nil
	r.life.mu.Unlock()
	r.life.calls.Wait()
}

// enter begins a peer's call: its context ends with Run. leave must be called.
func (r *Replication) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	r.life.mu.Lock()
	defer r.life.mu.Unlock()
	if r.life.ctx == nil || r.life.ctx.Err() != nil {
		return nil, nil, status.Error(codes.Unavailable, "replication does not run here")
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(r.life.ctx, cancel)
	r.life.calls.Add(1)
	return ctx, func() { stop(); cancel(); r.life.calls.Done() }, nil
}

// replace ends the call of Pull that a peer made before: it has a new one. gone
// must be called when that ends.
func (r *Replication) replace(peer string, cancel context.CancelFunc) (gone func()) {
	r.life.mu.Lock()
	defer r.life.mu.Unlock()
	if old := r.life.pulls[peer]; old != nil {
		(*old)()
	}
	r.life.pulls[peer] = &cancel
	return func() {
		r.life.mu.Lock()
		defer r.life.mu.Unlock()
		if r.life.pulls[peer] == &cancel {
			delete(r.life.pulls, peer)
		}
	}
}

// watchLog tells the ledger and those who serve pullers what is new on this
// node's disk.
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

// advanced takes in what is durable here now.
func (r *Replication) advanced(ends map[journal.Stream]uint64) {
	streams := r.ledger.setOwn(ends)
	for _, s := range streams {
		r.fresh.advanced(s, r.heldHere)
	}
	r.news.give(streams)
}

func (r *Replication) heldHere(s journal.Stream) uint64 { return r.ledger.held(r.opts.Self, s) }

// news tells those who serve pullers which streams went on.
type news struct {
	mu   sync.Mutex // guards subs and what they collect
	subs map[*headlines]struct{}
}

// headlines are the streams that went on since they were last taken.
type headlines struct {
	n       *news
	streams map[journal.Stream]struct{} // guarded by n.mu
	wake    chan struct{}               // has room for one
}

func (n *news) subscribe(wake chan struct{}) *headlines {
	h := &headlines{n: n, streams: map[journal.Stream]struct{}{}, wake: wake}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.subs[h] = struct{}{}
	return h
}

func (n *news) give(streams []journal.Stream) {
	if len(streams) == 0 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for h := range n.subs {
		for _, s := range streams {
			h.streams[s] = struct{}{}
		}
		ring(h.wake)
	}
}

func (h *headlines) take() []journal.Stream {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	if len(h.streams) == 0 {
		return nil
	}
	out := slices.Collect(maps.Keys(h.streams))
	clear(h.streams)
	return out
}

func (h *headlines) close() {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	delete(h.n.subs, h)
}

// ring wakes who waits on a channel with room for one.
func ring(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// pullAll keeps one link for each node that this one pulls from.
func (r *Replication) pullAll(ctx context.Context) error {
	links := map[string]*link{}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		for _, k := range links {
			k.stop()
		}
	}()
	var lack lacking
	var members []Member
	beat := time.NewTimer(0)
	defer beat.Stop()
	var marks <-chan struct{}
	for {
		beat.Reset(clock.UntilTick(r.opts.Boottime(), planEvery))
		now := slices.Clone(r.opts.Members()) // in whatever order
		slices.SortFunc(now, func(a, b Member) int { return strings.Compare(a.Node, b.Node) })
		same := slices.EqualFunc(now, members, sameMember)
		if !same {
			members = now
			r.ledger.setMembers(members)
			r.fresh.retain(members)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-marks:
			same = false
		default:
		}
		if same && len(lack.since) == 0 && marks != nil { // nothing to decide on is new
			select {
			case <-ctx.Done():
				return nil
			case <-beat.C:
			}
			continue
		}
		marks = r.ledger.watch()
		plan := Plan(r.view(members, links, &lack))
		for source, k := range links {
			if _, wanted := plan[source]; !wanted {
				r.opts.Logger.Info("no longer pulled from", "source", source)
				k.stop()
				delete(links, source)
			}
		}
		for source, origins := range plan {
			k := links[source]
			if k == nil {
				k = newLink(r, source)
				links[source] = k
				lctx, stop := context.WithCancel(ctx)
				k.stop = stop
				wg.Go(func() { k.run(lctx) })
			}
			if k.want(origins) {
				r.opts.Logger.Info("pulled from", "source", source, "origins", origins)
			}
		}
		r.pulled.Store(slices.Sorted(maps.Keys(plan)))
		select {
		case <-ctx.Done():
			return nil
		case <-beat.C:
		}
	}
}

func sameMember(a, b Member) bool {
	return a.Node == b.Node && a.Site == b.Site && a.City == b.City && a.Heard == b.Heard && maps.Equal(a.Hears, b.Hears)
}

// view is what Plan decides on.
func (r *Replication) view(members []Member, links map[string]*link, lack *lacking) View {
	v := View{Self: r.opts.Self, Members: members, Current: map[string][]string{}}
	for source, k := range links {
		for _, o := range k.wanted() {
			v.Current[o] = append(v.Current[o], source)
		}
	}
	v.Gain = map[string]map[string]uint64{}
	gains := r.ledger.gains()
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
	v.Stalled = lack.stalled(r.opts.Boottime(), maps.Keys(gains), r.heldHere)
	return v
}

// unwanted says of a stream that it is written here or was given up by all.
func (r *Replication) unwanted(s journal.Stream) bool {
	if s.Origin == r.opts.Self {
		if e, ok := r.opts.Log.End(s); ok && e.Own {
			return true
		}
	}
	return r.opts.Retired != nil && r.opts.Retired(s)
}

// lacking remembers since when records of a stream are missing without any
// having come.
type lacking struct {
	since map[journal.Stream]lack
}

type lack struct {
	held  uint64
	since time.Duration
}

// stalled gives the origins of which a stream gets on no more.
func (l *lacking) stalled(now time.Duration, streams iter.Seq[journal.Stream], held func(journal.Stream) uint64) map[string]bool {
	since := map[journal.Stream]lack{}
	out := map[string]bool{}
	for s := range streams {
		is := lack{held: held(s), since: now}
		if was, before := l.since[s]; before && was.held == is.held {
			is.since = was.since
		}
		since[s] = is
		out[s.Origin] = out[s.Origin] || now-is.since >= stallAfter
	}
	l.since = since
	return out
}

// sources are the nodes that are pulled from at present.
func (r *Replication) sources() []string {
	sources, _ := r.pulled.Load().([]string)
	return sources
}
