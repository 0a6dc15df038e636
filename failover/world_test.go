package failover

import (
	"container/heap"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
)

// world is a cluster in virtual time: pings, leases that pings hand on, ticks, elections
// and the agreed log, on links that delay, lose and break. It runs in a synctest bubble.
// Raft is reduced to its promises: one leader a term, elected by and committing with a
// majority that it can reach.
type world struct {
	t      *testing.T
	timing config.Timing
	start  time.Time
	rng    *rand.Rand

	mu     sync.Mutex // guards all below, nodes included
	events eventQueue
	nodes  map[string]*node
	names  []string
	states []*agreed.State // what was agreed
	ticks  int             // committed; the raft index is the number of both
	news   chan struct{}   // closes when any node applied something
	term   uint64
	leader string // elected in term
	// leaderSeen is when the leader last ran and reached a majority.
	leaderSeen time.Duration
	cut        map[[2]string]bool
	deaf       map[string]bool // sites whose pings of other sites get no answer
	delay      time.Duration   // one way
	jitter     time.Duration
	loss       float64 // of pings: a stall of 0.4 s, doubling
	// forget is the share of proposals whose answer is lost.
	forget float64
	// forgetNext loses the answer to the next proposal.
	forgetNext bool
	breaches   []string
	transfers  []string // the targets of the transfers of leadership that were asked for
}

type node struct {
	w           *world
	name, site  string
	voter       bool
	upstreams   int
	jobsMissing string
	up, stopped bool
	resumed     chan struct{} // closes when it runs again
	stoppedAt   time.Duration
	pausedFor   time.Duration
	pausedUntil time.Duration // until when pausedFor is remembered
	bootedAt    time.Duration
	slowSince   time.Duration // since when its disk is slow; 0: it is not
	applied     int           // of states
	ticked      int           // of ticks
	frozen      bool          // its disk hangs: it applies nothing

	leaseUntil time.Duration
	leaseEpoch uint64
	heard      map[string]heardPeer
	pinging    map[string]bool

	leads       bool // believes so
	leadTerm    uint64
	firstCommit time.Duration
	lastCommit  time.Duration

	fence *Fence
	coord *Coordinator
	stop  context.CancelFunc
	done  sync.WaitGroup
}

type heardPeer struct {
	sent time.Duration
	// progressed is when the first ping was sent whose answer had this applied index.
	progressed time.Duration
	view       cluster.PeerView
	heard      map[string]time.Duration
}

type event struct {
	at time.Duration
	do func()
}

type eventQueue []event

func (q eventQueue) Len() int           { return len(q) }
func (q eventQueue) Less(i, j int) bool { return q[i].at < q[j].at }
func (q eventQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)        { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any {
	e := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return e
}

// newWorld makes the sites a and b in one city and c in another, with the given numbers
// of nodes and of voters.
func newWorld(t *testing.T, seed uint64, nodes, votes [3]int) *world {
	w := &world{
		t: t, timing: config.TimingFrom(0), start: time.Now(), rng: rand.New(rand.NewPCG(seed, 1)),
		nodes: map[string]*node{}, cut: map[[2]string]bool{}, deaf: map[string]bool{},
		news: make(chan struct{}), delay: 15 * time.Millisecond, jitter: 5 * time.Millisecond,
	}
	s := &agreed.State{
		Format: 1, FeatureLevel: agreed.LossLevel, ClusterID: "c", Generation: agreed.Generation{Number: 1, ID: "g"},
		Primary: agreed.Primary{Site: "a", Epoch: 1, Since: time.Now(), Reason: "bootstrap"},
		Nodes:   map[string]agreed.Node{},
		Parsed: &config.Config{Sites: map[string]config.Site{
			"a": {City: "shanghai", Priority: 1}, "b": {City: "shanghai", Priority: 2}, "c": {City: "beijing", Priority: 3},
		}},
	}
	w.states = []*agreed.State{s}
	for i, site := range []string{"a", "b", "c"} {
		for k := 1; k <= nodes[i]; k++ {
			name := fmt.Sprintf("%s%d", site, k)
			s.Nodes[name] = agreed.Node{Name: name, Site: site}
			w.nodes[name] = &node{w: w, name: name, site: site, voter: k <= votes[i], upstreams: 1}
			w.names = append(w.names, name)
		}
	}
	for _, name := range w.names {
		w.boot(w.nodes[name])
	}
	return w
}

// run runs the world until ctx ends, then stops all nodes.
func (w *world) run(ctx context.Context) {
	w.mu.Lock()
	for _, name := range w.names {
		w.every(w.nodes[name], w.timing.Tick, func(n *node) { n.pingAll() })
		w.every(w.nodes[name], w.timing.Tick, func(n *node) { n.tick() })
	}
	w.repeat(50*time.Millisecond, w.replicate)
	w.repeat(20*time.Millisecond, w.elect)
	w.repeat(20*time.Millisecond, w.laws)
	w.mu.Unlock()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			for _, name := range w.names {
				w.restartable(name, false)
			}
			return
		case <-timer.C:
		}
		w.mu.Lock()
		for w.events[0].at <= w.now() {
			heap.Pop(&w.events).(event).do()
		}
		timer.Reset(w.events[0].at - w.now())
		w.mu.Unlock()
	}
}

