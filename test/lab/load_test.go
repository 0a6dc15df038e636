//go:build linux

package lab

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/modelsim"
)

// bare returns a lab whose nodes are the model servers themselves, so the test
// knows what clients must see. An answer takes 0.2 s, plain or streamed: streams that
// take no time would follow each other as fast as the machine allows.
func bare(t *testing.T, sites int) *Lab {
	t.Helper()
	l := &Lab{t: t, Net: network(t, sites), Random: rand.New(rand.NewPCG(1, 1))}
	for i := range sites {
		s := newSite(l, i, 1)
		s.Nodes[0].ports.api = modelPort
		s.Model.Server = modelsim.New(modelsim.Options{FirstToken: 10 * time.Millisecond, Rate: 100, Tokens: 20})
		s.Model.Start()
		t.Cleanup(s.Model.end)
		t.Cleanup(s.http.CloseIdleConnections)
		l.Sites = append(l.Sites, s)
	}
	return l
}

// awaitResults lets the load run until the results are enough. A test must not
// assume how many results there are at some time: that depends on the machine.
func awaitResults(t *testing.T, r *Running, what string, enough func([]Result) bool) {
	t.Helper()
	if !within(60*time.Second, func() bool { return enough(r.snapshot()) }) {
		t.Fatalf("after a minute: not %s\n%s", what, Summary(r.snapshot()))
	}
}

func count(results []Result, counts func(Result) bool) float64 {
	n := 0.0
	for _, r := range results {
		if counts(r) {
			n++
		}
	}
	return n
}

// plainBySite returns the times at which plain requests were sent, in order.
func plainBySite(results []Result) map[string][]time.Time {
	sent := map[string][]time.Time{}
	for _, r := range results {
		if !r.Stream {
			sent[r.Site] = append(sent[r.Site], r.At)
		}
	}
	for _, at := range sent {
		slices.SortFunc(at, time.Time.Compare)
	}
	return sent
}

func TestLoadKeepsItsRateAndNoticesFailures(t *testing.T) {
	const rate = 50.0
	l := bare(t, 2)
	well, hurt := l.Sites[0], l.Sites[1]
	begun := time.Now()
	r := l.StartLoad(Load{Rate: rate, Streams: 2})
	both := func(counts func(Result) bool) func([]Result) bool {
		return func(results []Result) bool {
			for _, s := range l.Sites {
				if count(results, func(r Result) bool { return r.Site == s.Name && r.Stream && counts(r) }) == 0 ||
					count(results, func(r Result) bool { return r.Site == s.Name && !r.Stream && counts(r) }) < rate {
					return false
				}
			}
			return true
		}
	}
	awaitResults(t, r, "answers in both sites", both(func(r Result) bool { return r.Err == nil }))
	killed := time.Now()
	hurt.Model.Kill()
	gone := time.Now()
	awaitResults(t, r, "failures in the site without a server", func(results []Result) bool {
		return count(results, func(r Result) bool { return r.Site == hurt.Name && r.Err != nil && r.At.After(gone) }) >= rate
	})
	back := time.Now()
	hurt.Model.Start()
	restarted := time.Now()
	awaitResults(t, r, "answers in both sites after the restart", both(func(r Result) bool { return r.Err == nil && r.At.After(restarted) }))
	// A busy machine starts requests late, and the load catches up: sooner or later it
	// has sent as many as its rate asks for.
	awaitResults(t, r, "nearly as many requests as the rate asks for", func(results []Result) bool {
		due := time.Since(begun).Seconds() * rate
		for _, sent := range plainBySite(results) {
			if float64(len(sent)) < 0.8*due {
				return false
			}
		}
		return true
	})
	results := r.Stop()
	t.Log(Summary(results))

	for _, res := range results {
		down := res.Site == hurt.Name && res.At.After(gone) && res.At.Before(back)
		up := res.Site == well.Name || res.At.Add(res.Took).Before(killed) || res.At.After(restarted)
		if down && res.Err == nil || up && res.Err != nil {
			t.Errorf("%s at %v: %v, while its server was down: %v", res.Site, res.At.Sub(begun), res.Err, down)
		}
	}
	for site, sent := range plainBySite(results) {
		for n, at := range sent {
			if due := begun.Add(time.Duration(float64(n) / rate * float64(time.Second))); at.Before(due) {
				t.Fatalf("request %d of %s was sent %v early", n, site, due.Sub(at))
			}
		}
	}
}

// Requests start by the clock also while none is answered.
func TestLoadIsOpenLoop(t *testing.T) {
	l := bare(t, 1)
	r := l.StartLoad(Load{Rate: 200})
	if err := l.Sites[0].Model.SetFault(modelsim.Fault{Mode: modelsim.Stall}); err != nil {
		t.Fatal(err)
	}
	if !within(60*time.Second, func() bool { return r.started.Load() >= 300 }) {
		t.Errorf("%d requests are outstanding after a minute, want 300", r.started.Load())
	}
	l.Sites[0].Model.Kill() // ends what stalls
	r.Stop()
}

// A wrong text and a broken stream are failures, also when the server ends them
// without an error.
func TestLoadNoticesWrongAnswers(t *testing.T) {
	for _, mode := range []modelsim.Mode{modelsim.SilentEnd, modelsim.MissingDone, modelsim.ErrorEvent, modelsim.TruncatedBody, modelsim.BadJSON} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			l := bare(t, 1)
			r := l.StartLoad(Load{Streams: 3})
			awaitResults(t, r, "three answers", func(results []Result) bool { return len(results) >= 3 })
			begun := time.Now()
			if err := l.Sites[0].Model.SetFault(modelsim.Fault{Mode: mode, After: 2}); err != nil {
				t.Fatal(err)
			}
			set := time.Now()
			awaitResults(t, r, "three answers of the server with the fault", func(results []Result) bool {
				return count(results, func(r Result) bool { return r.At.After(set) }) >= 3
			})
			for _, res := range r.Stop() {
				switch {
				case res.At.Add(res.Took).Before(begun) && res.Err != nil:
					t.Errorf("failed before the fault: %v", res.Err)
				case !res.At.After(set):
				case res.Err == nil:
					t.Error("an answer of the server with the fault was taken for a good one")
				case LawfulEnd(res) != (mode == modelsim.ErrorEvent):
					t.Errorf("lawful: %v, of %v", LawfulEnd(res), res.Err)
				}
			}
		})
	}
}
