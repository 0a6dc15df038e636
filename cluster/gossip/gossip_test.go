package gossip

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/test/async"
)

var testKey = []byte("0123456789abcdef")

// testGossip is a member in a test, with all times about ten times shorter.
type testGossip struct {
	*Gossip
	stop func()

	mu      sync.Mutex // guards self, changes
	self    Member
	changes []Member
}

var testStarts atomic.Int64 // makes each member's start time later than the one before

func startGossip(t *testing.T, name string, seeds []string, change func(*Options)) *testGossip {
	t.Helper()
	return startGossipIn(t, testNet{}, name, seeds, change)
}

// testNet is the network of a member.
type testNet struct {
	faults
	steady time.Duration // joinTiming.steady; 0: an hour, so that only changes cause joins
}

func startGossipIn(t *testing.T, n testNet, name string, seeds []string, change func(*Options)) *testGossip {
	t.Helper()
	if n.steady == 0 {
		n.steady = time.Hour
	}
	m := &testGossip{self: Member{
		Site: "site-of-" + name, RPC: "127.0.0.1:" + fmt.Sprint(10000+testStarts.Load()), Version: "0.1.0", PID: 7,
		StartedAt: time.UnixMilli(1764000000000 + testStarts.Add(1)).UTC(),
	}}
	o := Options{
		Name: name, Bind: "127.0.0.1:0", Key: testKey, Label: "dev/1",
		Self: func() Member {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.self
		},
		Seeds: func() []string { return seeds },
		OnChange: func(c Member) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.changes = append(m.changes, c)
		},
		Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&o)
	}
	m.Gossip = New(o)
	m.faults = n.faults
	m.timing = timing{
		probeInterval: 100 * time.Millisecond, probeTimeout: 50 * time.Millisecond, reclaim: time.Second,
		join: joinTiming{
			first: 20 * time.Millisecond, steady: n.steady,
			lost: 100 * time.Millisecond, recent: time.Minute, conflict: 100 * time.Millisecond,
		},
	}
	if err := m.Listen(); err != nil {
		t.Fatal(err)
	}
	m.stop = async.Run(t, m.Run)
	return m
}

func (m *testGossip) member(name string) (Member, bool) {
	for _, other := range m.Members() {
		if other.Name == name {
			return other, true
		}
	}
	return Member{}, false
}

func (m *testGossip) seesAs(name string, state MemberState) func() bool {
	return func() bool {
		other, ok := m.member(name)
		return ok && other.State == state
	}
}

// changed reports whether OnChange was called with such a member.
func (m *testGossip) changed(name string, matches func(Member) bool) func() bool {
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, c := range m.changes {
			if c.Name == name && matches(c) {
				return true
			}
		}
		return false
	}
}

func TestMembersJoinChangeAndLeave(t *testing.T) {
	async.NoLeaks(t)
	a := startGossip(t, "a", nil, nil)
	_, port, err := net.SplitHostPort(a.Addr())
	if err != nil || port == "0" {
		t.Fatalf("bound to %q, %v", a.Addr(), err)
	}
	b := startGossip(t, "b", []string{"localhost:" + port}, nil) // a DNS name
	c := startGossip(t, "c", []string{a.Addr()}, func(o *Options) { o.LeaveOnStop = true })
	all := []*testGossip{a, b, c}
	for _, m := range all {
		for _, name := range []string{"a", "b", "c"} {
			async.Await(t, m.opts.Name+" to see "+name, m.seesAs(name, MemberAlive))
		}
	}
	got, _ := a.member("b")
	want := b.self
	want.Name, want.State, want.Since, want.Gossip = "b", MemberAlive, got.Since, b.Addr()
	if !got.equal(want) || time.Since(got.Since) > time.Minute {
		t.Errorf("a sees %+v, want %+v", got, want)
	}
	async.Await(t, "a's OnChange to be called for b", a.changed("b", func(m Member) bool { return m.equal(want) }))

	b.mu.Lock()
	b.self.Draining = true
	b.mu.Unlock()
	b.Update()
	async.Await(t, "c to see b draining", c.changed("b", func(m Member) bool { return m.Draining && m.State == MemberAlive }))

	c.stop()
	async.Await(t, "a to see that c left", a.changed("c", func(m Member) bool { return m.State == MemberLeft }))

	b.stop() // without announcing it
	async.Await(t, "a to suspect b", a.changed("b", func(m Member) bool { return m.State == MemberSuspect }))
	async.Await(t, "a to see b dead", a.seesAs("b", MemberDead))
	async.Await(t, "the metrics", func() bool {
		dead := testutil.ToFloat64(a.metrics.members.WithLabelValues("dead"))
		left := testutil.ToFloat64(a.metrics.members.WithLabelValues("left"))
		alive := testutil.ToFloat64(a.metrics.members.WithLabelValues("alive"))
		return dead == 1 && left == 1 && alive == 1
	})
}

