package failover

import (
	"context"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
)

// standing is what the Fence sees; the world asks the Fence with w.mu held.
type standing struct{ n *node }

func (s standing) State() *agreed.State { return s.n.w.states[s.n.applied] }
func (s standing) Lease() (time.Duration, uint64) {
	return s.n.leaseUntil - s.n.w.now(), s.n.leaseEpoch
}

func (s standing) OwnershipLease() (time.Duration, uint64) {
	left, _ := s.Lease()
	return left, 0
}
func (s standing) Changed() <-chan struct{}      { return s.n.w.news }
func (s standing) LeaseChanged() <-chan struct{} { return nil } // no Fence runs in the world

// awake blocks while the node is stopped.
func (n *node) awake() {
	for {
		n.w.mu.Lock()
		stopped, resumed := n.stopped, n.resumed
		n.w.mu.Unlock()
		if !stopped {
			return
		}
		<-resumed
	}
}

// The methods below make a node an Agreement.

func (n *node) State() *agreed.State {
	n.awake()
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.w.states[n.applied]
}

func (n *node) Changed() <-chan struct{} {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.w.news
}

func (n *node) Lease() (time.Duration, uint64) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.leaseUntil - n.w.now(), n.leaseEpoch
}

func (n *node) Paused() time.Duration {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.paused()
}

func (n *node) Timing() config.Timing { return n.w.timing }

func (n *node) DiskSpeed() cluster.DiskSpeed {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.disk()
}

// disk assumes the lock.
func (n *node) disk() cluster.DiskSpeed {
	if n.slowSince == 0 {
		return cluster.DiskSpeed{Known: true, Write: 5 * time.Millisecond}
	}
	return cluster.DiskSpeed{Known: true, Write: time.Second, SlowFor: max(1, n.w.now()-n.slowSince)}
}

// slowDisks makes the disks of a site slow from now on, or fast.
func (w *world) slowDisks(site string, slow bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.nodes {
		if n.site == site {
			n.slowSince = 0
			if slow {
				n.slowSince = w.now()
			}
		}
	}
}

func (n *node) Peers() map[string]cluster.PeerView {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	peers := map[string]cluster.PeerView{}
	for name, p := range n.w.nodes {
		if name == n.name {
			continue
		}
		v := cluster.PeerView{Name: name, Site: p.site}
		if h, ok := n.heard[name]; ok {
			v = h.view
			v.Ago = n.w.now() - h.sent
			v.LeaseLeft -= v.Ago
			v.HeardBy = h.heard
		}
		peers[name] = v
	}
	return peers
}

func (n *node) Raft() cluster.RaftView {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	v := cluster.RaftView{Leader: n.w.leader, Leads: n.leads, Term: n.w.term, CommitIndex: uint64(len(n.w.states) - 1 + n.w.ticks)}
	for _, name := range n.w.names {
		v.Servers = append(v.Servers, cluster.Server{Name: name, Voter: n.w.nodes[name].voter})
	}
	return v
}

func (n *node) Leading() (cluster.Leadership, bool) {
	n.awake()
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	if !n.leads || n.firstCommit == 0 || n.w.now()-n.lastCommit > n.w.timing.Lease {
		return cluster.Leadership{}, false
	}
	return cluster.Leadership{Term: n.leadTerm, FirstCommit: n.firstCommit}, true
}

// wait lets virtual time pass, or gives up with ctx.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func (n *node) Propose(ctx context.Context, t agreed.CommandType, data any) (uint64, error) {
	n.awake()
	cmd, err := agreed.NewCommand(t, time.Now(), data)
	if err != nil {
		return 0, err
	}
	w := n.w
	if err := wait(ctx, 2*w.delay); err != nil {
		return 0, cluster.ErrNoQuorum
	}
	w.mu.Lock()
	l := w.nodes[w.leader]
	if l == nil || !l.leads || l.firstCommit == 0 || !w.reach(n.name, l.name) || !w.majority(l.name) {
		w.mu.Unlock()
		return 0, cluster.ErrNoQuorum
	}
	cmd.Term, cmd.Index = w.term, uint64(len(w.states))
	next, err := agreed.Apply(w.states[len(w.states)-1], cmd)
	if err == nil {
		w.states = append(w.states, next)
		w.apply(l)
		w.apply(n)
	}
	index := uint64(len(w.states) - 1 + w.ticks)
	lost := w.rng.Float64() < w.forget || w.forgetNext
	w.forgetNext = false
	w.mu.Unlock()
	if lost {
		return 0, cluster.ErrLeadershipMoved
	}
	return index, err
}

func (n *node) TransferLeadership(ctx context.Context, to string) error {
	if err := wait(ctx, 4*n.w.delay); err != nil {
		return err
	}
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.w.transfers = append(n.w.transfers, to)
	switch {
	case !n.w.nodes[to].runs() || !n.w.majority(to):
		return cluster.ErrNoQuorum
	case n.w.nodes[to].frozen:
		return cluster.ErrNotFollowing
	}
	n.w.term++
	n.w.elected(to)
	return nil
}

func (n *node) AwaitApplied(ctx context.Context, name string, index uint64) error {
	return n.ask(ctx, name, func(o *node) bool { return o.index() >= index })
}

func (n *node) AwaitActing(ctx context.Context, name string, epoch, _ uint64) error {
	return n.ask(ctx, name, func(o *node) bool { return o.fence.Acting() && n.w.states[o.applied].Primary.Epoch >= epoch })
}

// ask asks a node until ok holds there.
func (n *node) ask(ctx context.Context, name string, ok func(*node) bool) error {
	for {
		if err := wait(ctx, 2*n.w.delay); err != nil {
			return fmt.Errorf("%s: %w (%w)", name, cluster.ErrNotFollowing, err)
		}
		n.w.mu.Lock()
		o := n.w.nodes[name]
		done := o.runs() && n.w.reach(n.name, name) && ok(o)
		n.w.mu.Unlock()
		if done {
			return nil
		}
	}
}

// Release makes the world a Releaser, in place of the rpc.
func (w *world) Release(ctx context.Context, name, id string) error {
	if err := wait(ctx, 2*w.delay); err != nil {
		return err
	}
	for {
		w.mu.Lock()
		n, s := w.nodes[name], w.states[w.nodes[name].applied]
		busy := !n.runs() || s.Switchover == nil || s.Switchover.ID != id
		w.mu.Unlock()
		if !busy {
			return nil
		}
		if err := wait(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}
