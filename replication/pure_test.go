package replication

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/storage/journal"
)

func member(name string) Member {
	m := Member{Node: name, Site: name[:1], City: "east", Heard: true}
	if m.Site > "b" {
		m.City = "west"
	}
	return m
}

func memberList(names ...string) []Member {
	var out []Member
	for _, n := range names {
		out = append(out, member(n))
	}
	return out
}

func TestSatisfied(t *testing.T) {
	for _, c := range []struct {
		level   journal.Durability
		holders []string
		want    bool
	}{
		{journal.DurableNode, nil, false},
		{journal.DurableNode, []string{"a1"}, true},
		{journal.DurableNode, []string{"a2"}, false},
		{journal.DurableSite, []string{"a1"}, false},
		{journal.DurableSite, []string{"a1", "b1"}, true},
		{journal.DurableSite, []string{"a1", "c1"}, true},
		{journal.DurableSite, []string{"b1", "c1"}, false},
		{journal.DurableSite, []string{"a1", "a2"}, true},
		{journal.DurableSite, []string{"a2", "a3"}, false},
		{journal.DurableTwoSites, []string{"a1", "a2"}, false},
		{journal.DurableTwoSites, []string{"a1", "b1"}, true},
		{journal.DurableTwoSites, []string{"b1", "c1"}, false},
		{journal.DurableTwoCities, []string{"a1", "b1", "a2"}, false},
		{journal.DurableTwoCities, []string{"a1", "c2"}, true},
		{"galaxy", []string{"a1", "c2"}, false},
	} {
		if got := Satisfied(c.level, member("a1"), memberList(c.holders...)); got != c.want {
			t.Errorf("%s with %v: %v", c.level, c.holders, got)
		}
	}
}

func TestPossible(t *testing.T) {
	for _, c := range []struct {
		members []string
		want    []journal.Durability
	}{
		{[]string{"a1"}, []journal.Durability{journal.DurableNode}},
		{[]string{"a1", "a2"}, []journal.Durability{journal.DurableNode, journal.DurableSite}},
		{[]string{"a1", "b1"}, []journal.Durability{journal.DurableNode, journal.DurableSite, journal.DurableTwoSites}},
		{[]string{"a1", "c1"}, levels[:]},
		{[]string{"a1", "a2", "b1", "c1"}, levels[:]},
	} {
		var got []journal.Durability
		for _, level := range levels {
			if err := possible(level, member("a1"), memberList(c.members...)); err == nil {
				got = append(got, level)
			} else if !errors.Is(err, ErrImpossible) {
				t.Errorf("%v: %v", c.members, err)
			}
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%v: %s", c.members, diff)
		}
	}
	if err := possible("galaxy", member("a1"), memberList("a1")); !errors.Is(err, ErrImpossible) {
		t.Errorf("an unknown durability: %v", err)
	}
}

// durableTo must agree with Satisfied for each sequence number.
func TestDurableToAgreesWithSatisfied(t *testing.T) {
	names := []string{"a1", "a2", "b1", "b2", "c1", "d1"}
	s := journal.Stream{Origin: "a1"}
	rapid.Check(t, func(t *rapid.T) {
		present := rapid.SliceOfNDistinct(rapid.SampledFrom(names[1:]), 0, 5, rapid.ID).Draw(t, "members")
		members := memberList(append(present, "a1")...)
		l := newTracker("a1", 1, 10, keepsAll, nil)
		l.setMembers(members)
		held := map[string]uint64{}
		for _, m := range members {
			held[m.Node] = rapid.Uint64Range(0, 6).Draw(t, m.Node)
			l.marks[m.Node] = Held{Epoch: 1, Ends: map[journal.Stream]uint64{s: held[m.Node]}}
		}
		through := l.durableTo(s)
		for i, level := range levels {
			for seq := uint64(1); seq <= 7; seq++ {
				var holders []Member
				for _, m := range members {
					if held[m.Node] >= seq {
						holders = append(holders, m)
					}
				}
				if want := Satisfied(level, member("a1"), holders); want != (through[i] >= seq) {
					t.Fatalf("%s of record %d, held %v: durable up to %d", level, seq, held, through[i])
				}
			}
		}
	})
}

