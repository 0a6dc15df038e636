package failover

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

func (w *world) switchover(node string, r SwitchoverRequest) (SwitchoverResult, error) {
	return w.nodes[node].coord.Switchover(w.t.Context(), r)
}

func planned(to string) SwitchoverRequest {
	return SwitchoverRequest{To: to, By: "test", Kind: agreed.FailoverPlanned}
}

// Twenty switchovers in a row, asked for on any node: each is quick, and two sites never
// act at once.
func TestSwitchoversInARow(t *testing.T) {
	for _, shape := range []func(uint64) func(*testing.T) *world{ones, twos} {
		simulate(t, shape(1), func(t *testing.T, w *world) {
			worst := time.Duration(0)
			for i := range 20 {
				to := []string{"b", "c", "a"}[i%3]
				res, err := w.switchover(leaders[(i*7)%3], planned(to))
				if err != nil {
					t.Fatalf("switchover %d to %s: %v (%+v)", i, to, err, res.Steps)
				}
				w.wantPrimary(to, uint64(i+2))
				if !res.LeaderMoved {
					t.Errorf("the raft leadership did not move: %+v", res.Steps)
				}
				w.until("the leader ticks in "+to, time.Second, func() bool { return w.leaderSite() == to })
				worst = max(worst, res.Idle)
				w.until(to+" acts", time.Second, func() bool { return slices.Equal(w.acting(), []string{to}) })
				if f := w.agreed().LastFailover; f.Kind != agreed.FailoverPlanned || !f.Acknowledged || f.RecordsAtRisk != nil {
					t.Errorf("record %+v", f)
				}
				w.pass(2 * time.Second)
			}
			t.Logf("without an acting primary for at most %s", worst)
			if worst > 500*time.Millisecond {
				t.Errorf("without an acting primary for %s", worst)
			}
		})
	}
}

func TestSwitchoverPrechecks(t *testing.T) {
	for _, c := range []struct {
		check  string
		breaks func(w *world)
		to     string
	}{
		{"target_known", func(*world) {}, "z"},
		{"target_not_primary", func(*world) {}, "a"},
		{"target_ready", func(w *world) { w.kill("b1") }, "b"},
		{"target_upstreams", func(w *world) { w.mu.Lock(); w.nodes["b1"].upstreams = 0; w.mu.Unlock() }, "b"},
		{"jobs_complete", func(w *world) { w.mu.Lock(); w.nodes["c1"].jobsMissing = "it is new"; w.mu.Unlock() }, "b"},
		{"jobs_complete", func(w *world) { w.mu.Lock(); w.nodes["a1"].jobsMissing = "it is new"; w.mu.Unlock() }, "b"},
		{"voters_reachable", func(w *world) { w.kill("c1") }, "b"},
		{"quorum", func(w *world) { w.kill("b1", "c1") }, "b"},
		{"no_switchover", func(w *world) {
			w.propose("a1", agreed.CmdSwitchover, agreed.SwitchoverSet{Next: &agreed.Switchover{
				ID: "other", From: "a", To: "c", Deadline: time.Now().Add(time.Minute),
			}})
		}, "b"},
		{"no_drill", func(w *world) {
			w.propose("a1", agreed.CmdDrillPut, agreed.DrillRecord{ID: "d", Deadline: time.Now().Add(time.Hour)})
		}, "b"},
	} {
		t.Run(c.check, func(t *testing.T) {
			simulate(t, ones(2), func(t *testing.T, w *world) {
				w.lead("a1")
				c.breaks(w)
				w.pass(5 * time.Second)
				res, err := w.switchover("a1", planned(c.to))
				if !errors.Is(err, ErrPrecheck) {
					t.Fatalf("got %v", err)
				}
				i := slices.IndexFunc(res.Checks, func(k Check) bool { return !k.OK })
				if i < 0 || res.Checks[i].Name != c.check || res.Checks[i].Detail == "" {
					t.Errorf("checks %+v", res.Checks)
				}
				w.wantPrimary("a", 1)
			})
		})
	}
}

// A node of the old primary is lost: the switchover is allowed when that is waived, and
// then the new primary waits until leases from before have ended.
func TestSwitchoverWithASilentNode(t *testing.T) {
	simulate(t, twos(3), func(t *testing.T, w *world) {
		w.kill("a2")
		w.pass(5 * time.Second)
		r := planned("b")
		if _, err := w.switchover("a1", r); !errors.Is(err, ErrPrecheck) {
			t.Fatalf("got %v", err)
		}
		r.Waive = []string{"primary_heard", "voters_reachable"}
		if _, err := w.switchover("a1", r); err != nil {
			t.Fatal(err)
		}
		if p := w.agreed().Primary; p.Site != "b" || p.Released {
			t.Errorf("primary %+v", p)
		}
		w.until("b acts", 2*time.Second, func() bool { return slices.Equal(w.acting(), []string{"b"}) })
	})
}

