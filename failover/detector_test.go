package failover

import (
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

const (
	tick     = 250 * time.Millisecond
	patience = 2500 * time.Millisecond
)

// silentFor: the leader b1 and the witness c1 hear each other, and have not heard a1
// for d.
func silentFor(d time.Duration) Input {
	return Input{
		Now: time.Hour, Timing: config.TimingFrom(0), Primary: "a",
		Sites: []PlacementSite{{"a", "shanghai", 1}, {"b", "shanghai", 2}, {"c", "beijing", 3}},
		Members: []Member{
			{Name: "a1", Site: "a"},
			{Name: "b1", Site: "b", Ready: true, Steady: true, UpstreamsHealthy: 1},
			{Name: "c1", Site: "c", Ready: true, Steady: true, UpstreamsHealthy: 1},
		},
		Leader: Observation{Observer: "b1", Site: "b", Leased: true, Seen: map[string]Sighting{
			"a1": {Ago: d, LeaseLeft: time.Second, LeaseKnown: true},
			"c1": {Ago: tick, LeaseLeft: time.Second, LeaseKnown: true},
		}},
		Others: []Observation{{Observer: "c1", Site: "c", Age: tick, Leased: true, Seen: map[string]Sighting{
			"a1": {Ago: d}, "b1": {Ago: tick},
		}}},
	}
}

// watched is the memory of a leader that has watched for an hour without a pause.
func watched() Memory {
	return Memory{looked: true, last: time.Hour - 100*time.Millisecond}
}

func TestObserve(t *testing.T) {
	for _, c := range []struct {
		name      string
		given     func() (Memory, Input)
		heard     bool
		leased    bool
		silence   time.Duration
		leader    time.Duration
		witnessed bool
	}{
		{"heard a moment ago", func() (Memory, Input) { return watched(), silentFor(tick) }, true, true, 0, tick, true},
		{"silent for a second", func() (Memory, Input) { return watched(), silentFor(time.Second) }, true, true, 0, time.Second, true},
		{"silent for both", func() (Memory, Input) { return watched(), silentFor(patience) }, false, false, patience, patience, true},
		{"the witness heard it last", func() (Memory, Input) {
			in := silentFor(4 * time.Second)
			in.Others[0].Seen["a1"] = Sighting{Ago: 2400 * time.Millisecond}
			return watched(), in
		}, false, false, 2400 * time.Millisecond, 4 * time.Second, true},
		{"the witness hears it", func() (Memory, Input) {
			in := silentFor(4 * time.Second)
			in.Others[0].Seen["a1"] = Sighting{Ago: tick}
			return watched(), in
		}, true, true, 0, 4 * time.Second, true},
		{"the witness passes on that it has no lease", func() (Memory, Input) {
			in := silentFor(4 * time.Second)
			in.Others[0].Seen["a1"] = Sighting{Ago: tick, LeaseKnown: true}
			return watched(), in
		}, true, false, 0, 4 * time.Second, true},
		{"the witness holds no lease", func() (Memory, Input) {
			in := silentFor(4 * time.Second)
			in.Others[0].Seen["a1"] = Sighting{Ago: tick}
			in.Others[0].Leased = false
			return watched(), in
		}, true, false, 0, 4 * time.Second, true},
		{"the leader's own evidence counts before the witness's", func() (Memory, Input) {
			in := silentFor(tick)
			in.Leader.Seen["a1"] = Sighting{Ago: tick, LeaseKnown: true}
			return watched(), in
		}, true, false, 0, tick, true},
		{"a stale witness", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			in.Others[0].Age = 5 * tick
			return watched(), in
		}, false, false, 0, 10 * time.Second, false},
		{"a recent sighting in an old table counts as life", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			in.Others[0].Age, in.Others[0].Seen["a1"] = 2*time.Second, Sighting{Ago: tick}
			return watched(), in
		}, true, true, 0, 10 * time.Second, false},
		{"a starved witness is none", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			in.Others[0].Paused = 3 * tick
			return watched(), in
		}, false, false, 0, 10 * time.Second, false},
		{"a witness that is stopped 300 ms of each second is one", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			in.Others[0].Paused = 300 * time.Millisecond
			return watched(), in
		}, false, false, 10 * time.Second, 10 * time.Second, true},
		{"a witness that never heard it is none", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			delete(in.Others[0].Seen, "a1")
			return watched(), in
		}, false, false, 0, 10 * time.Second, false},
		{"a witness of the leader's own site is none", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			in.Others[0].Site = "b"
			return watched(), in
		}, false, false, 0, 10 * time.Second, false},
		{"a node of the silent site is none", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			in.Others[0].Site = "a"
			return watched(), in
		}, false, false, 0, 10 * time.Second, false},
		{"a paused leader starts its patience again", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			in.Leader.Paused = 3 * tick
			return watched(), in
		}, false, false, 0, 0, true},
		{"a late look starts the patience again", func() (Memory, Input) {
			m := watched()
			m.last -= 2 * tick
			return m, silentFor(10 * time.Second)
		}, false, false, 0, 0, true},
		{"watching since a second ago", func() (Memory, Input) {
			m := watched()
			m.watching = time.Hour - time.Second
			return m, silentFor(10 * time.Second)
		}, false, false, time.Second, time.Second, true},
		{"one of two nodes is heard", func() (Memory, Input) {
			in := silentFor(10 * time.Second)
			in.Members = append(in.Members, Member{Name: "a2", Site: "a"})
			in.Leader.Seen["a2"] = Sighting{Ago: tick, LeaseLeft: time.Second, LeaseKnown: true}
			return watched(), in
		}, true, true, 0, tick, true},
		{"never heard by any node", func() (Memory, Input) {
			in := silentFor(0)
			delete(in.Leader.Seen, "a1")
			delete(in.Others[0].Seen, "a1")
			return watched(), in
		}, false, false, 0, time.Hour, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, sites := Observe(c.given())
			a := sites[0]
			if a.Name != "a" || a.Heard != c.heard || a.Leased != c.leased || a.Silence != c.silence ||
				a.LeaderSilence != c.leader || a.Witnessed != c.witnessed {
				t.Errorf("got %+v", a)
			}
			if b := sites[1]; !b.Heard || !b.Leased || b.Ready != 1 {
				t.Errorf("the leader's own site: %+v", b)
			}
		})
	}
}

