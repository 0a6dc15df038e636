//go:build linux

package lab

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/modelsim"
)

// bare is a lab whose "nodes" are the model servers themselves: what the load
// says of those is known.
func bare(t *testing.T, sites int) *Lab {
	t.Helper()
	l := &Lab{t: t, Net: network(t, sites), Random: rand.New(rand.NewPCG(1, 1))}
	for i := range sites {
		s := newSite(l, i, 1)
		s.Nodes[0].ports.api = modelPort
		s.Model.Start()
		t.Cleanup(s.Model.end)
		t.Cleanup(s.http.CloseIdleConnections)
		l.Sites = append(l.Sites, s)
	}
	return l
}

func awaitResults(t *testing.T, r *Running, n int) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for tick := time.NewTicker(10 * time.Millisecond); r.Count() < n; {
		select {
		case <-deadline:
			t.Fatalf("%d results after 30 s, want %d", r.Count(), n)
		case <-tick.C:
		}
	}
}

func TestLoadKeepsItsRateAndNoticesFailures(t *testing.T) {
	l := bare(t, 2)
	begun := time.Now()
	r := l.StartLoad(Load{Rate: 200, Streams: 2})
	awaitResults(t, r, 400)
	killed := time.Now()
	l.Sites[1].Model.Kill()
	awaitResults(t, r, 800)
	back := time.Now()
	l.Sites[1].Model.Start()
	restarted := time.Now()
	awaitResults(t, r, 1200)
	took := time.Since(begun)
	results := r.Stop()
	t.Log(Summary(results))

	plain := 0
	for _, res := range results {
		if !res.Stream {
			plain++
		}
		down := res.Site == l.Sites[1].Name && res.At.After(killed) && res.At.Before(back)
		up := res.Site == l.Sites[0].Name || res.At.Add(res.Took).Before(killed) || res.At.After(restarted)
		if down && res.Err == nil || up && res.Err != nil {
			t.Errorf("%s at %v: %v, while its server was down: %v", res.Site, res.At.Sub(begun), res.Err, down)
		}
	}
	if want := took.Seconds() * 400; float64(plain) < want*0.9 || float64(plain) > want*1.1 {
		t.Errorf("%d requests in %v, want about %.0f", plain, took, want)
	}
	if len(Failed(results, l.Sites[1].Name)) < 100 || len(Failed(results, l.Sites[0].Name)) != 0 {
		t.Errorf("failed: %d of the site without a server, %d of the other",
			len(Failed(results, l.Sites[1].Name)), len(Failed(results, l.Sites[0].Name)))
	}
}

// A wrong text and a broken stream are failures, however politely they come.
func TestLoadNoticesWrongAnswers(t *testing.T) {
	for _, mode := range []modelsim.Mode{modelsim.SilentEnd, modelsim.MissingDone, modelsim.ErrorEvent, modelsim.TruncatedBody, modelsim.BadJSON} {
		t.Run(string(mode), func(t *testing.T) {
			l := bare(t, 1)
			r := l.StartLoad(Load{Streams: 3})
			awaitResults(t, r, 3)
			if failed := Failed(r.snapshot()); len(failed) > 0 {
				t.Fatalf("failed without cause: %v", failed[0].Err)
			}
			if err := l.Sites[0].Model.SetFault(modelsim.Fault{Mode: mode, After: 2}); err != nil {
				t.Fatal(err)
			}
			awaitResults(t, r, 12)
			results := r.Stop()
			failed := Failed(results)
			if len(failed) == 0 {
				t.Fatal("no failure was noticed")
			}
			t.Log(failed[0].Err)
			if lawful := LawfulEnd(failed[0]); lawful != (mode == modelsim.ErrorEvent) {
				t.Errorf("lawful: %v", lawful)
			}
		})
	}
}
