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

// testGossip is a member of a test, with everything ten times faster.
type testGossip struct {
	*Gossip
	stop func()

	mu      sync.Mutex // guards self, changes
	self    Member
	changes []Member
}

var testStarts atomic.Int64 // so that each start is later than the one before

func startGossip(t *testing.T, name string, seeds []string, change func(*Options)) *testGossip {
	t.Helper()
	return startGossipIn(t, testNet{}, name, seeds, change)
}

// testNet is what a member's surroundings are like.
type testNet struct {
	faults
	steady time.Duration // 0: an hour, so that only what happens causes meetings
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
		rejoin: rejoinTiming{
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

func (m *testGossip) sees(name string) (Member, bool) {
	for _, other := range m.Members() {
		if other.Name == name {
			return other, true
		}
	}
	return Member{}, false
}

func (m *testGossip) seesAs(name string, state MemberState) func() bool {
	return func() bool {
		other, ok := m.sees(name)
		return ok && other.State == state
	}
}

func (m *testGossip) changed(name string, what func(Member) bool) func() bool {
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, c := range m.changes {
			if c.Name == name && what(c) {
				return true
			}
		}
		return false
	}
}

func TestMembersComeChangeAndGo(t *testing.T) {
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
	got, _ := a.sees("b")
	want := b.self
	want.Name, want.State, want.Since, want.Gossip = "b", MemberAlive, got.Since, b.Addr()
	if !got.equal(want) || time.Since(got.Since) > time.Minute {
		t.Errorf("a sees %+v, want %+v", got, want)
	}
	async.Await(t, "a to be told of b", a.changed("b", func(m Member) bool { return m.equal(want) }))

	b.mu.Lock()
	b.self.Draining = true
	b.mu.Unlock()
	b.Update()
	async.Await(t, "c to hear that b drains", c.changed("b", func(m Member) bool { return m.Draining && m.State == MemberAlive }))

	c.stop()
	async.Await(t, "a to see that c left", a.changed("c", func(m Member) bool { return m.State == MemberLeft }))

	b.stop() // without a word
	async.Await(t, "a to suspect b", a.changed("b", func(m Member) bool { return m.State == MemberSuspect }))
	async.Await(t, "a to see b dead", a.seesAs("b", MemberDead))
	async.Await(t, "the metrics", func() bool {
		dead := testutil.ToFloat64(a.metrics.members.WithLabelValues("dead"))
		left := testutil.ToFloat64(a.metrics.members.WithLabelValues("left"))
		alive := testutil.ToFloat64(a.metrics.members.WithLabelValues("alive"))
		return dead == 1 && left == 1 && alive == 1
	})
}

// A node that was killed and comes back under its name with other ports is
// known by its new address at once, and taken in by memberlist in the end.
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
		async.Await(t, m.opts.Name+" to hear the new address", m.changed("c", func(c Member) bool {
			return c.RPC == again.self.RPC && c.State == MemberAlive
		}))
		async.Await(t, m.opts.Name+"'s memberlist to take it in", func() bool {
			m.table.mu.Lock()
			defer m.table.mu.Unlock()
			e := m.table.entries["c"]
			return e.addr.String() == again.Addr() && e.member.State == MemberAlive
		})
		if got, _ := m.sees("c"); got.RPC != again.self.RPC || got.State != MemberAlive {
			t.Errorf("%s sees %+v", m.opts.Name, got)
		}
	}
}

func TestPartitionHealsByItself(t *testing.T) {
	async.NoLeaks(t)
	var cut atomic.Bool
	a := startGossip(t, "a", nil, nil)
	b := startGossipIn(t, testNet{faults: faults{losePacket: cut.Load, refuseStream: cut.Load}}, "b", []string{a.Addr()}, nil)
	async.Await(t, "a to see b", a.seesAs("b", MemberAlive))
	async.Await(t, "b to see a", b.seesAs("a", MemberAlive))
	cut.Store(true)
	async.Await(t, "a to give b up", a.seesAs("b", MemberDead))
	async.Await(t, "b to give a up", b.seesAs("a", MemberDead))
	cut.Store(false)
	async.Await(t, "a to see b again", a.seesAs("b", MemberAlive))
	async.Await(t, "b to see a again", b.seesAs("a", MemberAlive))
}