func (w *world) now() time.Duration { return time.Hour + time.Since(w.start) }

// after schedules an event. Events and the time before run may call it. Times are rounded
// up to 5 ms, so that there are fewer of them.
func (w *world) after(d time.Duration, do func()) {
	const grain = 5 * time.Millisecond
	heap.Push(&w.events, event{(w.now() + d + grain - 1) / grain * grain, do})
}

func (w *world) repeat(d time.Duration, do func()) {
	w.after(d, func() {
		do()
		w.repeat(d, do)
	})
}

func (w *world) every(n *node, d time.Duration, do func(*node)) {
	w.after(time.Duration(w.rng.Int64N(int64(d))), func() {
		if n.runs() {
			do(n)
		}
		w.repeat(d, func() {
			if n.runs() {
				do(n)
			}
		})
	})
}

func (n *node) runs() bool { return n.up && !n.stopped }

// oneWay is how long a message takes, false when it never arrives.
func (w *world) oneWay(from, to string) (time.Duration, bool) {
	if w.cut[[2]string{w.nodes[from].site, w.nodes[to].site}] {
		return 0, false
	}
	d := w.delay
	if w.jitter > 0 {
		d += time.Duration(w.rng.Int64N(int64(w.jitter)))
	}
	for stall := 400 * time.Millisecond; w.rng.Float64() < w.loss; stall *= 2 {
		d += stall
	}
	return d, true
}

// reach reports whether both run and messages pass in both directions.
func (w *world) reach(a, b string) bool {
	sa, sb := w.nodes[a].site, w.nodes[b].site
	return a == b || (w.nodes[a].runs() && w.nodes[b].runs() && !w.cut[[2]string{sa, sb}] && !w.cut[[2]string{sb, sa}])
}

func (w *world) majority(of string) bool {
	voters, reached := 0, 0
	for _, n := range w.nodes {
		if n.voter {
			voters++
			if w.reach(of, n.name) && n.runs() {
				reached++
			}
		}
	}
	return reached > voters/2
}

func (n *node) pingAll() {
	for _, to := range n.w.names {
		if to != n.name && !n.pinging[to] {
			n.ping(n.w.nodes[to])
		}
	}
}

func (n *node) ping(to *node) {
	w := n.w
	sent, booted := w.now(), n.bootedAt
	n.pinging[to.name] = true
	finish := func() {
		if n.bootedAt == booted {
			n.pinging[to.name] = false
		}
	}
	w.after(time.Second, finish)
	there, ok := w.oneWay(n.name, to.name)
	if !ok || w.deaf[n.site] && to.site != n.site {
		return
	}
	// A stopped process gets its messages when it continues.
	var arrive func()
	arrive = func() {
		if w.now()-sent > time.Second {
			return // the ping has timed out
		}
		if to.stopped {
			w.after(10*time.Millisecond, arrive)
			return
		}
		back, ok := w.oneWay(to.name, n.name)
		if !ok || !to.up {
			return
		}
		view := cluster.PeerView{
			Name: to.name, Site: to.site, Heard: true, Health: cluster.Health{UpstreamsHealthy: to.upstreams, AppliedIndex: to.index(), JobsMissing: to.jobsMissing},
			LeaseLeft: max(0, to.leaseUntil-w.now()), Paused: to.paused(), Disk: to.disk(), Acting: new(to.fence.ActingEpoch()),
		}
		epoch := max(to.leaseEpoch, w.states[to.applied].Primary.Epoch)
		heard := map[string]time.Duration{}
		for name, h := range to.heard {
			heard[name] = w.now() - h.sent
		}
		var answer func()
		answer = func() {
			if !n.up || n.bootedAt != booted || w.now()-sent > time.Second {
				return
			}
			if n.stopped {
				w.after(10*time.Millisecond, answer)
				return
			}
			finish()
			progressed := sent
			if before, ok := n.heard[to.name]; ok && before.view.AppliedIndex == view.AppliedIndex {
				progressed = before.progressed
			}
			view.Stuck = sent - progressed
			n.heard[to.name] = heardPeer{sent: sent, progressed: progressed, view: view, heard: heard}
			n.extend(sent+view.LeaseLeft, epoch)
		}
		w.after(back, answer)
	}
	w.after(there, arrive)
}