// Time without a lease counts only while it is watched. A lease that is seen sets it
// back to zero.
// A site's disks are slow while those of all its steady nodes are.
func TestObserveSlowDisks(t *testing.T) {
	for _, c := range []struct {
		name    string
		members []Member
		want    time.Duration
	}{
		{"fast", []Member{{Steady: true}}, 0},
		{"slow", []Member{{Steady: true, SlowFor: time.Minute}}, time.Minute},
		{"one of two", []Member{{Steady: true, SlowFor: time.Minute}, {Steady: true}}, 0},
		{"one of two, in the other order", []Member{{Steady: true}, {Steady: true, SlowFor: time.Minute}}, 0},
		{"both", []Member{{Steady: true, SlowFor: time.Minute}, {Steady: true, SlowFor: time.Second}}, time.Second},
		{"the fast one is away", []Member{{Steady: true, SlowFor: time.Minute}, {}}, time.Minute},
		{"what was last heard of a node that is away", []Member{{SlowFor: time.Minute}}, 0},
	} {
		in := silentFor(tick)
		in.Members = nil
		for _, m := range c.members {
			m.Site = "a"
			in.Members = append(in.Members, m)
		}
		if _, sites := Observe(watched(), in); sites[0].Name != "a" || sites[0].SlowFor != c.want {
			t.Errorf("%s: %s slow for %s, want %s", c.name, sites[0].Name, sites[0].SlowFor, c.want)
		}
	}
}

// The primary's site is heard all the time and gets leases. Its node acts or does not.
func TestObserveIdlePrimary(t *testing.T) {
	m, now, epoch, switching := watched(), time.Hour, uint64(3), false
	look := func(times int, step time.Duration, acts bool, lease time.Duration) time.Duration {
		var sites []SiteView
		for range times {
			now += step
			in := silentFor(tick)
			in.Now, in.Epoch, in.Switching = now, epoch, switching
			if in.Leader.Seen["a1"] = (Sighting{Ago: tick, LeaseLeft: lease, LeaseKnown: true}); lease < 0 {
				delete(in.Leader.Seen, "a1")
			}
			for i := range in.Members {
				in.Members[i].Acts = acts && in.Members[i].Name == "a1"
			}
			m, sites = Observe(m, in)
		}
		return sites[0].IdleFor
	}
	for _, c := range []struct {
		name string
		got  time.Duration
		want time.Duration
	}{
		{"a new epoch begins with nothing", look(1, tick, false, time.Second), 0},
		{"it does not act", look(10, tick, false, time.Second), 10 * tick},
		{"it acts for less time", look(4, tick, true, time.Second), 6 * tick},
		{"the leader does not hear it", look(10, tick, false, -1), 6 * tick},
		{"it has no lease", look(5, tick, false, 0), 6 * tick},
		{"the leader did not look for an hour", look(1, time.Hour, false, time.Second), 6 * tick},
		{"it acts for longer", look(20, tick, true, time.Second), 0},
		{"it does not act", look(3, tick, false, time.Second), 3 * tick},
	} {
		if c.got != c.want {
			t.Errorf("%s: idle for %s, want %s", c.name, c.got, c.want)
		}
	}
	if switching = true; look(3, tick, false, time.Second) != 0 {
		t.Error("it stops for a switchover, and counts as idle")
	}
	switching = false
	if idle := look(5, tick, false, time.Second); idle != 5*tick {
		t.Errorf("after the switchover: %s", idle)
	}
	if epoch++; look(1, tick, false, time.Second) != 0 {
		t.Error("the idle time of another primary counts")
	}
}

func TestObserveRemembers(t *testing.T) {
	m, now := watched(), time.Hour
	look := func(step time.Duration, lease time.Duration) SiteView {
		now += step
		in := silentFor(tick)
		in.Now = now
		in.Leader.Seen["a1"] = Sighting{Ago: tick, LeaseLeft: lease, LeaseKnown: true}
		var sites []SiteView
		m, sites = Observe(m, in)
		return sites[0]
	}
	for range 100 {
		look(100*time.Millisecond, 0)
	}
	if v := look(100*time.Millisecond, 0); v.NoLeaseFor < 10*time.Second || v.NoLeaseFor > 10200*time.Millisecond {
		t.Errorf("after 10 s: %s", v.NoLeaseFor)
	}
	before := look(100*time.Millisecond, 0).NoLeaseFor
	if v := look(time.Hour, 0); v.NoLeaseFor != before {
		t.Errorf("an hour that was not watched counts: %s", v.NoLeaseFor)
	}
	if v := look(100*time.Millisecond, time.Second); v.NoLeaseFor != 0 || !v.Leased {
		t.Errorf("with a lease: %+v", v)
	}
	if v := look(100*time.Millisecond, 0); v.NoLeaseFor != 100*time.Millisecond {
		t.Errorf("after a lease: %s", v.NoLeaseFor)
	}
}