// A node that was killed and restarts with other ports is known by its new address at
// once; memberlist accepts it later.
func TestRestartWithNewPorts(t *testing.T) {
	async.NoLeaks(t)
	a := startGossip(t, "a", nil, nil)
	b := startGossip(t, "b", []string{a.Addr()}, nil)
	old := startGossip(t, "c", []string{a.Addr()}, nil)
	async.Await(t, "a to see c", a.seesAs("c", MemberAlive))
	async.Await(t, "b to see c", b.seesAs("c", MemberAlive))
	old.stop()

	again := startGossip(t, "c", []string{a.Addr()}, nil)
	for _, m := range []*testGossip{a, b} {
		async.Await(t, m.opts.Name+" to see the new address", m.changed("c", func(c Member) bool {
			return c.RPC == again.self.RPC && c.State == MemberAlive
		}))
		async.Await(t, m.opts.Name+"'s memberlist to accept the new address", func() bool {
			m.table.mu.Lock()
			defer m.table.mu.Unlock()
			e := m.table.entries["c"]
			return e.addr.String() == again.Addr() && e.member.State == MemberAlive
		})
		if got, _ := m.member("c"); got.RPC != again.self.RPC || got.State != MemberAlive {
			t.Errorf("%s sees %+v", m.opts.Name, got)
		}
	}
}

func TestMembersRejoinAfterAPartition(t *testing.T) {
	async.NoLeaks(t)
	var cut atomic.Bool
	a := startGossip(t, "a", nil, nil)
	b := startGossipIn(t, testNet{faults: faults{dropPacket: cut.Load, refuseStream: cut.Load}}, "b", []string{a.Addr()}, nil)
	async.Await(t, "a to see b", a.seesAs("b", MemberAlive))
	async.Await(t, "b to see a", b.seesAs("a", MemberAlive))
	cut.Store(true)
	async.Await(t, "a to see b dead", a.seesAs("b", MemberDead))
	async.Await(t, "b to see a dead", b.seesAs("a", MemberDead))
	cut.Store(false)
	async.Await(t, "a to see b again", a.seesAs("b", MemberAlive))
	async.Await(t, "b to see a again", b.seesAs("a", MemberAlive))
}

// A site that refuses the others sees only its own nodes alive, although all nodes
// have the same IP address.
func TestIsolatedSite(t *testing.T) {
	async.NoLeaks(t)
	var isolated atomic.Bool
	admit := func(site string) error {
		if isolated.Load() && site != "site-of-a" {
			return errors.New("isolated")
		}
		return nil
	}
	a := startGossipIn(t, testNet{steady: 200 * time.Millisecond}, "a", nil, func(o *Options) { o.Admit = admit })
	near := startGossipIn(t, testNet{steady: 200 * time.Millisecond}, "near", []string{a.Addr()}, func(o *Options) {
		o.Admit = admit
		self := o.Self
		o.Self = func() Member {
			m := self()
			m.Site = "site-of-a"
			return m
		}
	})
	far := startGossipIn(t, testNet{steady: 200 * time.Millisecond}, "far", []string{a.Addr()}, nil)
	awaitState := func(state MemberState) {
		t.Helper()
		for _, m := range []*testGossip{a, near} {
			async.Await(t, m.opts.Name+" to see far as "+string(state), m.seesAs("far", state))
			async.Await(t, "far to see "+m.opts.Name+" as "+string(state), far.seesAs(m.opts.Name, state))
		}
	}
	awaitState(MemberAlive)
	isolated.Store(true)
	a.CloseRefused()
	near.CloseRefused()
	awaitState(MemberDead)
	if !a.seesAs("near", MemberAlive)() || !near.seesAs("a", MemberAlive)() {
		t.Error("nodes of the isolated site do not see each other alive")
	}
	isolated.Store(false)
	awaitState(MemberAlive)
}