// A firewall that drops UDP leaves everybody alive, and somebody must say so.
// A site that cuts itself off hears its own nodes and nobody else, though all of
// them are at the same IP address.
func TestSiteCutsItselfOff(t *testing.T) {
	async.NoLeaks(t)
	var cut atomic.Bool
	admit := func(site string) error {
		if cut.Load() && site != "site-of-a" {
			return errors.New("cut off")
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
	all := func(state MemberState) {
		t.Helper()
		for _, m := range []*testGossip{a, near} {
			async.Await(t, m.opts.Name+" to see far as "+string(state), m.seesAs("far", state))
			async.Await(t, "far to see "+m.opts.Name+" as "+string(state), far.seesAs(m.opts.Name, state))
		}
	}
	all(MemberAlive)
	cut.Store(true)
	a.CloseRefused()
	near.CloseRefused()
	all(MemberDead)
	if !a.seesAs("near", MemberAlive)() || !near.seesAs("a", MemberAlive)() {
		t.Error("neighbours of one site lost each other")
	}
	cut.Store(false)
	all(MemberAlive)
}

func TestBlockedUDPShowsAsAMetric(t *testing.T) {
	async.NoLeaks(t)
	var blocked atomic.Bool
	blocked.Store(true)
	a := startGossip(t, "a", nil, nil)
	b := startGossipIn(t, testNet{faults: faults{losePacket: blocked.Load}}, "b", []string{a.Addr()}, nil)
	async.Await(t, "a to see b", a.seesAs("b", MemberAlive))
	async.Await(t, "the metric to rise", func() bool {
		return testutil.ToFloat64(a.metrics.udpBlocked) == 1 && testutil.ToFloat64(a.metrics.tcpOnly) >= 1
	})
	if got, _ := b.sees("a"); got.State != MemberAlive {
		t.Errorf("b sees a as %s", got.State)
	}
	blocked.Store(false)
	async.Await(t, "the metric to fall", func() bool { return testutil.ToFloat64(a.metrics.udpBlocked) == 0 })
}

// Another generation's label, and another key, are another world.
func TestOthersAreNotHeard(t *testing.T) {
	async.NoLeaks(t)
	var log lockedBuffer
	a := startGossip(t, "a", nil, func(o *Options) {
		o.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	b := startGossip(t, "b", []string{a.Addr()}, func(o *Options) { o.Label = "dev/2" })
	c := startGossip(t, "c", []string{a.Addr()}, func(o *Options) { o.Key = []byte("another key, 16!") })
	for _, m := range []*testGossip{b, c} {
		async.Await(t, m.opts.Name+" to fail", func() bool {
			return testutil.ToFloat64(m.metrics.joins.WithLabelValues("failed")) >= 2
		})
	}
	for _, m := range []*testGossip{a, b, c} {
		if n := len(m.Members()); n != 1 {
			t.Errorf("%s sees %d members", m.opts.Name, n)
		}
	}
	if text := log.String(); !strings.Contains(text, "unacceptable label") || !strings.Contains(text, "level=WARN") {
		t.Errorf("nothing about the label in the log:\n%s", text)
	}
	for _, secret := range []string{string(testKey), hex.EncodeToString(testKey), fmt.Sprint(testKey)} {
		if strings.Contains(log.String(), secret) {
			t.Error("the key is in the log")
		}
	}
}

// lockedBuffer takes log lines of many goroutines.
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

// Nodes start in any order: a seed that is not there yet is found later.
func TestSeedsMayComeLater(t *testing.T) {
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
		t.Errorf("a seed that is heard was met %v times more", got-joins)
	}
}

func TestRefusesToRun(t *testing.T) {
	async.NoLeaks(t)
	for _, tc := range []struct {
		name   string
		change func(*Options)
		err    string
	}{
		{"no key", func(o *Options) { o.Key = nil }, "must have 16, 24 or 32"},
		{"long label", func(o *Options) { o.Label = strings.Repeat("x", 256) }, "at most 255"},
		{"odd name", func(o *Options) { o.Name = "a b" }, "may hold letters"},
		{"nothing to advertise", func(o *Options) { o.Bind = ":0" }, "which address to advertise"},
		{"no port to advertise", func(o *Options) { o.Advertise = "example.com" }, "missing port"},
		{"too much to say", func(o *Options) {
			o.Self = func() Member {
				return Member{RPC: strings.Repeat("r", 250), API: strings.Repeat("r", 250), Admin: strings.Repeat("r", 250)}
			}
		}, "shorten the advertised addresses"},
		{"no address", func(o *Options) { o.Bind = "256.256.256.256:1" }, "gossip:"},
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
	for range gossipStreamsMax + 10 {
		raw, err := net.Dial("tcp", a.Addr())
		if err != nil {
			t.Fatal(err)
		}
		readers.Go(func() {
			_, _ = io.Copy(io.Discard, raw) // says nothing, like a scanner
			mu.Lock()
			closed++
			mu.Unlock()
		})
		t.Cleanup(func() { _ = raw.Close() })
	}
	t.Cleanup(readers.Wait)
	async.Await(t, "ten to be refused", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return closed == 10 && testutil.ToFloat64(a.metrics.streamsRefused) == 10
	})
	a.stop()
	readers.Wait() // the end of gossip is the end of the others
}

func TestPauseBetweenMeetings(t *testing.T) {
	r := defaultRejoinTiming
	for _, tc := range []struct {
		name string
		v    meeting
		last time.Duration
		want time.Duration
	}{
		{"everybody is heard", meeting{}, time.Second, 30 * time.Second},
		{"alone, at first", meeting{alone: true}, 0, time.Second},
		{"alone, later", meeting{alone: true}, 4 * time.Second, 8 * time.Second},
		{"alone for long", meeting{alone: true}, 20 * time.Second, 30 * time.Second},
		{"somebody was lost", meeting{newly: true}, 30 * time.Second, 5 * time.Second},
		{"everybody was lost", meeting{newly: true, alone: true}, 30 * time.Second, 5 * time.Second},
		{"the own name in dispute", meeting{conflict: true, alone: true, newly: true}, 30 * time.Second, 3 * time.Second},
	} {
		if got := r.pause(tc.v, tc.last); got != tc.want {
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
		level, text := splitLogLine(tc.line)
		if level != tc.level || text != tc.text || logKind(text) != tc.kind {
			t.Errorf("%q: %v %q %q", tc.line, level, text, logKind(text))
		}
	}
	if _, text := splitLogLine(strings.Repeat("ü", 1000)); len(text) > gossipLogMax+10 {
		t.Errorf("a line of %d bytes", len(text))
	}
}

// A stop in the middle of a name that does not resolve is a stop.
func TestStopsBeforeItBegan(t *testing.T) {
	async.NoLeaks(t)
	g := New(Options{
		Name: "a", Bind: "127.0.0.1:0", Advertise: "no-such-host.invalid:7956", Key: testKey, Logger: slog.New(slog.DiscardHandler),
		Self: func() Member { return Member{} }, Seeds: func() []string { return nil },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	async.Await(t, "it to be bound", func() bool { return g.Addr() != "" })
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
