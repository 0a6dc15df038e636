package cluster

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/config"
)

// writes gives the slow ones of writes that follow each other until now, each with the
// time for which nothing is written after it.
func writes(now time.Duration, newestFirst ...time.Duration) []span {
	limit := SlowWrite(config.TimingFrom(0))
	var slow []span
	at := now
	for i := 0; i < len(newestFirst); i += 2 {
		at -= newestFirst[i+1]
		if s := (span{at - newestFirst[i], at}); s.to-s.from > limit {
			slow = append([]span{s}, slow...)
		}
		at -= newestFirst[i]
	}
	return slow
}

func times(n int, some ...time.Duration) []time.Duration {
	var all []time.Duration
	for range n {
		all = append(all, some...)
	}
	return all
}

func TestJudgeDisk(t *testing.T) {
	const (
		ms  = time.Millisecond
		now = time.Hour
	)
	for _, tc := range []struct {
		name        string
		was         bool
		newestFirst []time.Duration // write, pause after it, ...
		slow        bool
	}{
		{"nothing written", false, nil, false},
		{"fast writes, one per tick", false, times(80, 5*ms, 245*ms), false},
		{"writes of almost the limit without a pause", false, times(100, 239*ms, 0), false},
		{"slow writes without a pause", false, times(20, 400*ms, 0), true},
		{"slow writes of two seconds", false, times(5, 400*ms, 0), false},
		{"slow writes of two seconds and a half", false, times(10, 250*ms, 0), true},
		{"slow writes that ended two seconds ago", false, append([]time.Duration{5 * ms, 1995 * ms}, times(20, 400*ms, 0)...), false},
		{"it hung once for two seconds", false, append([]time.Duration{5 * ms, 245 * ms, 2000 * ms, 0}, times(20, 5*ms, 245*ms)...), false},
		{"it has hung for two seconds and a half", false, []time.Duration{2500 * ms, 0}, true},
		{"slow and fast writes alternate, a lease runs out between them", false, times(20, 700*ms, 0, 5*ms, 200*ms), true},
		{"a slow write each second", false, times(20, 300*ms, 700*ms), false},

		{"it was slow and still is", true, times(60, 400*ms, 0), true},
		{"it was slow, it became fast just now", true, append(times(12, 5*ms, 245*ms), times(60, 400*ms, 0)...), true},
		{"it was slow until twenty seconds ago", true, append(times(80, 5*ms, 245*ms), times(60, 400*ms, 0)...), false},
		{"it was slow, and each second a write is", true, times(20, 300*ms, 700*ms), true},
		{"it was slow, and a write in five seconds is", true, times(20, 300*ms, 4700*ms), false},
		{"it was slow, and nothing is written", true, nil, false},
	} {
		if slow := judgeDisk(tc.was, writes(now, tc.newestFirst...), now, config.TimingFrom(0)); slow != tc.slow {
			t.Errorf("%s: slow %v, want %v", tc.name, slow, tc.slow)
		}
	}
}

