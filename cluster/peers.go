package cluster

import (
	"context"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/clusterpb"
)

// Health is what a node says of itself in each ping.
type Health struct {
	Draining         bool
	PID              int
	UpstreamsHealthy int
	UpstreamsTotal   int
	UpstreamsDown    []string // of its own site
	AppliedIndex     uint64
	LastLogIndex     uint64
	Cold             bool // no lease since its start
}

// PeerView is what this node knows of another one.
type PeerView struct {
	Name, Site string
	// Via is the node through which this one's connections go now, because it is
	// not reached directly; empty: they are direct.
	Via string
	// Heard says whether the node ever answered a ping of this process; Ago is
	// how long ago the newest answered ping was sent.
	Heard bool
	Ago   time.Duration
	Info  agreed.Node
	Health
	// HeardBy is the peer's own table: node → how long ago it heard it, as of
	// Ago. Nodes it never heard are absent. It is shared: don't change it.
	HeardBy map[string]time.Duration
	// LeaseLeft is the peer's lease now, as far as its last answer goes.
	LeaseLeft time.Duration
	Leader    string
	Term      uint64
	Epoch     uint64
	Paused    time.Duration // the longest recent gap in the peer's own loop
	// Stuck is for how long its answers have shown no progress in applying
	// entries. While there is a leader a tick comes several times a second, so
	// then its disk hangs, or the leader's entries don't reach it.
	Stuck time.Duration
}

// HeardWithin reports whether the node answered a ping that was sent less than d ago.
func (v PeerView) HeardWithin(d time.Duration) bool { return v.Heard && v.Ago < d }

// HearsWithin reports whether, by its newest answer, the node itself heard another
// one less than d ago.
func (v PeerView) HearsWithin(d time.Duration, other string) bool {
	ago, heard := v.HeardBy[other]
	return v.Heard && heard && v.Ago+ago < d
}

// pingTimeout bounds one ping. Longer than a lost segment's retransmission,
// shorter than the patience.
const pingTimeout = time.Second

// maxDownListed bounds the names of broken upstreams in a ping.
const maxDownListed = 256

// peerTable holds the newest answer of each peer.
type peerTable struct {
	mu      sync.Mutex // guards answers
	answers map[string]answer
}

type answer struct {
	sent time.Duration // Boottime
	got  *clusterpb.PingResponse
	// moved is when the first answer with this applied index was asked for; put
	// sets it.
	moved time.Duration
	// heardBy is the peer's own table; put sets it. It is shared, and not changed.
	heardBy map[string]time.Duration
}

