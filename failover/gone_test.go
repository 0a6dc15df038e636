package failover

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/config"
)

// seenBy is a cluster as its leader sees it. A node's site is the first letter of its
// name. The text says who heard whom how many seconds ago: "a1: b1 0 c1 12; c1: a1 0".
// The first node leads; upper-case names are those of voters.
func seenBy(text string) Input {
	in := Input{Now: time.Hour, Timing: config.TimingFrom(0), Primary: "a", Opened: map[string]uint64{}}
	members := map[string]bool{}
	note := func(name string) string {
		lower := strings.ToLower(name)
		members[lower] = members[lower] || name != lower
		return lower
	}
	for i, table := range strings.Split(text, ";") {
		who, heard, _ := strings.Cut(strings.TrimSpace(table), ":")
		o := Observation{Observer: note(who), Leased: true, Seen: map[string]Sighting{}}
		o.Site = o.Observer[:1]
		fields := strings.Fields(heard)
		for k := 0; k+1 < len(fields); k += 2 {
			seconds := 0.0
			_, _ = fmt.Sscan(fields[k+1], &seconds)
			name := note(fields[k])
			if seconds >= 0 { // below 0: it was never heard
				o.Seen[name] = Sighting{Ago: time.Duration(seconds * float64(time.Second))}
			}
		}
		if i == 0 {
			in.Leader = o
		} else {
			o.Age = tick
			in.Others = append(in.Others, o)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		in.Members = append(in.Members, Member{Name: name, Site: name[:1], Voter: members[name]})
	}
	return in
}

// TestGone: which nodes are so certainly gone that others adopt their job streams.
func TestGone(t *testing.T) {
	for _, c := range []struct {
		name   string
		seen   string
		change func(*Memory, *Input)
		gone   string
	}{
		{"all are heard", "A1: B1 0 C1 0; B1: A1 0 C1 0; C1: A1 0 B1 0", nil, ""},
		{"a site is silent to the leader and to a third one", "A1: B1 0 C1 12; B1: A1 0 C1 12", nil, "c1"},
		{"for less than ten seconds", "A1: B1 0 C1 9.9; B1: A1 0 C1 12", nil, ""},
		{"the witness heard it later", "A1: B1 0 C1 60; B1: A1 0 C1 9", nil, ""},
		{"the third site hears it", "A1: B1 0 C1 60; B1: A1 0 C1 0", nil, ""},
		{"a node whose own table is old heard it", "A1: B1 5 C1 60 D1 0; B1: A1 0 C1 3; D1: A1 0 C1 60", func(_ *Memory, in *Input) { in.Others[0].Age = 5 * time.Second }, ""},
		{"a leader that hears nobody and still commits", "A1: B1 60 C1 60", nil, ""},
		{"a leader that hears nobody, with the tables of before", "A1: B1 60 C1 60; B1: A1 0 C1 12; C1: A1 0 B1 12", func(_ *Memory, in *Input) {
			for i := range in.Others {
				in.Others[i].Age = time.Minute
			}
		}, ""},
		{"a leader that hears one voter of the two that its commits need", "A1: a2 0 B1 60 B2 60 C1 0 A2 60; C1: A1 0 B1 60 B2 60", nil, ""},
		{"the same for a leader that hears two", "A1: A2 0 B1 60 B2 60 C1 0; C1: A1 0 B1 60 B2 60", nil, "b1 b2"},
		{"a leader that was paused", "A1: B1 0 C1 60; B1: A1 0 C1 60", func(m *Memory, in *Input) { m.watching = in.Now - 9*time.Second }, ""},
		{"a leader that was paused ten seconds ago", "A1: B1 0 C1 60; B1: A1 0 C1 60", func(m *Memory, in *Input) { m.watching = in.Now - 10*time.Second }, "c1"},
		{"a starved witness", "A1: B1 0 C1 12; B1: A1 0 C1 12", func(_ *Memory, in *Input) { in.Others[0].Paused = 3 * tick }, ""},
		{"a stale witness", "A1: B1 1 C1 12; B1: A1 0 C1 12", func(_ *Memory, in *Input) { in.Others[0].Age = 5 * tick }, ""},
		{"a witness that never heard it", "A1: B1 0 C1 12; B1: A1 0 C1 -1", nil, ""},
		{"a node that just had a stream agreed on", "A1: B1 0 C1 60; B1: A1 0 C1 60", func(m *Memory, in *Input) {
			m.opened = map[string]opening{"c1": {index: 7, at: in.Now - 9*time.Second}}
		}, ""},

		{"a node of a living site, to its neighbour too", "A1: B1 0 b2 12 C1 0; B1: A1 0 b2 12; C1: A1 0 b2 12", nil, "b2"},
		{"its neighbour alone is a witness", "A1: B1 0 b2 12 C1 5; B1: A1 0 b2 12", nil, "b2"},
		{"its neighbour hears it", "A1: B1 0 b2 60 C1 0; B1: A1 0 b2 0; C1: A1 0 b2 60", nil, ""},
		{"the leader's neighbour, to another site", "A1: a2 12 B1 0 C1 0; B1: A1 0 a2 12; C1: A1 0 a2 12", nil, "a2"},
		{"the leader's neighbour, heard elsewhere", "A1: a2 60 B1 0 C1 0; B1: A1 0 a2 0; C1: A1 0 a2 60", nil, ""},
		{"the leader's neighbour, to a third node of the site", "A1: A2 12 A3 0; A3: A1 0 A2 12", nil, "a2"},

		{"two sites: the leader's neighbour shares its links", "A1: a2 0 b1 12; a2: A1 0 b1 12", nil, ""},
		{"two sites, for as long as a primary may be without a lease", "A1: a2 0 b1 30; a2: A1 0 b1 30", nil, "b1"},
		{"two sites, heard by the neighbour", "A1: a2 0 b1 60; a2: A1 0 b1 0", nil, ""},
		{"two sites, one of two nodes there", "A1: b1 12 b2 0; b2: A1 0 b1 12", nil, "b1"},
		{"two nodes, one votes", "A1: b1 30", nil, "b1"},
		{"two nodes, not for long enough", "A1: b1 29", nil, ""},
		{"two nodes of one site", "A1: a2 30", nil, "a2"},
		{"two nodes, the leader was paused", "A1: b1 60", func(m *Memory, in *Input) { m.watching = in.Now - 29*time.Second }, ""},
		{"never heard by anybody", "A1: B1 0 C1 -1; B1: A1 0", nil, "c1"},
		{"never heard, and the leader has listened for a short time", "A1: B1 0 C1 -1; B1: A1 0", func(m *Memory, in *Input) { m.watching = in.Now - 29*time.Second }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, in := watched(), seenBy(c.seen)
			if c.change != nil {
				c.change(&m, &in)
			}
			m, _ = Observe(m, in)
			var gone []string
			for _, name := range slices.Sorted(maps.Keys(Gone(m, in))) {
				if Gone(m, in)[name] {
					gone = append(gone, name)
				}
			}
			if got := strings.Join(gone, " "); got != c.gone {
				t.Errorf("gone: %q, want %q", got, c.gone)
			}
		})
	}
}

