package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
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
		// memberlist's Shutdown does not wait for a probe under way; it ends by
		// its own timer.
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

// member is one node of a test, in this process, with its stores in memory:
// they outlive a stop, as a disk would.
type member struct {
	*Cluster
	name, site string
	ca         *testCA
	dir        string
	logs       *raft.InmemCommitTrackingStore
	snaps      *raft.InmemSnapshotStore
	stop       func()
	ended      chan error
}

type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimRight(string(b), "\n"))
	return len(b), nil
}

func newMember(t testing.TB, ca *testCA, site, name string) *member {
	m := &member{name: name, site: site, ca: ca, dir: t.TempDir(), logs: raft.NewInmemCommitTrackingStore(), snaps: raft.NewInmemSnapshotStore()}
	t.Cleanup(func() {
		if m.stop != nil {
			m.halt(t)
		}
	})
	return m
}

// start runs the member on fresh ports.
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
		Credentials: m.ca.issue(t, mesh.Identity{Cluster: "test", Site: m.site, Node: m.name}),
		Logs:        m.logs, Stable: m.logs, Snapshots: m.snaps,
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

// halt stops the member and checks that it ended well.
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
		t.Fatalf("%s does not stop", m.name)
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
	ca := newTestCA(t, "test")
	a = newMember(t, ca, "a", "a-1").start(t)
	if err := a.Bootstrap(deadline(t, 10*time.Second), []byte(testSites), "test"); err != nil {
		t.Fatal(err)
	}
	b = newMember(t, ca, "b", "b-1").start(t, a.opts.RPC)
	c = newMember(t, ca, "c", "c-1").start(t, a.opts.RPC)
	for _, m := range []*member{b, c} {
		eventually(t, m.name+" is known", 20*time.Second, func() bool { _, ok := a.State().Nodes[m.name]; return ok })
		// On a busy machine the leader may change meanwhile.
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
		// As the placement of voters does it: a voter that has nothing in its log
		// gives no vote, and so could leave nobody able to lead.
		eventually(t, m.name+" follows", 20*time.Second, change(MakeNonvoter), a, b, c)
		eventually(t, m.name+" has caught up", 20*time.Second, func() bool { _, ok := m.State().Nodes[m.name]; return ok }, a, b, c)
		eventually(t, m.name+" votes", 20*time.Second, change(MakeVoter), a, b, c)
	}
	for _, m := range []*member{a, b, c} {
		eventually(t, m.name+" holds a lease and hears the others", 20*time.Second, func() bool { return settled(m) }, m)
	}
	return a, b, c
}

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

func TestClusterFoundsJoinsAndAgrees(t *testing.T) {
	a, b, c := threeMembers(t)
	k, _ := agreed.NewAPIKey("tenant", "", nil, time.Time{}, time.Now())
	if _, err := c.Propose(deadline(t, 15*time.Second), agreed.CmdAPIKeyPut, k); err != nil {
		t.Fatal(err)
	}
	if _, ok := c.State().APIKeys[k.ID]; !ok {
		t.Error("who proposed does not read its own change")
	}
	eventually(t, "the key is everywhere", 5*time.Second, func() bool {
		_, inA := a.State().APIKeys[k.ID]
		_, inB := b.State().APIKeys[k.ID]
		return inA && inB
	})
	if _, err := b.Propose(deadline(t, 15*time.Second), agreed.CmdConfigSet, agreed.ConfigSet{Expect: 9}); !errors.Is(err, agreed.ErrVersionConflict) {
		t.Errorf("a stale change through a follower: %v, want ErrVersionConflict", err)
	}
	if err := a.Bootstrap(deadline(t, time.Second), []byte(testSites), "again"); err != nil {
		t.Errorf("bootstrap again with the same text: %v", err)
	}
	if err := a.Bootstrap(deadline(t, time.Second), []byte(testSites+"# changed\n"), "again"); !errors.Is(err, agreed.ErrAlreadyFounded) {
		t.Errorf("bootstrap again with another text: %v, want ErrAlreadyFounded", err)
	}
	free := newMember(t, a.ca, "b", "b-9").start(t, c.opts.RPC)
	if err := free.Bootstrap(deadline(t, 15*time.Second), []byte(testSites), "x"); !errors.Is(err, ErrSeedKnows) && !errors.Is(err, agreed.ErrAlreadyFounded) && err != nil {
		t.Errorf("bootstrap where a seed knows a cluster: %v", err)
	}
	if free.State().ClusterID != "" && free.State().ClusterID != a.State().ClusterID {
		t.Error("a second cluster was founded beside a seed's")
	}
}