func (t *peerTable) put(node string, a answer) {
	a.heardBy = make(map[string]time.Duration, len(a.got.GetHeard()))
	for _, e := range a.got.GetHeard() {
		if e.GetAgoMs() >= 0 {
			a.heardBy[e.GetNode()] = time.Duration(e.GetAgoMs()) * time.Millisecond
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	a.moved = a.sent
	now := a.got.GetHealth()
	if old, ok := t.answers[node]; ok {
		before := old.got.GetHealth()
		if before.GetInstance() == now.GetInstance() && before.GetAppliedIndex() == now.GetAppliedIndex() {
			a.moved = old.moved
		}
	}
	t.answers[node] = a
}

func (t *peerTable) get(node string) (answer, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a, ok := t.answers[node]
	return a, ok
}

func (t *peerTable) retain(keep func(string) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name := range t.answers {
		if !keep(name) {
			delete(t.answers, name)
		}
	}
}

// heard is this node's table for a ping's answer.
func (t *peerTable) heard() []*clusterpb.Heard {
	now := clock.Boottime()
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*clusterpb.Heard, 0, len(t.answers))
	for name, a := range t.answers {
		out = append(out, &clusterpb.Heard{Node: name, AgoMs: (now - a.sent).Milliseconds()})
	}
	return out
}

// pingAll pings every other member, each in a goroutine of its own so that a
// peer that hangs delays nobody, until ctx ends.
func (c *Cluster) pingAll(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	running := map[string]context.CancelFunc{}
	defer func() {
		for _, stop := range running {
			stop()
		}
	}()
	for {
		changed := c.fsm.watch()
		members := c.members()
		for name := range members {
			if name == c.opts.Name || running[name] != nil {
				continue
			}
			pctx, stop := context.WithCancel(ctx)
			running[name] = stop
			p := pinging{c: c, name: name}
			wg.Go(func() { p.run(pctx) })
		}
		for name, stop := range running {
			if _, member := members[name]; !member {
				stop()
				delete(running, name)
				c.book.forget(name)
				if err := c.mesh.Forget(name); err != nil {
					c.log.Warn("connection to a removed node not closed in order", "peer", name, "err", err)
				}
			}
		}
		c.peers.retain(func(name string) bool { _, member := members[name]; return member })
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// members are the agreed nodes, or the remembered ones while this node has not
// learnt the agreed state.
func (c *Cluster) members() map[string]agreed.Node {
	s := c.State()
	if s.ClusterID != "" {
		return s.Nodes
	}
	nodes := map[string]agreed.Node{}
	for _, n := range c.book.all() {
		nodes[n.Name] = n
	}
	return nodes
}

// answerPing is the other side of ping.
func (c *Cluster) answerPing() *clusterpb.PingResponse {
	left, heard := c.lease.left()
	heard = heard.merge(fencesOf(c.State()))
	leader, term := c.leader()
	return &clusterpb.PingResponse{
		Format: rpcFormat, Node: infoOf(c.self()), Health: c.health(), Heard: c.peers.heard(),
		LeaseUs: max(0, left.Microseconds()), Epoch: heard.epoch, Ownership: heard.ownership,
		Leader: leader, Term: term, PausedMs: c.pauses.longest().Milliseconds(),
	}
}

// Peers gives what this node knows of every other member, by name.
func (c *Cluster) Peers() map[string]PeerView {
	now := clock.Boottime()
	members := c.members()
	views := make(map[string]PeerView, len(members))
	for name, n := range members {
		if name == c.opts.Name {
			continue
		}
		if known, ok := c.book.node(name); ok {
			n.RPC, n.API, n.Admin, n.Gossip = known.RPC, known.API, known.Admin, known.Gossip
			n.Instance, n.StartedAt, n.Version = known.Instance, known.StartedAt, known.Version
		}
		v := PeerView{Name: name, Site: n.Site, Info: n, Via: c.mesh.Via(name)}
		if a, ok := c.peers.get(name); ok {
			v.fill(a, now)
		}
		views[name] = v
	}
	return views
}

func (v *PeerView) fill(a answer, now time.Duration) {
	g, h := a.got, a.got.GetHealth()
	v.Heard, v.Ago, v.Stuck = true, now-a.sent, a.sent-a.moved
	v.Health = Health{
		Draining: h.GetDraining(), PID: int(h.GetPid()),
		UpstreamsHealthy: int(h.GetUpstreamsHealthy()), UpstreamsTotal: int(h.GetUpstreamsTotal()),
		UpstreamsDown: h.GetUpstreamsDown(), AppliedIndex: h.GetAppliedIndex(),
		LastLogIndex: h.GetLastLogIndex(), Cold: h.GetCold(),
	}
	v.HeardBy = a.heardBy
	v.LeaseLeft = time.Duration(g.GetLeaseUs())*time.Microsecond - v.Ago
	v.Leader, v.Term, v.Epoch = g.GetLeader(), g.GetTerm(), g.GetEpoch()
	v.Paused = time.Duration(g.GetPausedMs()) * time.Millisecond
}

func (c *Cluster) health() *clusterpb.Health {
	h := c.opts.Health()
	return &clusterpb.Health{
		Instance: c.instance, Draining: h.Draining, Pid: uint32(h.PID), //nolint:gosec // a pid fits
		UpstreamsHealthy: uint32(h.UpstreamsHealthy), UpstreamsTotal: uint32(h.UpstreamsTotal), //nolint:gosec // bounded by the configuration
		UpstreamsDown: h.UpstreamsDown[:min(len(h.UpstreamsDown), maxDownListed)],
		AppliedIndex:  c.fsm.applied.Load(), LastLogIndex: c.lastIndex(), Cold: !c.lease.everHeld(),
	}
}

// pauseMeter finds out when this process was starved or stopped: a loop that
// should turn each interval measures how late it really was. A node that was
// late must not accuse others.
type pauseMeter struct {
	mu   sync.Mutex // guards gaps
	gaps [8]time.Duration
	next int
}

// pauseWindow is how long each of the gaps is collected.
const pauseWindow = 500 * time.Millisecond

// Run blocks until ctx ends.
func (p *pauseMeter) Run(ctx context.Context) error {
	const interval = 125 * time.Millisecond
	tick := time.NewTimer(clock.UntilTick(clock.Boottime(), interval))
	defer tick.Stop()
	last, slotEnds := clock.Boottime(), clock.Boottime()+pauseWindow
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := clock.Boottime()
		tick.Reset(clock.UntilTick(now, interval))
		p.mu.Lock()
		p.gaps[p.next] = max(p.gaps[p.next], now-last-interval)
		if now > slotEnds {
			p.next = (p.next + 1) % len(p.gaps)
			p.gaps[p.next] = 0
			slotEnds = now + pauseWindow
		}
		p.mu.Unlock()
		last = now
	}
}

// longest gap of the last four seconds or so.
func (p *pauseMeter) longest() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	longest := time.Duration(0)
	for _, g := range p.gaps {
		longest = max(longest, g)
	}
	return longest
}
