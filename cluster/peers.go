package cluster

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/host"
)

// Health is what a node reports about itself in each ping.
type Health struct {
	Draining         bool
	PID              int
	UpstreamsHealthy int
	UpstreamsTotal   int
	UpstreamsDown    []string // of its own site
	AppliedIndex     uint64
	LastLogIndex     uint64
	Cold             bool // it has held no lease since its start
	// Problems are sentences about what is wrong with the node itself, the worst first.
	Problems []string
	// Blocked is the traffic with nodes that it hears that does not go through.
	Blocked  []Blocked
	Starting bool // it has not caught up since its start
	// Journal is the stream (agreed.StreamKey) that it writes its job records to, empty
	// when it has none or does not tell; JournalEnd is the last record on its disk.
	Journal    string
	JournalEnd uint64
	// JobsMissing says why it may lack jobs that other nodes have; empty: it doesn't.
	JobsMissing string
}

// PeerView is what this node knows about another one.
type PeerView struct {
	Name, Site string
	// Via is the node through which connections to the peer are tunnelled now; empty:
	// they are direct.
	Via string
	// Heard says whether the node ever answered a ping of this process; Ago is
	// how long ago the newest answered ping was sent.
	Heard bool
	Ago   time.Duration
	// HeardFor is for how long this process of the peer has been heard without a break
	// of the patience.
	HeardFor time.Duration
	Info     agreed.Node
	Health
	// HeardBy has, for each node that the peer has heard, how long before its newest
	// answer it heard that node. The map is shared: don't change it.
	HeardBy map[string]time.Duration
	// LeaseLeft is how long the peer's lease lasts now, by its newest answer.
	LeaseLeft time.Duration
	// Leaseless is for how long its answers have shown no lease. On a busy machine, and in
	// an election, a lease may run out for a moment.
	Leaseless time.Duration
	Paused    time.Duration // the longest recent time for which the peer did not run
	// Acting is the epoch in which the peer acted as primary by its newest answer, 0 if it
	// did not; nil: an older version, which does not tell.
	Acting *uint64
	// Disk is the speed of the peer's disk by its newest answer.
	Disk DiskSpeed
	// Stuck is for how long its answers have shown no progress in applying
	// entries. While there is a leader, it commits several ticks per second: then
	// either the peer's disk hangs or the leader's entries don't reach it.
	Stuck time.Duration
	// LargeAgo is how long ago the newest large request that the peer answered was sent,
	// UDPAgo how long ago its newest answer to a UDP packet of gossip arrived. Without
	// one they count from when the peer was first heard: they are at most HeardFor.
	LargeAgo, UDPAgo time.Duration
	// JournalGrowth is the most records by which JournalEnd rose from one ping to the
	// next, of the last few pings.
	JournalGrowth uint64
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

// maxDownListed bounds the names of upstreams that are down in a ping.
const maxDownListed = 256

// peerTable holds the newest answer of each peer.
type peerTable struct {
	mu      sync.Mutex // guards answers
	answers map[string]answer
}

type answer struct {
	sent time.Duration // Boottime
	got  *clusterpb.PingResponse
	// progressed is when the first ping was sent whose answer had this applied index;
	// put sets it.
	progressed time.Duration
	// since is when the first ping was sent that this process of the peer answered
	// without a break; put sets it.
	since time.Duration
	// leased is when the newest ping was sent whose answer showed a lease, or since; put
	// sets it.
	leased time.Duration
	// heardBy is PeerView.HeardBy; put sets it. It is shared and never changed.
	heardBy map[string]time.Duration
	// growth has by how many records the journal grew before each of the newest answers,
	// newest first; put sets it.
	growth [growthPings]uint64
}

// growthPings is how many pings JournalGrowth covers: those of about four seconds.
const growthPings = 16

// put stores an answer. Without one for as long as the patience, the peer was not heard.
func (t *peerTable) put(node string, a answer, patience time.Duration) {
	a.heardBy = make(map[string]time.Duration, len(a.got.GetHeard()))
	for _, e := range a.got.GetHeard() {
		if e.GetAgoMs() >= 0 {
			a.heardBy[e.GetNode()] = time.Duration(e.GetAgoMs()) * time.Millisecond
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	a.progressed, a.since, a.leased = a.sent, a.sent, a.sent
	now := a.got.GetHealth()
	if old, ok := t.answers[node]; ok {
		before := old.got.GetHealth()
		if before.GetInstance() == now.GetInstance() && a.sent-old.sent < patience {
			a.since = old.since
			if a.got.GetLeaseUs() == 0 {
				a.leased = old.leased
			}
		}
		if before.GetInstance() == now.GetInstance() && before.GetAppliedIndex() == now.GetAppliedIndex() {
			a.progressed = old.progressed
		}
		copy(a.growth[1:], old.growth[:])
		if before.GetJournal() == now.GetJournal() && now.GetJournalEnd() > before.GetJournalEnd() {
			a.growth[0] = now.GetJournalEnd() - before.GetJournalEnd()
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

// followOther reports whether a peer knows another leader than this node, in a later term.
func (t *peerTable) followOther(self string, after uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, a := range t.answers {
		if leader := a.got.GetLeader(); leader != "" && leader != self && a.got.GetTerm() > after {
			return true
		}
	}
	return false
}

// retain drops the answers of former members.
func (t *peerTable) retain(members map[string]agreed.Node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(t.answers, func(name string, _ answer) bool { _, member := members[name]; return !member })
}

// heard is this node's table in the form for a ping's answer.
func (t *peerTable) heard(now time.Duration) []*clusterpb.Heard {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*clusterpb.Heard, 0, len(t.answers))
	for name, a := range t.answers {
		out = append(out, &clusterpb.Heard{Node: name, AgoMs: (now - a.sent).Milliseconds()})
	}
	return out
}

// pingAll pings every other member until ctx ends, each in its own goroutine, so that a
// peer that does not respond delays no other.
func (c *Cluster) pingAll(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	running := map[string]context.CancelFunc{}
	defer func() {
		for _, stop := range running {
			stop()
		}
	}()
	removedBefore, membersOnly := uint64(0), false
	for {
		changed := c.Changed()
		members := c.members()
		if s := c.State(); s.RemovedBefore != removedBefore {
			removedBefore = s.RemovedBefore
			c.mesh.CloseRefused()
		}
		if s := c.State(); s.MembersOnly() && !membersOnly {
			membersOnly = true
			c.mesh.CloseOutsiders()
			c.mesh.CloseRefused()
		}
		for name := range members {
			if name == c.opts.Name || running[name] != nil {
				continue
			}
			pctx, stop := context.WithCancel(ctx)
			running[name] = stop
			p := pinger{c: c, name: name}
			wg.Go(func() { p.run(pctx) })
			wg.Go(func() { c.sendLarge(pctx, name) })
		}
		for name, stop := range running {
			if _, member := members[name]; !member {
				stop()
				delete(running, name)
				c.book.remove(name)
				c.large.remove(name)
				if err := c.mesh.Forget(name); err != nil {
					c.log.Warn("could not close the connections to a removed node", "peer", name, "err", err)
				}
			}
		}
		c.peers.retain(members)
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// members are the agreed nodes or, before this node has the agreed state, those of the
// address book.
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

func (c *Cluster) pingRequest() *clusterpb.PingRequest {
	return &clusterpb.PingRequest{Format: rpcFormat, Node: infoOf(c.self()), Health: c.health()}
}

func (c *Cluster) pingResponse() *clusterpb.PingResponse {
	left, heard := c.lease.left()
	heard = heard.merge(fencesOf(c.State()))
	leader, term := c.leader()
	r := &clusterpb.PingResponse{
		Format: rpcFormat, Node: infoOf(c.self()), Health: c.health(), Heard: c.peers.heard(c.opts.Host.Boottime()),
		LeaseUs: max(0, left.Microseconds()), Epoch: heard.epoch, Ownership: heard.ownership,
		Leader: leader, Term: term, PausedMs: c.pauses.longest().Milliseconds(), Acting: new(c.acting()),
	}
	troubles(r, c.opts.Health())
	return r
}

// Peers returns what this node knows about every other member, by name.
func (c *Cluster) Peers() map[string]PeerView {
	now := c.opts.Host.Boottime()
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
			v.LargeAgo, v.UDPAgo = c.largeAgo(name, a.since, now), c.udpAgo(name, a.since, now)
		}
		views[name] = v
	}
	return views
}

func (v *PeerView) fill(a answer, now time.Duration) {
	g, h := a.got, a.got.GetHealth()
	v.Heard, v.Ago, v.Stuck, v.HeardFor = true, now-a.sent, a.sent-a.progressed, now-a.since
	v.Leaseless = a.sent - a.leased
	v.Health = Health{
		Draining: h.GetDraining(), PID: int(h.GetPid()),
		UpstreamsHealthy: int(h.GetUpstreamsHealthy()), UpstreamsTotal: int(h.GetUpstreamsTotal()),
		UpstreamsDown: h.GetUpstreamsDown(), AppliedIndex: h.GetAppliedIndex(), LastLogIndex: h.GetLastLogIndex(),
		Cold: h.GetCold(), Starting: h.GetStarting(), Journal: h.GetJournal(), JournalEnd: h.GetJournalEnd(), JobsMissing: h.GetJobsMissing(),
	}
	if v.Disk.Known = h.DiskWriteUs != nil; v.Disk.Known {
		v.Disk.Write = time.Duration(h.GetDiskWriteUs()) * time.Microsecond //nolint:gosec // a time of a peer's own
	}
	if slow := time.Duration(h.GetDiskSlowMs()) * time.Millisecond; slow > 0 { //nolint:gosec // as above
		v.Disk.SlowFor = slow + v.Ago
	}
	readTroubles(g, &v.Health)
	v.JournalGrowth = slices.Max(a.growth[:])
	v.HeardBy = a.heardBy
	v.LeaseLeft = time.Duration(g.GetLeaseUs())*time.Microsecond - v.Ago
	v.Paused = time.Duration(g.GetPausedMs()) * time.Millisecond
	v.Acting = g.Acting
}

func (c *Cluster) health() *clusterpb.Health {
	h := c.opts.Health()
	disk := c.disk.speed()
	health := &clusterpb.Health{
		Instance: c.instance, Draining: h.Draining, Pid: uint32(h.PID), //nolint:gosec // a pid fits
		UpstreamsHealthy: uint32(h.UpstreamsHealthy), UpstreamsTotal: uint32(h.UpstreamsTotal), //nolint:gosec // bounded by the configuration
		UpstreamsDown: h.UpstreamsDown[:min(len(h.UpstreamsDown), maxDownListed)],
		AppliedIndex:  c.fsm.applied.Load(), LastLogIndex: c.lastIndex(), Cold: !c.lease.everHeld(),
		Starting:   h.Starting,
		DiskSlowMs: uint64((disk.SlowFor + time.Millisecond - 1) / time.Millisecond), //nolint:gosec // never negative
		Journal:    h.Journal, JournalEnd: h.JournalEnd,
		JobsMissing: h.JobsMissing,
	}
	if disk.Known {
		health.DiskWriteUs = new(uint64(disk.Write / time.Microsecond)) //nolint:gosec // never negative
	}
	return health
}

// pauseMeter measures for how long this process did not run, because it had no CPU time
// or was stopped: a periodic loop measures how late it is. After a pause, silence of
// other nodes proves nothing.
type pauseMeter struct {
	host *host.Host

	mu   sync.Mutex // guards gaps
	gaps [8]time.Duration
	next int
}

// pauseWindow is the period of which each entry in gaps is the maximum.
const pauseWindow = 500 * time.Millisecond

// Run blocks until ctx ends.
func (p *pauseMeter) Run(ctx context.Context) error {
	const interval = 125 * time.Millisecond
	timer := time.NewTimer(clock.UntilTick(p.host.Boottime(), interval))
	defer timer.Stop()
	last, slotEnds := p.host.Boottime(), p.host.Boottime()+pauseWindow
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		now := p.host.Boottime()
		timer.Reset(clock.UntilTick(now, interval))
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

// longest is the longest pause of about the last four seconds.
func (p *pauseMeter) longest() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	longest := time.Duration(0)
	for _, g := range p.gaps {
		longest = max(longest, g)
	}
	return longest
}