func (n *node) extend(until time.Duration, epoch uint64) {
	n.leaseEpoch = max(n.leaseEpoch, epoch)
	if until > n.w.now() {
		n.leaseUntil = max(n.leaseUntil, until)
	}
}

// tick commits the leader's entry and extends its lease.
func (n *node) tick() {
	w := n.w
	if !n.leads || n.leadTerm != w.term {
		return
	}
	proposed, term := w.now(), w.term
	w.after(2*w.delay+time.Duration(w.rng.Int64N(int64(w.jitter)+1)), func() {
		if !n.runs() || !n.leads || w.term != term || !w.majority(n.name) {
			return
		}
		w.ticks++
		w.apply(n)
		if n.firstCommit == 0 {
			n.firstCommit = w.now()
		}
		n.lastCommit = proposed
		n.extend(proposed+w.timing.Lease, w.states[n.applied].Primary.Epoch)
	})
}

// elect deposes a leader that can't reach a majority, and starts an election.
func (w *world) elect() {
	for _, n := range w.nodes {
		if n.leads && n.runs() && (n.leadTerm != w.term || w.now()-max(n.lastCommit, n.firstCommit, n.bootedAt) > w.timing.Heartbeat && n.firstCommit > 0) {
			n.leads = false
		}
	}
	if l := w.nodes[w.leader]; l != nil && l.leads && l.runs() && w.majority(l.name) {
		w.leaderSeen = w.now()
		return
	}
	if w.leader == "" && w.term > 0 || w.now()-w.leaderSeen < w.timing.Heartbeat {
		return // an election is under way, or would be too soon
	}
	w.term++
	w.leader = ""
	term := w.term
	w.after(w.timing.Heartbeat/4+time.Duration(w.rng.Int64N(int64(w.timing.Heartbeat*2))), func() { w.vote(term) })
}

func (w *world) vote(term uint64) {
	if w.term != term || w.leader != "" {
		return
	}
	var able []string
	for _, name := range w.names {
		if n := w.nodes[name]; n.voter && n.runs() && w.majority(name) {
			able = append(able, name)
		}
	}
	if len(able) == 0 {
		w.after(w.timing.Heartbeat/2, func() { w.vote(term) })
		return
	}
	w.elected(able[w.rng.IntN(len(able))])
}

func (w *world) elected(name string) {
	for _, n := range w.nodes {
		if n.leads && n.runs() {
			n.leads = false
		}
	}
	w.leader = name
	n := w.nodes[name]
	n.leads, n.leadTerm, n.firstCommit, n.lastCommit = true, w.term, 0, w.now()
}

// replicate lets the nodes that reach the leader catch up.
func (w *world) replicate() {
	if w.leader == "" || !w.majority(w.leader) {
		return
	}
	for _, n := range w.nodes {
		if n.runs() && w.reach(w.leader, n.name) {
			w.apply(n)
		}
	}
}

// index is that of the newest entry that a node has applied.
func (n *node) index() uint64 { return uint64(n.applied + n.ticked) } //nolint:gosec // counts

func (w *world) apply(n *node) {
	if n.frozen {
		return
	}
	n.ticked = w.ticks
	if n.applied < len(w.states)-1 {
		n.applied = len(w.states) - 1
		close(w.news)
		w.news = make(chan struct{})
	}
}