// A firewall that drops UDP leaves all members alive: a metric shows it, and the age of
// the last answer.
func TestBlockedUDPShowsAsAMetric(t *testing.T) {
	async.NoLeaks(t)
	var blocked atomic.Bool
	blocked.Store(true)
	a := startGossip(t, "a", nil, nil)
	b := startGossipIn(t, testNet{faults: faults{dropPacket: blocked.Load}}, "b", []string{a.Addr()}, nil)
	async.Await(t, "a to see b", a.seesAs("b", MemberAlive))
	async.Await(t, "the metric to rise", func() bool {
		return testutil.ToFloat64(a.metrics.udpBlocked) == 1 && testutil.ToFloat64(a.metrics.tcpOnly) >= 1
	})
	if got, _ := b.member("a"); got.State != MemberAlive {
		t.Errorf("b sees a as %s, want alive", got.State)
	}
	if ago, ever := a.UDPAgo("b"); ever {
		t.Errorf("b answered a UDP packet %v ago, and it has received none", ago)
	}
	blocked.Store(false)
	async.Await(t, "the metric to fall", func() bool { return testutil.ToFloat64(a.metrics.udpBlocked) == 0 })
	answers := func(m *testGossip, of string) func() bool {
		return func() bool { ago, ever := m.UDPAgo(of); return ever && ago < 250*time.Millisecond }
	}
	async.Await(t, "a to get answers over UDP", answers(a, "b"))
	async.Await(t, "b to get answers over UDP", answers(b, "a"))
	blocked.Store(true)
	async.Await(t, "the age of b's last answer to grow", func() bool { ago, _ := a.UDPAgo("b"); return ago > time.Second })
}

// Nodes with another generation's label or another key do not become members.
func TestNodesWithAnotherLabelOrKeyAreIgnored(t *testing.T) {
	async.NoLeaks(t)
	var log lockedBuffer
	a := startGossip(t, "a", nil, func(o *Options) {
		o.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	b := startGossip(t, "b", []string{a.Addr()}, func(o *Options) { o.Label = "dev/2" })
	c := startGossip(t, "c", []string{a.Addr()}, func(o *Options) { o.Key = []byte("another key, 16!") })
	for _, m := range []*testGossip{b, c} {
		async.Await(t, m.opts.Name+"'s joins to fail", func() bool {
			return testutil.ToFloat64(m.metrics.joins.WithLabelValues("failed")) >= 2
		})
	}
	for _, m := range []*testGossip{a, b, c} {
		if n := len(m.Members()); n != 1 {
			t.Errorf("%s sees %d members, want only itself", m.opts.Name, n)
		}
	}
	if text := log.String(); !strings.Contains(text, "reason=label") || !strings.Contains(text, "level=WARN") {
		t.Errorf("the log has no warning about the label:\n%s", text)
	}
	for _, secret := range []string{string(testKey), hex.EncodeToString(testKey), fmt.Sprint(testKey)} {
		if strings.Contains(log.String(), secret) {
			t.Error("the log contains the key")
		}
	}
}

// lockedBuffer is a bytes.Buffer for concurrent use.
type lockedBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// Nodes may start in any order: a seed that does not run yet is joined later.
func TestSeedIsJoinedWhenItStartsLater(t *testing.T) {
	async.NoLeaks(t)
	reserved, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := reserved.Addr().String()
	b := startGossipIn(t, testNet{steady: 100 * time.Millisecond}, "b", []string{"no-such-host.invalid:1", addr}, nil)
	if err := reserved.Close(); err != nil {
		t.Fatal(err)
	}
	a := startGossip(t, "a", nil, func(o *Options) { o.Bind = addr })
	async.Await(t, "b to find a", b.seesAs("a", MemberAlive))
	async.Await(t, "a to see b", a.seesAs("b", MemberAlive))
	joins := testutil.ToFloat64(b.metrics.joins.WithLabelValues("met"))
	async.Await(t, "the name to be looked up again", func() bool {
		return testutil.ToFloat64(b.metrics.joins.WithLabelValues("unresolved")) >= 3
	})
	if got := testutil.ToFloat64(b.metrics.joins.WithLabelValues("met")); got != joins {
		t.Errorf("a seed that is alive was joined %v times more", got-joins)
	}
}

func TestRunRefusesInvalidOptions(t *testing.T) {
	async.NoLeaks(t)
	for _, tc := range []struct {
		name   string
		change func(*Options)
		err    string
	}{
		{"no key", func(o *Options) { o.Key = nil }, "must have 16, 24 or 32"},
		{"long label", func(o *Options) { o.Label = strings.Repeat("x", 256) }, "at most 255"},
		{"invalid name", func(o *Options) { o.Name = "a b" }, "may hold letters"},
		{"nothing to advertise", func(o *Options) { o.Bind = ":0" }, "the address to advertise"},
		{"no port to advertise", func(o *Options) { o.Advertise = "example.com" }, "missing port"},
		{"metadata too long", func(o *Options) {
			o.Self = func() Member {
				return Member{RPC: strings.Repeat("r", 250), API: strings.Repeat("r", 250), Admin: strings.Repeat("r", 250)}
			}
		}, "shorten the advertised addresses"},
		{"a bind address that does not exist", func(o *Options) { o.Bind = "256.256.256.256:1" }, "gossip:"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := Options{
				Name: "a", Bind: "127.0.0.1:0", Key: testKey, Logger: slog.New(slog.DiscardHandler),
				Self: func() Member { return Member{} }, Seeds: func() []string { return nil },
			}
			tc.change(&o)
			if err := New(o).Run(async.Context(t)); err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("got %v, want an error with %q", err, tc.err)
			}
		})
	}
}