// The old primary does not confirm the release: after the deadline nothing has changed.
func TestSwitchoverRollsBack(t *testing.T) {
	simulate(t, ones(4), func(t *testing.T, w *world) {
		w.nodes["b1"].coord.o.Releaser = neverReleases{}
		began := time.Now()
		res, err := w.switchover("b1", planned("b"))
		if !errors.Is(err, ErrRolledBack) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		if took := time.Since(began); took > announceTimeout+releaseTimeout {
			t.Errorf("took %s", took)
		}
		if last := res.Steps[len(res.Steps)-1]; last.Name != "rollback" || last.Err != "" || res.Epoch != 0 {
			t.Errorf("result %+v", res)
		}
		if w.agreed().Switchover != nil {
			t.Error("the switchover is still in the agreed state")
		}
		w.wantPrimary("a", 1)
		w.until("a acts again", time.Second, func() bool { return slices.Equal(w.acting(), []string{"a"}) })
	})
}

type neverReleases struct{}

func (neverReleases) Release(ctx context.Context, _, _ string) error {
	<-ctx.Done()
	return ctx.Err()
}

// The node that carries the switchover out is killed after the announcement: the raft
// leader clears the switchover after its deadline, and the old primary goes on.
func TestAbandonedSwitchoverExpires(t *testing.T) {
	simulate(t, ones(5), func(t *testing.T, w *world) {
		w.lead("c1")
		w.propose("b1", agreed.CmdSwitchover, agreed.SwitchoverSet{Next: &agreed.Switchover{
			ID: "x", From: "a", To: "b", By: "dead", Deadline: time.Now().Add(5 * time.Second),
		}})
		w.until("a stops acting", time.Second, func() bool { return len(w.acting()) == 0 })
		w.pass(4 * time.Second)
		if len(w.acting()) > 0 {
			t.Error("a acts before the switchover was cleared")
		}
		w.until("it is cleared", 2*time.Second, func() bool { return w.agreed().Switchover == nil })
		w.until("a acts again", time.Second, func() bool { return slices.Equal(w.acting(), []string{"a"}) })
		w.wantPrimary("a", 1)
	})
}

// The answer to the promotion is lost: the rollback finds out that it was made.
func TestSwitchoverFindsOutWhatHappened(t *testing.T) {
	simulate(t, ones(6), func(t *testing.T, w *world) {
		w.nodes["b1"].coord.o.Releaser = losesAnswer{w}
		res, err := w.switchover("b1", planned("b"))
		if err != nil || res.Epoch != 2 {
			t.Fatalf("%v, %+v", err, res)
		}
		w.wantPrimary("b", 2)
	})
}

// losesAnswer loses the answer to the proposal after a Release: the promotion.
type losesAnswer struct{ w *world }

func (f losesAnswer) Release(ctx context.Context, node, id string) error {
	err := f.w.Release(ctx, node, id)
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	f.w.forgetNext = true
	return err
}

// The primary is killed in the middle of a switchover to c: b or c becomes primary, once.
func TestPrimaryLostDuringSwitchover(t *testing.T) {
	simulate(t, ones(7), func(t *testing.T, w *world) {
		w.lead("c1")
		w.nodes["c1"].coord.o.Releaser = neverReleases{}
		failed := make(chan error, 1)
		go func() {
			_, err := w.switchover("c1", planned("c"))
			failed <- err
		}()
		w.pass(200 * time.Millisecond)
		w.kill("a1")
		w.until("another primary", 7*time.Second, func() bool { return w.agreed().Primary.Site != "a" })
		if err := <-failed; !errors.Is(err, ErrOvertaken) {
			t.Errorf("got %v", err)
		}
		w.pass(30 * time.Second)
		if p := w.agreed().Primary; p.Epoch != 2 {
			t.Errorf("primary %+v", p)
		}
	})
}

func TestAtRiskIsNamedOrRefused(t *testing.T) {
	simulate(t, ones(8), func(t *testing.T, w *world) {
		risk := ptr(int64(3))
		w.nodes["a1"].coord.o.AtRisk = func(string, string) *int64 { return risk }
		for _, r := range []*int64{ptr(int64(3)), nil} {
			risk = r
			if _, err := w.switchover("a1", planned("b")); !errors.Is(err, ErrPrecheck) {
				t.Fatalf("got %v", err)
			}
		}
		risk = ptr(int64(3))
		r := planned("b")
		r.AcceptLoss = true
		res, err := w.switchover("a1", r)
		if err != nil || res.RecordsAtRisk == nil || *res.RecordsAtRisk != 3 {
			t.Fatalf("%v, %+v", err, res)
		}
	})
}
