//go:build linux

package lab

import (
	"testing"
	"time"
)

func TestTwoActingPrimariesAreFound(t *testing.T) {
	at := func(s float64) time.Time { return time.Unix(0, int64(s*1e9)) }
	run := func(site string, epoch uint64, from, to float64) Acting {
		return Acting{
			Site: site, Node: site + "-1", Epoch: epoch,
			First: Look{at(from), at(from + 0.1)}, Last: Look{at(to - 0.1), at(to)},
		}
	}
	for name, c := range map[string]struct {
		runs []Acting
		want int
	}{
		"one after the other":         {[]Acting{run("a", 1, 0, 5), run("b", 2, 6, 9)}, 0},
		"nodes of one site":           {[]Acting{run("a", 1, 0, 5), run("a", 1, 1, 9)}, 0},
		"asked before, answered late": {[]Acting{run("a", 1, 0, 6.1), run("b", 2, 6, 9)}, 0},
		"both at once":                {[]Acting{run("a", 1, 0, 7), run("b", 2, 6, 9)}, 1},
		"the old primary again":       {[]Acting{run("a", 1, 0, 5), run("b", 2, 6, 9), run("a", 1, 8, 8.2)}, 1},
		"a site again, later":         {[]Acting{run("a", 1, 0, 5), run("b", 2, 6, 9), run("a", 3, 10, 12)}, 0},
		"two in one epoch":            {[]Acting{run("a", 2, 0, 5), run("b", 2, 6, 9)}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			if got := twoActed(c.runs); len(got) != c.want {
				t.Errorf("broken: %v, want %d", got, c.want)
			}
		})
	}
}

func TestIdleIsAnUpperBound(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(0, int64(ms)*1e6) }
	w := &RoleWatch{acting: []Acting{
		{Site: "a", Epoch: 1, First: Look{at(0), at(1)}, Last: Look{at(100), at(102)}},
		{Site: "a", Epoch: 1, First: Look{at(0), at(1)}, Last: Look{at(90), at(130)}},
		{Site: "b", Epoch: 2, First: Look{at(180), at(190)}, Last: Look{at(300), at(301)}},
		{Site: "b", Epoch: 2, First: Look{at(170), at(175)}, Last: Look{at(300), at(301)}},
	}}
	if idle, ok := w.Idle(2); !ok || idle != 75*time.Millisecond {
		t.Errorf("idle %v, %v, want 75 ms", idle, ok)
	}
	if idle, ok := w.Idle(3); ok {
		t.Errorf("idle before an epoch without a look: %v", idle)
	}
	if idle, ok := w.Idle(1); ok {
		t.Errorf("idle before the first epoch: %v", idle)
	}
}

func TestActedCountsTimeOnce(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(0, int64(ms)*1e6) }
	run := func(from, to int) Acting {
		return Acting{First: Look{at(from - 1), at(from)}, Last: Look{at(to), at(to + 1)}}
	}
	runs := []Acting{run(400, 500), run(0, 100), run(90, 150), run(100, 120), run(900, 1000)}
	for _, c := range []struct{ from, to, want int }{
		{0, 1000, 350}, {50, 95, 45}, {160, 390, 0}, {140, 450, 60}, {950, 2000, 50}, {2000, 3000, 0},
	} {
		if got := acted(runs, at(c.from), at(c.to)); got != time.Duration(c.want)*time.Millisecond {
			t.Errorf("from %d to %d: %v, want %d ms", c.from, c.to, got, c.want)
		}
	}
}