func TestStreamsAreBounded(t *testing.T) {
	async.NoLeaks(t)
	a := startGossip(t, "a", nil, nil)
	var mu sync.Mutex
	closed := 0
	var readers sync.WaitGroup
	for range maxStreams + 10 { // of an address that is no member's
		raw, err := net.Dial("tcp", a.Addr())
		if err != nil {
			t.Fatal(err)
		}
		readers.Go(func() {
			_, _ = io.Copy(io.Discard, raw) // sends nothing, like a port scanner
			mu.Lock()
			closed++
			mu.Unlock()
		})
		t.Cleanup(func() { _ = raw.Close() })
	}
	t.Cleanup(readers.Wait)
	async.Await(t, "ten streams to be refused", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return closed == 10 && testutil.ToFloat64(a.metrics.streamsRefused) == 10
	})
	a.stop()
	readers.Wait() // the other streams end with gossip
}

func TestDelayBetweenJoins(t *testing.T) {
	timing := defaultJoinTiming
	for _, tc := range []struct {
		name string
		s    joinState
		last time.Duration
		want time.Duration
	}{
		{"all members alive", joinState{}, time.Second, 30 * time.Second},
		{"alone, first attempt", joinState{alone: true}, 0, time.Second},
		{"alone, later attempt", joinState{alone: true}, 4 * time.Second, 8 * time.Second},
		{"alone, longest delay", joinState{alone: true}, 20 * time.Second, 30 * time.Second},
		{"a member was lost", joinState{recentlyLost: true}, 30 * time.Second, 5 * time.Second},
		{"all members were lost", joinState{recentlyLost: true, alone: true}, 30 * time.Second, 5 * time.Second},
		{"name conflict", joinState{conflict: true, alone: true, recentlyLost: true}, 30 * time.Second, 3 * time.Second},
	} {
		if got := timing.delay(tc.s, tc.last); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

func TestLogLines(t *testing.T) {
	for _, tc := range []struct {
		line  string
		level slog.Level
		text  string
		kind  string
	}{
		{"[DEBUG] memberlist: Stream connection from=127.0.0.1:1\n", slog.LevelDebug, "Stream connection from=127.0.0.1:1", "Stream connection from="},
		{"[INFO] memberlist: Suspect a-1 has failed, no acks received", slog.LevelDebug, "Suspect a-1 has failed, no acks received", "Suspect a-"},
		{"[WARN] memberlist: Refuting a dead message (from: b)", slog.LevelWarn, "Refuting a dead message (from: b)", "Refuting a dead message (from"},
		{"[ERR] memberlist: Conflicting address for a. Mine: 1", slog.LevelWarn, "Conflicting address for a. Mine: 1", "Conflicting address for a. Mine"},
		{"Err: Could not set the deadline: x", slog.LevelWarn, "Err: Could not set the deadline: x", "Err"},
		{"", slog.LevelWarn, "", ""},
	} {
		level, text := parseLogLine(tc.line)
		if level != tc.level || text != tc.text || logKind(text) != tc.kind {
			t.Errorf("%q: got level %v, text %q, kind %q", tc.line, level, text, logKind(text))
		}
	}
	if _, text := parseLogLine(strings.Repeat("ü", 1000)); len(text) > maxLogLine+10 {
		t.Errorf("a long line was cut to %d bytes, want at most %d", len(text), maxLogLine+10)
	}
}

// Run ends without an error when it is stopped while it can't resolve the advertised
// name.
func TestStopWhileResolvingTheAdvertisedName(t *testing.T) {
	async.NoLeaks(t)
	g := New(Options{
		Name: "a", Bind: "127.0.0.1:0", Advertise: "no-such-host.invalid:7956", Key: testKey, Logger: slog.New(slog.DiscardHandler),
		Self: func() Member { return Member{} }, Seeds: func() []string { return nil },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	async.Await(t, "the port to be bound", func() bool { return g.Addr() != "" })
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