func TestClearlyFaster(t *testing.T) {
	fast := DiskSpeed{Known: true, Write: 5 * time.Millisecond}
	slow := func(write time.Duration) DiskSpeed { return DiskSpeed{Known: true, Write: write, SlowFor: time.Minute} }
	for _, tc := range []struct {
		name          string
		voter, leader DiskSpeed
		want          bool
	}{
		{"a fast voter", fast, slow(400 * time.Millisecond), true},
		{"an earlier version that reports nothing", DiskSpeed{}, slow(400 * time.Millisecond), true},
		{"both are as slow", slow(400 * time.Millisecond), slow(400 * time.Millisecond), false},
		{"the voter is slow too, and takes a third", slow(400 * time.Millisecond), slow(1200 * time.Millisecond), false},
		{"the voter is slow too, and takes a fifth", slow(400 * time.Millisecond), slow(2 * time.Second), true},
		{"a slow voter of unknown speed", DiskSpeed{SlowFor: time.Second}, slow(2 * time.Second), false},
	} {
		if got := clearlyFaster(tc.voter, tc.leader); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// meterAt is a meter whose clock the test sets.
func meterAt(now *time.Duration) *diskMeter {
	return newDiskMeter(func() config.Timing { return config.TimingFrom(0) }, func() time.Duration { return *now })
}

func TestDiskMeter(t *testing.T) {
	now := time.Hour
	m := meterAt(&now)
	failure := errors.New("the disk failed")
	write := func(took time.Duration) {
		t.Helper()
		err := m.measure(func() error {
			for end := now + took; now < end; now += min(100*time.Millisecond, end-now) {
				m.judge()
			}
			return failure
		})
		if !errors.Is(err, failure) {
			t.Errorf("the write's error is %v", err)
		}
		m.judge()
	}
	pause := func(d time.Duration) { now += d; m.judge() }
	if s := m.speed(); s.Known || s.SlowFor != 0 {
		t.Errorf("before the first write: %+v", s)
	}
	for range 20 {
		write(4 * time.Millisecond)
		pause(246 * time.Millisecond)
	}
	if s := m.speed(); !s.Known || s.Write != 4*time.Millisecond || s.SlowFor != 0 {
		t.Errorf("a fast disk: %+v", s)
	}
	begun := now
	for range 20 {
		write(400 * time.Millisecond)
	}
	if s := m.speed(); !s.Known || s.Write != 400*time.Millisecond || s.SlowFor != now-begun {
		t.Errorf("a disk that has been slow for %v: %+v", now-begun, s)
	}
	fast := now
	for range 200 {
		if m.speed().SlowFor == 0 {
			break
		}
		write(4 * time.Millisecond)
		pause(246 * time.Millisecond)
	}
	if took := now - fast; m.speed().SlowFor != 0 || took < 15*time.Second || took > 20*time.Second {
		t.Errorf("%+v, %v after the disk became fast; want that after 15 to 20 s", m.speed(), took)
	}
	now += stale
	if m.judge(); m.speed().Known {
		t.Errorf("nothing was written for %v: %+v", stale, m.speed())
	}
}

// A write in progress counts before it has ended, and time in which the process did not
// run does not.
func TestDiskMeterOfAWriteInProgress(t *testing.T) {
	now := time.Hour
	m := meterAt(&now)
	m.judge()
	_ = m.measure(func() error {
		for range 12 {
			now += 250 * time.Millisecond
			m.judge()
		}
		if s := m.speed(); s.SlowFor != 3*time.Second || !s.Known || s.Write != 3*time.Second {
			t.Errorf("a write has lasted for 3 s: %+v", s)
		}
		return nil
	})
	m = meterAt(&now)
	m.judge()
	_ = m.measure(func() error {
		now += time.Minute // the process was stopped
		m.judge()
		now += 100 * time.Millisecond
		if m.judge(); m.speed().SlowFor != 0 {
			t.Errorf("the process was stopped during a write: %+v", m.speed())
		}
		return nil
	})
	if m.judge(); m.speed().SlowFor != 0 || m.speed().Write != 100*time.Millisecond {
		t.Errorf("after the write: %+v", m.speed())
	}
}

func TestANodeThatStandsBackAsksForNoPreVote(t *testing.T) {
	back := true
	v := &voterTransport{yields: func() bool { return back }}
	var resp raft.RequestPreVoteResponse
	if err := v.RequestPreVote("b-1", "b-1", &raft.RequestPreVoteRequest{}, &resp); !errors.Is(err, errStandsBack) || resp.Granted {
		t.Errorf("asked for a pre-vote: %v, granted %v", err, resp.Granted)
	}
}

// A leader with a slow disk hands over to a voter that keeps up. It does not lead while
// its disk is slow, also when the next leader stops, and is judged fast later.
func TestALeaderWithASlowDiskHandsOver(t *testing.T) {
	a, b, c := threeMembers(t)
	eventually(t, "a-1 leads", 20*time.Second, func() bool {
		for _, m := range []*member{b, c} {
			if m.Raft().Leads {
				_ = m.TransferLeadership(deadline(t, 5*time.Second), "a-1") // another election: try again
			}
		}
		return a.Raft().Leads && settled(a)
	}, a, b, c)
	a.logs.takes.Store(int64(a.Timing().Lease / 3))
	next := func() *member {
		for _, m := range []*member{b, c} {
			if _, leads := m.Leading(); leads {
				return m
			}
		}
		return nil
	}
	begun := time.Now()
	eventually(t, "another member leads", 20*time.Second, func() bool { return next() != nil }, a, b, c)
	t.Logf("another member leads %v after the disk became slow", time.Since(begun))
	eventually(t, "the others know that a-1's disk is slow", 20*time.Second, func() bool {
		return b.Peers()["a-1"].Disk.SlowFor > 0 && c.Peers()["a-1"].Disk.SlowFor > 0 && a.DiskSpeed().SlowFor > 0
	}, a)
	gone := next()
	gone.halt(t)
	rest := b
	if gone == b {
		rest = c
	}
	eventually(t, rest.name+" leads after "+gone.name, 20*time.Second, func() bool { _, leads := rest.Leading(); return leads }, a, rest)
	if a.DiskSpeed().SlowFor == 0 {
		t.Error("a-1's disk does not count as slow")
	}
	a.logs.takes.Store(0)
	eventually(t, "a-1's disk counts as fast", time.Minute, func() bool {
		return a.DiskSpeed().SlowFor == 0 && rest.Peers()["a-1"].Disk.SlowFor == 0
	}, a)
}

// A leader whose writes take very long can't hand over, because raft's main loop waits for
// them. It blocks its transport, and the others elect a leader.
func TestALeaderThatCannotHandOverIsReplaced(t *testing.T) {
	a, b, c := threeMembers(t)
	all := []*member{a, b, c}
	leader := func(of ...*member) *member {
		for _, m := range of {
			if _, leads := m.Leading(); leads {
				return m
			}
		}
		return nil
	}
	var old *member
	eventually(t, "a member leads", 20*time.Second, func() bool { old = leader(all...); return old != nil }, all...)
	old.logs.takes.Store(int64(time.Minute))
	others := slices.DeleteFunc(slices.Clone(all), func(m *member) bool { return m == old })
	eventually(t, "another member leads", 20*time.Second, func() bool { return leader(others...) != nil }, all...)
	old.logs.takes.Store(0)
	eventually(t, old.name+" follows", 20*time.Second, func() bool {
		next := leader(others...)
		return next != nil && old.Raft().Leader == next.name && !old.layer.blocked() && settled(old)
	}, all...)
}

// One of three members has stopped, so that all entries need both others: the leadership
// stays, because another leader's entries would wait for the slow disk too.
func TestLeadershipStaysWhenTheSlowDiskIsNeeded(t *testing.T) {
	a, b, c := threeMembers(t)
	c.halt(t)
	for _, m := range []*member{a, b} {
		other := b
		if m == b {
			other = a
		}
		eventually(t, m.name+" hears no "+c.name, 20*time.Second, func() bool {
			p := m.Peers()
			return !p[c.name].HeardWithin(m.Timing().Lease) && p[other.name].HeardWithin(m.Timing().Lease)
		}, a, b)
		if to := m.fasterVoter(); to != "" {
			t.Errorf("%s would hand over to %s", m.name, to)
		}
	}
}

// While all disks are equally slow, the leadership stays where it is.
func TestLeadershipStaysWhenAllDisksAreSlow(t *testing.T) {
	a, b, c := threeMembers(t)
	for _, m := range []*member{a, b, c} {
		// Slow, but so that ticks are committed.
		m.logs.takes.Store(int64(SlowWrite(m.Timing()) + 10*time.Millisecond))
	}
	eventually(t, "all disks count as slow", 30*time.Second, func() bool {
		return a.DiskSpeed().SlowFor > 0 && b.DiskSpeed().SlowFor > 0 && c.DiskSpeed().SlowFor > 0
	}, a, b, c)
	for _, m := range []*member{a, b, c} {
		eventually(t, m.name+" knows that", 20*time.Second, func() bool {
			for _, p := range m.Peers() {
				if p.Disk.SlowFor == 0 {
					return false
				}
			}
			return true
		}, m)
		if to := m.fasterVoter(); to != "" {
			t.Errorf("%s would hand over to %s", m.name, to)
		}
		if m.standsBack() {
			t.Errorf("%s leaves elections to others", m.name)
		}
	}
}