// laws checks that at most one site acts as primary.
func (w *world) laws() {
	acting := map[string]bool{}
	for _, n := range w.nodes {
		if n.runs() {
			if n.fence.Acting() {
				acting[n.site] = true
			}
		}
	}
	if len(acting) > 1 && len(w.breaches) < 5 {
		w.breaches = append(w.breaches, fmt.Sprintf("two sites act as primary at %s: %v", time.Since(w.start), acting))
	}
}

func (n *node) paused() time.Duration {
	if n.w.now() < n.pausedUntil {
		return n.pausedFor
	}
	return 0
}

// boot starts a new process of the node. It takes no lock: it is called before the world
// runs, or with the lock held.
func (w *world) boot(n *node) {
	n.up, n.bootedAt = true, w.now()
	n.heard, n.pinging = map[string]heardPeer{}, map[string]bool{}
	n.leaseUntil, n.leaseEpoch, n.leads = 0, 0, false
	n.fence = NewFence(n.name, n.site, standing{n}, func() time.Duration { return w.timing.NewLeaderWait }, w.now, slog.New(slog.DiscardHandler))
	n.coord = NewCoordinator(Options{
		Name: n.name, Site: n.site, Agreement: n, Releaser: w, Health: func() cluster.Health {
			return cluster.Health{UpstreamsHealthy: n.upstreams, JobsMissing: n.jobsMissing}
		},
		Boottime: w.now, Now: time.Now, Quarantined: func() bool { return false },
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	ctx, stop := context.WithCancel(context.Background())
	n.stop = stop
	n.done.Go(func() { _ = n.coord.Run(ctx) }) // it ends with ctx, never with an error
}

// restartable kills a node, or starts it again.
func (w *world) restartable(name string, up bool) {
	w.mu.Lock()
	n := w.nodes[name]
	was := n.up
	n.up = false
	if n.stopped {
		n.stopped = false
		close(n.resumed)
	}
	if was {
		n.stop()
	}
	w.mu.Unlock()
	n.done.Wait()
	if up {
		w.mu.Lock()
		w.boot(n)
		w.mu.Unlock()
	}
}

func (w *world) kill(names ...string) {
	for _, n := range names {
		w.restartable(n, false)
	}
}

func (w *world) restart(names ...string) {
	for _, n := range names {
		w.restartable(n, true)
	}
}

func (w *world) pause(names ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		n := w.nodes[name]
		n.stopped, n.stoppedAt, n.resumed = true, w.now(), make(chan struct{})
	}
}

// freeze makes the disks of nodes hang, or ends that.
func (w *world) freeze(frozen bool, names ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		w.nodes[name].frozen = frozen
	}
}

func (w *world) resume(names ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		n := w.nodes[name]
		n.stopped = false
		n.pausedFor, n.pausedUntil = w.now()-n.stoppedAt, w.now()+4*time.Second
		close(n.resumed)
	}
}

// sever cuts or restores links between sites, one direction each: "a>b".
func (w *world) sever(cut bool, links ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range links {
		w.cut[[2]string{l[:1], l[2:]}] = cut
	}
}

// agreed is the newest state.
func (w *world) agreed() *agreed.State {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.states[len(w.states)-1]
}

func (w *world) leaderSite() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := w.nodes[w.leader]; n != nil && n.leads && n.firstCommit > 0 {
		return n.site
	}
	return ""
}

// acting are the sites with a node that may act as primary now.
func (w *world) acting() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var sites []string
	for _, name := range w.names {
		n := w.nodes[name]
		if n.fence.Acting() && n.runs() && !slices.Contains(sites, n.site) {
			sites = append(sites, n.site)
		}
	}
	return sites
}

// until waits until cond holds, and gives how long that took. The test fails when it
// takes longer than limit.
func (w *world) until(what string, limit time.Duration, cond func() bool) time.Duration {
	w.t.Helper()
	began := time.Now()
	for !cond() {
		if time.Since(began) > limit {
			w.t.Fatalf("%s: not within %s; primary %+v, leader in %q", what, limit, w.agreed().Primary, w.leaderSite())
		}
		if err := wait(w.t.Context(), 10*time.Millisecond); err != nil {
			w.t.Fatal(err)
		}
	}
	return time.Since(began)
}
