package cluster

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/mesh"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// memberlist's Shutdown does not wait for a probe in progress, which ends by its
		// own timer.
		goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).probeNode"))
}

// testCA signs the identities of one test.
type testCA struct {
	dir       string
	cert, key []byte
}

func newTestCA(t testing.TB, clusterName string) *testCA {
	t.Helper()
	cert, key, err := mesh.NewCA(clusterName, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	ca := &testCA{dir: t.TempDir(), cert: cert, key: key}
	ca.write(t, "ca.pem", cert)
	return ca
}

func (ca *testCA) write(t testing.TB, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(ca.dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (ca *testCA) issue(t testing.TB, id mesh.Identity) *mesh.Credentials {
	t.Helper()
	cert, key, err := mesh.Issue(ca.cert, ca.key, id, []string{"127.0.0.1"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c, err := mesh.LoadCredentials(ca.write(t, id.Node+".pem", cert), ca.write(t, id.Node+".key", key),
		filepath.Join(ca.dir, "ca.pem"), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// member is a node in this process. Its stores are in memory and keep their content while
// it is stopped.
type member struct {
	*Cluster
	name, site string
	ca         *testCA
	dir        string
	logs       *diskStore
	snaps      *raft.InmemSnapshotStore
	level      int // Options.FeatureLevel
	stop       func()
	ended      chan error
}

// diskStore is a store whose disk can be slow, and can hang: then writes of entries wait.
type diskStore struct {
	*raft.InmemCommitTrackingStore
	takes atomic.Int64 // how long a write of entries takes at least
	disk  sync.RWMutex // held while the disk hangs
}

func newDiskStore() *diskStore {
	return &diskStore{InmemCommitTrackingStore: raft.NewInmemCommitTrackingStore()}
}

func (s *diskStore) StoreLogs(entries []*raft.Log) error {
	for begun := time.Now(); time.Since(begun) < time.Duration(s.takes.Load()); {
		<-time.After(5 * time.Millisecond)
	}
	s.disk.RLock()
	defer s.disk.RUnlock()
	return s.InmemCommitTrackingStore.StoreLogs(entries)
}

func (s *diskStore) StoreLog(entry *raft.Log) error { return s.StoreLogs([]*raft.Log{entry}) }

type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimRight(string(b), "\n"))
	return len(b), nil
}

// plainKeys keeps the cluster key without an operator key.
type plainKeys struct{}

func (plainKeys) NewClusterKey(string, string) (agreed.ClusterKey, error) {
	public, private, err := ed25519.GenerateKey(nil)
	return agreed.ClusterKey{Public: public, Sealed: private.Seed()}, err
}

func (plainKeys) ResealClusterKey(_ string, k agreed.ClusterKey, operatorKey string) (agreed.ClusterKey, error) {
	k.OperatorKey = operatorKey
	return k, nil
}

func (plainKeys) SignTicket(_ string, k agreed.ClusterKey, text []byte) ([]byte, error) {
	return ed25519.Sign(ed25519.NewKeyFromSeed(k.Sealed), text), nil
}

func newMember(t testing.TB, ca *testCA, site, name string) *member {
	m := &member{name: name, site: site, ca: ca, dir: t.TempDir(), logs: newDiskStore(), snaps: raft.NewInmemSnapshotStore()}
	t.Cleanup(func() {
		if m.stop != nil {
			m.halt(t)
		}
	})
	return m
}

// start runs the member on new ports.
func (m *member) start(t testing.TB, seeds ...string) *member {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("DSNODE_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", m.name)
	}
	m.Cluster, err = New(Options{
		ClusterName: "test", Name: m.name, Site: m.site, Version: "test", DataDir: m.dir, Seeds: seeds,
		Listener: ln, RPC: ln.Addr().String(), API: "127.0.0.1:1", Admin: "127.0.0.1:2",
		Gossip: "127.0.0.1:0", GossipBind: "127.0.0.1:0", GossipKey: make([]byte, 32),
		Credentials:  m.ca.issue(t, mesh.Identity{Cluster: "test", Site: m.site, Node: m.name}),
		FeatureLevel: m.level, ClusterKeys: plainKeys{},
		Logs: m.logs, Stable: m.logs, Snapshots: m.snaps,
		StoreFailed: make(chan struct{}), StoreError: func() error { return nil },
		Health: func() Health { return Health{PID: os.Getpid()} },
		Logger: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	m.ended = ended
	m.stop = sync.OnceFunc(cancel)
	return m
}

// halt stops the member and checks that Run returned nil.
func (m *member) halt(t testing.TB) {
	t.Helper()
	m.stop()
	m.stop = nil
	select {
	case err := <-m.ended:
		if err != nil {
			t.Errorf("%s ended with %v", m.name, err)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("%s did not stop within 30 s", m.name)
	}
}

func eventually(t testing.TB, what string, within time.Duration, ok func() bool, about ...*member) {
	t.Helper()
	for deadline := time.Now().Add(within); !ok(); {
		if time.Now().After(deadline) {
			for _, m := range about {
				left, epoch := m.Lease()
				t.Logf("%s: lease %s epoch %d, raft %+v, peers %+v, nodes %+v", m.name, left, epoch, m.Raft(), m.Peers(), m.State().Nodes)
			}
			t.Fatalf("not within %s: %s", within, what)
		}
		<-time.After(10 * time.Millisecond)
	}
}

const testSites = `version: 1
sites:
  a: {city: x, priority: 1}
  b: {city: x, priority: 2}
  c: {city: y, priority: 3}
timing: {heartbeat: 400ms}
`

func deadline(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// threeMembers founds a cluster of a-1, b-1 and c-1, all of them voters.
func threeMembers(t testing.TB) (a, b, c *member) {
	t.Helper()
	return threeMembersAt(t, 0)
}

// threeMembersAt is threeMembers, held at a feature level.
func threeMembersAt(t testing.TB, level int) (a, b, c *member) {
	t.Helper()
	ca := newTestCA(t, "test")
	a, b, c = newMember(t, ca, "a", "a-1"), newMember(t, ca, "b", "b-1"), newMember(t, ca, "c", "c-1")
	a.level, b.level, c.level = level, level, level
	a.start(t)
	if err := a.Bootstrap(deadline(t, 10*time.Second), []byte(testSites), "test"); err != nil {
		t.Fatal(err)
	}
	b.start(t, a.opts.RPC)
	c.start(t, a.opts.RPC)
	for _, m := range []*member{b, c} {
		eventually(t, m.name+" is a member", 20*time.Second, func() bool { _, ok := a.State().Nodes[m.name]; return ok })
		// On a busy machine the leader may have changed.
		change := func(to ServerChange) func() bool {
			return func() bool {
				for _, leader := range []*member{a, b, c} {
					if leader.Raft().Leads && leader.ChangeServer(m.name, to) == nil {
						return true
					}
				}
				return false
			}
		}
		// A voter with an empty log gives no vote, so that there may be no leader. As the
		// placement of voters does, make it a voter only after it has caught up.
		eventually(t, m.name+" is a non-voter", 20*time.Second, change(MakeNonvoter), a, b, c)
		eventually(t, m.name+" has caught up", 20*time.Second, func() bool { _, ok := m.State().Nodes[m.name]; return ok }, a, b, c)
		eventually(t, m.name+" is a voter", 20*time.Second, change(MakeVoter), a, b, c)
	}
	for _, m := range []*member{a, b, c} {
		eventually(t, m.name+" holds a lease and hears the others", 20*time.Second, func() bool { return settled(m) }, m)
	}
	return a, b, c
}

// settled reports whether a member holds a lease and hears the two others.
func settled(m *member) bool {
	left, epoch := m.Lease()
	heard := 0
	for _, p := range m.Peers() {
		if p.Heard && p.Ago < m.Timing().Patience {
			heard++
		}
	}
	return left > 0 && epoch == 1 && heard == len(m.State().Nodes)-1 && len(m.State().Nodes) == 3
}

func TestBootstrapJoinAndPropose(t *testing.T) {
	a, b, c := threeMembers(t)
	k, _ := agreed.NewAPIKey("tenant", "", nil, time.Time{}, time.Now())
	if _, err := c.Propose(deadline(t, 15*time.Second), agreed.CmdAPIKeyPut, k); err != nil {
		t.Fatal(err)
	}
	if _, ok := c.State().APIKeys[k.ID]; !ok {
		t.Error("the proposer does not see its own change")
	}
	eventually(t, "all members have the key", 5*time.Second, func() bool {
		_, inA := a.State().APIKeys[k.ID]
		_, inB := b.State().APIKeys[k.ID]
		return inA && inB
	})
	if _, err := b.Propose(deadline(t, 15*time.Second), agreed.CmdConfigSet, agreed.ConfigSet{Expect: 9}); !errors.Is(err, agreed.ErrVersionConflict) {
		t.Errorf("changing another version through a follower: %v, want ErrVersionConflict", err)
	}
	if err := a.Bootstrap(deadline(t, time.Second), []byte(testSites), "again"); err != nil {
		t.Errorf("second bootstrap with the same text: %v", err)
	}
	if err := a.Bootstrap(deadline(t, time.Second), []byte(testSites+"# changed\n"), "again"); !errors.Is(err, agreed.ErrAlreadyFounded) {
		t.Errorf("second bootstrap with another text: %v, want ErrAlreadyFounded", err)
	}
	free := newMember(t, a.ca, "b", "b-9").start(t, c.opts.RPC)
	if err := free.Bootstrap(deadline(t, 15*time.Second), []byte(testSites), "x"); !errors.Is(err, ErrSeedKnows) && !errors.Is(err, agreed.ErrAlreadyFounded) && err != nil {
		t.Errorf("bootstrap with a seed that belongs to a cluster: %v", err)
	}
	if free.State().ClusterID != "" && free.State().ClusterID != a.State().ClusterID {
		t.Error("a second cluster was founded although a seed belongs to one")
	}
}

func TestWaitingSaysWhyJoinIsRefused(t *testing.T) {
	a, _, _ := threeMembers(t)
	for _, tc := range []struct {
		name, site, node, message string
		ca                        *testCA
	}{
		{"an unknown site", "nowhere", "n-1", "the site is not in the configuration", a.ca},
		{"the name of a running node", "b", "b-1", "the name is used by another node", a.ca},
		{"another authority", "b", "b-2", "certificate", newTestCA(t, "test")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newMember(t, tc.ca, tc.site, tc.node).start(t, a.opts.RPC)
			eventually(t, "Waiting contains: "+tc.message, 20*time.Second, func() bool { return strings.Contains(n.Waiting(), tc.message) })
			t.Log(n.Waiting())
			if n.Membership().ClusterID != "" {
				t.Error("the node joined")
			}
		})
	}
}

func TestMemberReturnsWithNewAddresses(t *testing.T) {
	a, b, c := threeMembers(t)
	old := c.opts.RPC
	c.halt(t)
	if _, err := a.Propose(deadline(t, 15*time.Second), agreed.CmdConfigSet, agreed.ConfigSet{Expect: 1, Text: testSites + "# two\n"}); err != nil {
		t.Fatal(err)
	}
	c.start(t) // without seeds: it uses the addresses in its member file
	if c.opts.RPC == old {
		t.Skip("the system assigned the same port again")
	}
	eventually(t, "c-1 has caught up", 20*time.Second, func() bool { return c.State().Config.Version == 2 })
	for _, m := range []*member{a, b, c} {
		eventually(t, m.name+" knows the new address", 20*time.Second, func() bool {
			return m.State().Nodes["c-1"].RPC == c.opts.RPC && settled(m)
		}, m)
	}
}

func TestAllMembersRestartInAnotherOrder(t *testing.T) {
	a, b, c := threeMembers(t)
	for _, m := range []*member{a, b, c} {
		m.halt(t)
	}
	c.start(t)
	if _, err := c.Propose(deadline(t, time.Second), agreed.CmdTick, nil); !errors.Is(err, ErrNoQuorum) {
		t.Errorf("propose without a quorum: %v, want ErrNoQuorum", err)
	}
	if !c.Cold() {
		t.Error("a restarted node without a lease is not cold")
	}
	// All members have new ports. The others find c-1 through the seed address.
	addr := c.opts.RPC
	a.start(t, addr)
	b.start(t, addr)
	for _, m := range []*member{a, b, c} {
		eventually(t, m.name+" settled", 30*time.Second, func() bool { return settled(m) }, m)
	}
}

func TestRestartWithoutQuorumRestoresTheAgreedState(t *testing.T) {
	a, b, c := threeMembers(t)
	if _, err := a.Propose(deadline(t, 15*time.Second), agreed.CmdConfigSet, agreed.ConfigSet{Expect: 1, Text: testSites + "# two\n"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "c-1 has version 2", 5*time.Second, func() bool { return c.State().Config.Version == 2 })
	eventually(t, "c-1's snapshot has raft's configuration", 20*time.Second, func() bool {
		kept, err := c.snaps.List()
		return err == nil && len(kept) > 0 && kept[0].Index >= c.fsm.configured.Load()
	})
	for _, m := range []*member{a, b, c} {
		m.halt(t)
	}
	c.start(t)
	eventually(t, "c-1 has version 2 without a quorum", 20*time.Second, func() bool {
		s := c.State()
		return s.Config.Version == 2 && s.Parsed != nil && len(s.Nodes) == 3
	})
	if left, _ := c.Lease(); left > 0 {
		t.Error("c-1 holds a lease without a quorum")
	}
	// By now it has applied the ticks of its log.
	if c.Raft().Ticked {
		t.Error("c-1 says that it has received a tick since its start, and there is no leader")
	}
	addr := c.opts.RPC
	a.start(t, addr)
	b.start(t, addr)
	eventually(t, "c-1 has received a tick", 20*time.Second, func() bool { return c.Raft().Ticked }, a, b, c)
}

func TestLosingQuorumEndsTheLeaseAndKeepsTheState(t *testing.T) {
	a, b, c := threeMembers(t)
	b.halt(t)
	c.halt(t)
	eventually(t, "the lease ends", 20*time.Second, func() bool { left, _ := a.Lease(); return left <= 0 })
	eventually(t, "the leadership ends", 20*time.Second, func() bool { _, leads := a.Leading(); return !leads })
	eventually(t, "changes are refused", 20*time.Second, func() bool {
		_, err := a.Propose(deadline(t, time.Second), agreed.CmdTick, nil)
		return errors.Is(err, ErrNoQuorum)
	})
	v := a.Raft()
	if v.Quorum || v.Since.IsZero() {
		t.Errorf("quorum %v since %v, want no quorum and the time of its loss", v.Quorum, v.Since)
	}
	if a.State().Config.Version != 1 {
		t.Errorf("the agreed state has version %d, want 1", a.State().Config.Version)
	}
}

func TestTransferLeadership(t *testing.T) {
	a, b, c := threeMembers(t)
	for i, to := range []*member{b, c, a, c} {
		from := []*member{a, b, c}[i%3]
		if err := from.TransferLeadership(deadline(t, 10*time.Second), to.name); err != nil {
			t.Fatalf("transfer to %s: %v", to.name, err)
		}
		if l, _ := to.leader(); l != to.name {
			t.Errorf("after the transfer to %s it reports %q as leader", to.name, l)
		}
	}
	led := make(chan uint64, 8)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- a.WhileLeader(ctx, func(ctx context.Context, l Leadership) error {
			led <- l.Term
			<-ctx.Done()
			led <- 0
			return nil
		})
	}()
	for _, to := range []*member{a, b} {
		if err := a.TransferLeadership(deadline(t, 10*time.Second), to.name); err != nil {
			t.Fatal(err)
		}
		select {
		case term := <-led:
			if (term != 0) != (to == a) {
				t.Errorf("after the transfer to %s the task of a-1 sent term %d", to.name, term)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("after the transfer to %s the task of a-1 sent nothing", to.name)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A promotion that a leader decided is refused in any other term, whichever node proposes
// it.
func TestPromotionIsRefusedInAnotherTerm(t *testing.T) {
	a, b, c := threeMembers(t)
	if err := a.TransferLeadership(deadline(t, 10*time.Second), c.name); err != nil {
		t.Fatal(err)
	}
	if err := b.waitLeader(deadline(t, 10*time.Second), c.name); err != nil {
		t.Fatal(err)
	}
	term := c.Raft().Term
	promote := func(by *member, term uint64) error {
		_, err := by.Propose(deadline(t, 5*time.Second), agreed.CmdPromote, agreed.Promote{
			Site: "b", ExpectEpoch: a.State().Primary.Epoch, Generation: 1, Kind: agreed.FailoverUnplanned, Term: term,
		})
		return err
	}
	for _, by := range []*member{b, c} { // forwarded to the leader, and proposed by it
		if err := promote(by, term-1); !errors.Is(err, agreed.ErrStaleTerm) {
			t.Errorf("proposed by %s for the previous term: %v, want ErrStaleTerm", by.name, err)
		}
	}
	if e := c.State().Primary.Epoch; e != 1 {
		t.Fatalf("the epoch is %d, want 1", e)
	}
	if err := promote(c, term); err != nil {
		t.Fatal(err)
	}
	if p := c.State().Primary; p.Epoch != 2 || p.Site != "b" {
		t.Errorf("the primary is %+v, want b with epoch 2", p)
	}
}

func TestUnknownCommandEndsTheNode(t *testing.T) {
	ca := newTestCA(t, "test")
	a := newMember(t, ca, "a", "a-1").start(t)
	if err := a.Bootstrap(deadline(t, 10*time.Second), []byte(testSites), "test"); err != nil {
		t.Fatal(err)
	}
	if err := a.raft.Load().Apply([]byte(`{"f":1,"t":"invented_later"}`), time.Second).Error(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-a.ended:
		a.stop = nil
		if !errors.Is(err, agreed.ErrUnknownCommand) || !strings.Contains(fmt.Sprint(err), "upgrade") {
			t.Errorf("Run ended with %v, want ErrUnknownCommand and a hint to upgrade", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Run did not end after a command of a newer version")
	}
}