func genMarks() *rapid.Generator[Watermarks] {
	stream := rapid.Custom(func(t *rapid.T) journal.Stream {
		return journal.Stream{Origin: rapid.SampledFrom([]string{"a1", "b1"}).Draw(t, "origin"), Incarnation: journal.Incarnation{rapid.ByteRange(0, 1).Draw(t, "inc")}}
	})
	held := rapid.Custom(func(t *rapid.T) Held {
		return Held{Epoch: rapid.Uint64Range(1, 3).Draw(t, "epoch"), Ends: rapid.MapOfN(stream, rapid.Uint64Range(0, 5), 0, 3).Draw(t, "ends")}
	})
	return rapid.Custom(func(t *rapid.T) Watermarks {
		return rapid.MapOfN(rapid.SampledFrom([]string{"a1", "a2", "b1"}), held, 0, 3).Draw(t, "marks")
	})
}

func merged(all ...Watermarks) Watermarks {
	out := Watermarks{}
	for _, m := range all {
		out.Merge(m.Clone(), nil)
	}
	return out
}

func TestWatermarksMergeInAnyOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := genMarks().Draw(t, "a"), genMarks().Draw(t, "b"), genMarks().Draw(t, "c")
		same := func(law string, x, y Watermarks) {
			if diff := cmp.Diff(x, y); diff != "" {
				t.Fatalf("%s: %s", law, diff)
			}
		}
		same("commutative", merged(a, b), merged(b, a))
		same("idempotent", merged(a, b), merged(a, b, b, a))
		same("associative", merged(merged(a, b), c), merged(a, merged(b, c)))
	})
}

// Merge reports exactly the watermarks that change.
func TestMergeReportsChanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := genMarks().Draw(t, "a"), genMarks().Draw(t, "b")
		before, after := a.Clone(), a.Clone()
		said := map[markKey]bool{}
		after.Merge(b, func(holder string, s journal.Stream) { said[markKey{holder, s}] = true })
		for _, m := range []Watermarks{before, after} {
			for holder, h := range m {
				for s := range h.Ends {
					was, had := before[holder].Ends[s]
					is, has := after[holder].Ends[s]
					if (was != is || had != has) && !said[markKey{holder, s}] {
						t.Fatalf("%s of %s changed from %d to %d without being reported", s, holder, was, is)
					}
				}
			}
		}
	})
}

func TestPlan(t *testing.T) {
	all := []string{"a1", "a2", "b1", "c1"}
	dead := func(members []Member, names ...string) []Member {
		out := slices.Clone(members)
		for i := range out {
			out[i].Heard = !slices.Contains(names, out[i].Node)
		}
		return out
	}
	relayed := func(origin string) string { return rendezvous(origin, []string{"a1", "a2"}) }
	other := map[string]string{"a1": "a2", "a2": "a1"}
	relay, neighbour := relayed("c1"), other[relayed("c1")]
	for _, c := range []struct {
		name string
		view View
		want string // the sources of origin, sorted
		of   string
	}{
		{"an origin of the own site, directly", View{Self: "a1", Members: memberList(all...)}, "[a2]", "a2"},
		{"the relay of a site pulls from the origin", View{Self: relay, Members: memberList(all...)}, "[c1]", "c1"},
		{"the others pull from the relay", View{Self: neighbour, Members: memberList(all...)}, "[" + relay + "]", "c1"},
		{"another relay when the first is dead", View{Self: neighbour, Members: dead(memberList(all...), relay)}, "[c1]", "c1"},
		{"the node that holds most replaces a dead origin", View{
			Self: relay, Members: dead(memberList(all...), "c1"),
			Gain: map[string]map[string]uint64{"c1": {"b1": 3, neighbour: 1}},
		}, "[b1]", "c1"},
		{"a neighbour that holds more than any other node", View{
			Self: relay, Members: dead(memberList(all...), "c1"),
			Gain: map[string]map[string]uint64{"c1": {"b1": 1, neighbour: 3}},
		}, "[" + neighbour + "]", "c1"},
		{"no node has more: some other site", View{Self: relay, Members: dead(memberList(all...), "c1")}, "[b1]", "c1"},
		{"own records from before the disk was lost", View{
			Self: "a1", Members: memberList(all...), Gain: map[string]map[string]uint64{"a1": {"b1": 7}},
		}, "[b1]", "a1"},
		{"no own records are missing", View{Self: "a1", Members: memberList(all...)}, "[]", "a1"},
		{"an origin that was removed", View{
			Self: "a1", Members: memberList("a1", "b1"), Gain: map[string]map[string]uint64{"z9": {"b1": 2}},
		}, "[b1]", "z9"},
		{"a second source for a stalled origin", View{
			Self: relay, Members: memberList(all...), Stalled: map[string]bool{"c1": true},
			Gain: map[string]map[string]uint64{"c1": {"b1": 2}},
		}, "[b1 c1]", "c1"},
		{"no second source while records arrive", View{
			Self: relay, Members: memberList(all...), Gain: map[string]map[string]uint64{"c1": {"b1": 2}},
		}, "[c1]", "c1"},
	} {
		got := []string{}
		for source, origins := range Plan(c.view) {
			if slices.Contains(origins, c.of) {
				got = append(got, source)
			}
		}
		slices.Sort(got)
		if fmt.Sprint(got) != c.want {
			t.Errorf("%s: %v, want %s", c.name, got, c.want)
		}
	}
}

