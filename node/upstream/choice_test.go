package upstream

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var drawLoads = rapid.Custom(func(t *rapid.T) []load {
	n := rapid.IntRange(2, 12).Draw(t, "n")
	list := make([]load, n)
	for i := range list {
		list[i] = load{hashName(fmt.Sprint("u", i)), rapid.Float64Range(0, 3).Draw(t, "pace"), rapid.Int64Range(0, 40).Draw(t, "in flight")}
	}
	return list
})

// TestBetterOfTwo never takes the worst.
func TestBetterOfTwo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := drawLoads.Draw(t, "loads")
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		got := betterOfTwo(l, rng.IntN)
		worse := 0
		for _, b := range l {
			if b.cost() >= l[got].cost() {
				worse++
			}
		}
		if worse < 2 { // itself and the other of the two
			t.Fatalf("took the worst of %v: %d", l, got)
		}
	})
}

// TestPreferred: a key has the same place each time, within the load bound, and a backend
// that leaves moves only its own keys.
func TestPreferred(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l, key := drawLoads.Draw(t, "loads"), rapid.Uint64().Draw(t, "key")
		got := preferred(key, l)
		if again := preferred(key, l); again != got {
			t.Fatal("not the same place")
		}
		if got >= 0 {
			var total int64
			for _, b := range l {
				total += b.inFlight
			}
			if have := float64(l[got].inFlight + 1); have > loadBound*float64(total+1)/float64(len(l))+1 {
				t.Fatalf("%v in flight of %d at %d", have, total, len(l))
			}
		}
		idle := make([]load, len(l))
		for i := range l {
			idle[i] = load{name: l[i].name}
		}
		at := preferred(key, idle)
		gone := rapid.IntRange(0, len(l)-1).Draw(t, "gone")
		rest := append(append([]load{}, idle[:gone]...), idle[gone+1:]...)
		if after := preferred(key, rest); gone != at && rest[after].name != idle[at].name {
			t.Fatalf("key moved from %d although %d left", at, gone)
		}
	})
	if at := preferred(1, []load{{name: 1, pace: 0.1}, {name: 2, pace: 9}}); at == 1 {
		t.Error("a warm cache is no reason to wait ninety times as long")
	}
}

func TestPreferredSpreads(t *testing.T) {
	idle := []load{{name: hashName("a")}, {name: hashName("b")}, {name: hashName("c")}}
	var count [3]int
	for i := range 3000 {
		count[preferred(hashName(fmt.Sprint(i)), idle)]++
	}
	for i, n := range count {
		if n < 800 || n > 1200 {
			t.Errorf("%d of 3000 keys at %d", n, i)
		}
	}
}

func TestAffinityKey(t *testing.T) {
	long := strings.Repeat("x", maxPrefix)
	key := func(tenant, prompt string) uint64 {
		k, ok := affinityKey(tenant, []byte(prompt))
		if !ok {
			t.Fatalf("no key: %.60s", prompt)
		}
		return k
	}
	base := key("t", long+"a")
	for name, c := range map[string]struct {
		same bool
		key  uint64
	}{
		"another end":    {true, key("t", long+"b")},
		"another tenant": {false, key("u", long+"a")},
		"another start":  {false, key("t", "y"+long+"a")},
		"shorter":        {false, key("t", "x")},
	} {
		if (c.key == base) != c.same {
			t.Errorf("%s: same %v", name, c.key == base)
		}
	}
	if key("a", "bc") == key("ab", "c") {
		t.Error("tenant and prompt run together")
	}
	if _, ok := affinityKey("t", nil); ok {
		t.Error("without a prompt no cache helps")
	}
}

// TestQuickFailer: the server that fails fastest doesn't get most of the traffic.
func TestQuickFailer(t *testing.T) {
	now := time.Unix(5_000_000, 0)
	m := newMetrics(nil)
	var pair [2]backend
	for i := range pair {
		pair[i].hash, pair[i].counts = uint64(i), m.backend(fmt.Sprint(i))
		pair[i].onMove = func(*backend, breakerState, breakerReason) {}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	var asked [2]int
	for range 2000 {
		now = now.Add(5 * time.Millisecond)
		at := betterOfTwo([]load{pair[0].load(now), pair[1].load(now)}, rng.IntN)
		trial, why := pair[at].enter(now, true)
		if why != granted {
			t.Fatal(why)
		}
		asked[at]++
		if at == 0 && rng.IntN(10) < 4 {
			pair[at].leave(now, trial, Outcome{Result: ServerFailed}, 0)
		} else {
			pair[at].leave(now, trial, Outcome{Result: OK}, []time.Duration{5 * time.Millisecond, 80 * time.Millisecond}[at])
		}
	}
	if asked[0] > asked[1]/2 {
		t.Errorf("the quick failer got %d, the slow and sure one %d", asked[0], asked[1])
	}
	if asked[0] == 0 {
		t.Error("the failer is never tried again")
	}
}