// TestAnOpenedStreamIsASignOfLife: each stream that a node opens counts from the look that
// saw it first. A stream that another node owns now was opened before.
func TestAnOpenedStreamIsASignOfLife(t *testing.T) {
	m, in := watched(), seenBy("A1: B1 0 C1 60; B1: A1 0 C1 60")
	look := func(after time.Duration, opened uint64) bool {
		for until := in.Now + after; in.Now < until; {
			in.Now += tick / 2
			in.Opened["c1"] = opened
			m, _ = Observe(m, in)
		}
		return Gone(m, in)["c1"]
	}
	if look(9*time.Second, 7) || !look(2*time.Second, 7) {
		t.Error("the stream at 7 counts for ten seconds")
	}
	if look(9*time.Second, 9) || !look(2*time.Second, 0) {
		t.Error("the stream at 9 counts for ten seconds, also when it was adopted meanwhile")
	}
	if !look(9*time.Second, 7) {
		t.Error("an older stream is no new sign of life")
	}
}

// For any tables: a node that anybody heard in the last ten seconds is not gone; nobody is
// while the leader hears less than a quorum; and a node that nobody hears is gone in the
// end, if the leader hears a quorum.
func TestLivingNodesAreNeverGone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"A1", "a2", "B1", "b2", "C1"}[:rapid.IntRange(2, 5).Draw(t, "nodes")]
		ago := rapid.SampledFrom([]float64{-1, 0, 2, 9, 11, 29, 31, 100})
		var tables []string
		for _, who := range names {
			table := who + ":"
			for _, other := range names {
				if other != who {
					table += fmt.Sprintf(" %s %v", other, ago.Draw(t, who+" heard "+other))
				}
			}
			tables = append(tables, table)
		}
		in := seenBy(strings.Join(tables, ";"))
		for i := range in.Others {
			in.Others[i].Age = time.Duration(rapid.IntRange(0, 20).Draw(t, "age")) * time.Second / 4
		}
		m, _ := Observe(watched(), in)
		gone := Gone(m, in)
		for _, n := range in.Members {
			newest := never
			for _, o := range append(slices.Clone(in.Others), in.Leader) {
				if s, heard := o.Seen[n.Name]; heard && o.Observer != n.Name {
					newest = min(newest, s.Ago+o.Age)
				}
			}
			switch is := gone[n.Name]; {
			case is && newest < adoptAfter:
				t.Fatalf("%s is gone although it was heard %s ago", n.Name, newest)
			case is && !in.hearsQuorum():
				t.Fatalf("%s is gone by the word of a leader that hears no quorum", n.Name)
			case is && n.Name == in.Leader.Observer:
				t.Fatal("the leader is gone by its own word")
			case !is && n.Name != in.Leader.Observer && newest >= in.Timing.NoLease+5*time.Second && in.hearsQuorum():
				t.Fatalf("%s is not gone, and nobody has heard it for %s", n.Name, newest)
			}
		}
	})
}