// With any dead nodes and any cut links between sites, the records of a living node reach
// every node that is connected to it. While all sites hear each other, the records enter
// each site once.
func TestPlansReachEveryNodeOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var names []string
		for _, site := range []string{"a", "b", "c", "d"}[:rapid.IntRange(1, 4).Draw(t, "sites")] {
			for i := range rapid.IntRange(1, 3).Draw(t, site) {
				names = append(names, fmt.Sprintf("%s%d", site, i))
			}
		}
		alive := map[string]bool{}
		for _, n := range names {
			alive[n] = rapid.IntRange(0, 3).Draw(t, n) > 0
		}
		cut := map[[2]string]bool{}
		whole := true
		for _, x := range []string{"ab", "ac", "ad", "bc", "bd", "cd"} {
			cut[link2(x[:1], x[1:])] = rapid.IntRange(0, 3).Draw(t, x) == 0
			whole = whole && !cut[link2(x[:1], x[1:])]
		}
		hears := func(x, y string) bool { return x == y || alive[x] && alive[y] && !cut[link2(x[:1], y[:1])] }
		plan := func(self, origin string, has map[string]bool) []string {
			v := View{Self: self, Gain: map[string]map[string]uint64{origin: {}}}
			for _, n := range names {
				m := member(n)
				m.Heard, m.Hears = hears(self, n), map[string]bool{}
				for _, o := range names {
					m.Hears[o] = hears(n, o)
				}
				v.Members = append(v.Members, m)
				if has[n] && !has[self] {
					v.Gain[origin][n] = 1
				}
			}
			var sources []string
			for source, origins := range Plan(v) {
				if slices.Contains(origins, origin) {
					sources = append(sources, source)
				}
			}
			return sources
		}
		for _, origin := range names {
			if !alive[origin] {
				continue
			}
			has, want := map[string]bool{origin: true}, map[string]bool{origin: true}
			entered := map[string]int{}
			for range names {
				now := maps.Clone(has)
				for _, self := range names {
					if !alive[self] || has[self] {
						continue
					}
					for _, source := range plan(self, origin, has) {
						if has[source] {
							now[self] = true
							if source[:1] != self[:1] {
								entered[self[:1]]++
							}
						}
					}
					for other := range maps.Clone(want) {
						if hears(self, other) {
							want[self] = true
						}
					}
				}
				has = now
			}
			if diff := cmp.Diff(want, has); diff != "" {
				t.Fatalf("%s does not reach all connected nodes: %s", origin, diff)
			}
			for site, n := range entered {
				if n > 1 && whole {
					t.Fatalf("%s is pulled into site %s by %d nodes", origin, site, n)
				}
			}
		}
	})
}