func TestJoinIsRefusedInWords(t *testing.T) {
	a, _, _ := threeMembers(t)
	for _, tc := range []struct {
		name, site, node, words string
		ca                      *testCA
	}{
		{"an unknown site", "nowhere", "n-1", "the site is not in the configuration", a.ca},
		{"a name taken by a living node", "b", "b-1", "the name is taken by a living node", a.ca},
		{"another authority", "b", "b-2", "certificate", newTestCA(t, "test")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newMember(t, tc.ca, tc.site, tc.node).start(t, a.opts.RPC)
			eventually(t, "told why: "+tc.words, 20*time.Second, func() bool { return strings.Contains(n.Waiting(), tc.words) })
			t.Log(n.Waiting())
			if n.Membership().ClusterID != "" {
				t.Error("it joined")
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
	c.start(t) // no seeds: it remembers whom it knew
	if c.opts.RPC == old {
		t.Skip("the system gave the same port again")
	}
	eventually(t, "c-1 caught up", 20*time.Second, func() bool { return c.State().Config.Version == 2 })
	for _, m := range []*member{a, b, c} {
		eventually(t, m.name+" knows the new address", 20*time.Second, func() bool {
			return m.State().Nodes["c-1"].RPC == c.opts.RPC && settled(m)
		}, m)
	}
}

func TestAllStopAndStartInAnotherOrder(t *testing.T) {
	a, b, c := threeMembers(t)
	for _, m := range []*member{a, b, c} {
		m.halt(t)
	}
	c.start(t)
	if _, err := c.Propose(deadline(t, time.Second), agreed.CmdTick, nil); !errors.Is(err, ErrNoQuorum) {
		t.Errorf("alone: %v, want ErrNoQuorum", err)
	}
	if !c.Cold() {
		t.Error("a node that has seen no quorum is not cold")
	}
	// New ports for all, so the one that was up must be found by what the
	// others remember or by what it asks of them.
	addr := c.opts.RPC
	a.start(t, addr)
	b.start(t, addr)
	for _, m := range []*member{a, b, c} {
		eventually(t, m.name+" settled", 30*time.Second, func() bool { return settled(m) }, m)
	}
}

func TestAloneAfterARestartItServesWhatWasAgreed(t *testing.T) {
	a, b, c := threeMembers(t)
	if _, err := a.Propose(deadline(t, 15*time.Second), agreed.CmdConfigSet, agreed.ConfigSet{Expect: 1, Text: testSites + "# two\n"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "c-1 knows it", 5*time.Second, func() bool { return c.State().Config.Version == 2 })
	eventually(t, "its snapshot holds raft's configuration", 20*time.Second, func() bool {
		kept, err := c.snaps.List()
		return err == nil && len(kept) > 0 && kept[0].Index >= c.fsm.configured.Load()
	})
	for _, m := range []*member{a, b, c} {
		m.halt(t)
	}
	c.start(t)
	eventually(t, "the configuration, without a quorum", 20*time.Second, func() bool {
		s := c.State()
		return s.Config.Version == 2 && s.Parsed != nil && len(s.Nodes) == 3
	})
	if left, _ := c.Lease(); left > 0 {
		t.Error("alone, it holds a lease")
	}
}

func TestLosingQuorumEndsTheLeaseAndKeepsTheState(t *testing.T) {
	a, b, c := threeMembers(t)
	b.halt(t)
	c.halt(t)
	eventually(t, "no lease", 20*time.Second, func() bool { left, _ := a.Lease(); return left <= 0 })
	eventually(t, "no leadership", 20*time.Second, func() bool { _, leads := a.Leading(); return !leads })
	eventually(t, "changes are refused", 20*time.Second, func() bool {
		_, err := a.Propose(deadline(t, time.Second), agreed.CmdTick, nil)
		return errors.Is(err, ErrNoQuorum)
	})
	v := a.Raft()
	if v.Quorum || v.Since.IsZero() {
		t.Errorf("quorum %v since %v, want none since a moment ago", v.Quorum, v.Since)
	}
	if a.State().Config.Version != 1 {
		t.Error("the agreed state is gone")
	}
}

func TestLeadershipMovesAndIsVerified(t *testing.T) {
	a, b, c := threeMembers(t)
	for i, to := range []*member{b, c, a, c} {
		from := []*member{a, b, c}[i%3]
		if err := from.TransferLeadership(deadline(t, 10*time.Second), to.name); err != nil {
			t.Fatalf("to %s: %v", to.name, err)
		}
		if l, _ := to.leader(); l != to.name {
			t.Errorf("%s says that %q leads", to.name, l)
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
				t.Errorf("after the move to %s the task saw term %d", to.name, term)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("no word after the move to %s", to.name)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A promotion that a leader decided has an effect in its term alone, whoever it
// is handed to.
func TestPromotionCountsInItsTermAlone(t *testing.T) {
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
	for _, by := range []*member{b, c} { // passed on to the leader, and the leader's own
		if err := promote(by, term-1); !errors.Is(err, agreed.ErrStaleTerm) {
			t.Errorf("proposed by %s for the term before: %v", by.name, err)
		}
	}
	if e := c.State().Primary.Epoch; e != 1 {
		t.Fatalf("epoch %d", e)
	}
	if err := promote(c, term); err != nil {
		t.Fatal(err)
	}
	if p := c.State().Primary; p.Epoch != 2 || p.Site != "b" {
		t.Errorf("primary %+v", p)
	}
}

func TestUnknownEntryEndsTheNodeInWords(t *testing.T) {
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
			t.Errorf("ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the node goes on with a state that is not the others'")
	}
}