func TestSendQueuePrefersNewRecords(t *testing.T) {
	o := newSendQueue()
	old, fresh := journal.Stream{Origin: "old"}, journal.Stream{Origin: "fresh"}
	o.add(old, 0, 1_000_000)
	for range liveBatches {
		c := o.next(true)
		if c == nil || c.stream != old {
			t.Fatalf("next returned %v", c)
		}
		o.sent(c, c.next+100, liveBatch)
	}
	if !o.cursors[old].bulk {
		t.Fatal("a stream with a backlog is not in the bulk class")
	}
	for o.inFlight[1] < bulkWindow {
		c := o.next(true)
		o.sent(c, c.next+100, bulkBatch)
	}
	if c := o.next(true); c != nil {
		t.Fatalf("next returned %v although the window is full", c.stream)
	}
	o.add(fresh, 0, 1)
	if c := o.next(true); c == nil || c.stream != fresh {
		t.Fatal("a live stream waits for a backlog")
	} else {
		o.sent(c, 2, 1000)
	}
	o.acked(old, o.cursors[old].next-1)
	o.acked(fresh, 1)
	if o.inFlight != [2]int{} {
		t.Fatalf("bytes in flight after everything was acknowledged: %v", o.inFlight)
	}
	if c := o.next(false); c != nil {
		t.Fatal("next returned a bulk stream although bulk is off")
	}
	if c := o.next(true); c == nil || c.stream != old {
		t.Fatal("the backlog does not continue")
	} else {
		o.sent(c, 1_000_001, bulkBatch)
	}
	if o.cursors[old].bulk {
		t.Fatal("a stream that has caught up is still in the bulk class")
	}
}

// After any calls, the counts of a send queue equal the bytes in flight, and every queued
// stream has something to send.
func TestSendQueueCounts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := newSendQueue()
		streams := []journal.Stream{{Origin: "x"}, {Origin: "y"}, {Origin: "z"}}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			s := rapid.SampledFrom(streams).Draw(t, "stream")
			switch rapid.IntRange(0, 6).Draw(t, "op") {
			case 0:
				o.add(s, rapid.SampledFrom([]uint64{0, 5, never}).Draw(t, "held"), rapid.Uint64Range(0, 50).Draw(t, "end"))
			case 1:
				o.advance(s, rapid.Uint64Range(0, 100).Draw(t, "end"))
			case 2:
				o.acked(s, rapid.Uint64Range(0, 100).Draw(t, "held"))
			case 3:
				o.remove(s)
			case 4:
				o.resumeAfter(map[journal.Stream]uint64{s: rapid.Uint64Range(0, 100).Draw(t, "applied")})
			default:
				c := o.next(rapid.Bool().Draw(t, "bulk"))
				if c == nil {
					continue
				}
				if c.next > c.end || o.cursors[c.stream] != c {
					t.Fatalf("next returned %+v", *c)
				}
				if rapid.IntRange(0, 9).Draw(t, "trimmed") == 0 {
					c.parked = true
				} else {
					o.sent(c, c.next+1, rapid.IntRange(1, 2<<20).Draw(t, "bytes"))
				}
			}
			var out [2]int
			queued := 0
			for _, c := range o.cursors {
				for _, f := range c.inFlight {
					out[f.class] += f.bytes
				}
				if c.queued {
					queued++
				} else if !c.parked && c.next <= c.end {
					t.Fatalf("%+v is not queued", *c)
				}
			}
			if out != o.inFlight || queued != len(o.live)+len(o.bulk) {
				t.Fatalf("in flight %v, counted %v; queued %d, in queues %d", out, o.inFlight, queued, len(o.live)+len(o.bulk))
			}
		}
	})
}

// Clone copies the watermarks.
func (m Watermarks) Clone() Watermarks {
	c := make(Watermarks, len(m))
	for holder, h := range m {
		c[holder] = Held{Epoch: h.Epoch, Ends: maps.Clone(h.Ends)}
	}
	return c
}

func TestLacking(t *testing.T) {
	f := &freshness{now: func() time.Duration { return time.Hour }, own: map[string]*originCopy{}, copies: map[siteCopyKey]siteCopyAge{}}
	s := journal.Stream{Origin: "b1"}
	held := uint64(3)
	holds := func(journal.Stream) uint64 { return held }
	want := func(what string, lacking ...string) {
		t.Helper()
		if got := f.lacking([]string{"a1", "b1"}); !slices.Equal(got, lacking) {
			t.Errorf("%s: %v, want %v", what, got, lacking)
		}
	}
	want("nothing was heard", "a1", "b1")
	f.answered("a1", time.Minute, nil, holds)
	f.answered("b1", time.Minute, map[journal.Stream]uint64{s: 5}, holds)
	want("a1 has no records, b1 has two more", "b1")
	held = 5
	f.advanced(s, holds)
	want("all that b1 had")
	f.answered("b1", 2*time.Minute, map[journal.Stream]uint64{s: 9}, holds)
	want("b1 has new records: they are the lag's subject")
}
