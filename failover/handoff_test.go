package failover

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
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

// fakeCopies are the records of two sites. The target gets a record of the old primary
// every pace, none if that is zero.
type fakeCopies struct {
	mu      sync.Mutex // guards risk, has
	risk    AtRisk
	ends    map[string]uint64
	has     uint64
	pace    time.Duration
	endsErr error
}

func (f *fakeCopies) AtRisk(string, string) AtRisk {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.risk
}

func (f *fakeCopies) Ends(context.Context, string, []string) (map[string]uint64, error) {
	return f.ends, f.endsErr
}

func (f *fakeCopies) Lacking(ctx context.Context, _ string, ends map[string]uint64) (map[string]int64, error) {
	if f.pace > 0 {
		if err := wait(ctx, f.pace); err != nil {
			return nil, err
		}
		f.mu.Lock()
		f.has++
		f.mu.Unlock()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if end := ends["a1/x"]; end > f.has {
		return map[string]int64{"a1": int64(end - f.has)}, nil
	}
	return map[string]int64{}, nil
}

func TestLosslessOrRefused(t *testing.T) {
	fresh := AtRisk{Known: true, Age: 100 * time.Millisecond}
	behind := AtRisk{Known: true, Records: map[string]int64{"a1": 41}, Age: 12 * time.Second}
	for _, c := range []struct {
		name     string
		copies   *fakeCopies
		accept   bool
		err      error
		says     []string // of the error
		risk     *int64
		rpo      *float64
		acceptIs string // in the check's detail
	}{
		{name: "all is copied", copies: &fakeCopies{risk: fresh, ends: map[string]uint64{"a1/x": 5}, has: 5}, risk: ptr(int64(0)), rpo: ptr(0.0)},
		{name: "it arrives in time", copies: &fakeCopies{risk: fresh, ends: map[string]uint64{"a1/x": 5}, has: 1, pace: 50 * time.Millisecond}, risk: ptr(int64(0)), rpo: ptr(0.0)},
		{name: "unknown", copies: &fakeCopies{risk: AtRisk{Doubt: "b has not reported"}}, err: ErrPrecheck, says: []string{"lossless", "not known", "b has not reported"}},
		{name: "behind", copies: &fakeCopies{risk: behind}, err: ErrPrecheck, says: []string{"lossless", "41 of a1", "12.0 s old"}},
		{
			name: "out of date", copies: &fakeCopies{risk: AtRisk{Known: true, Age: 9 * time.Second, Doubt: "b last reported 9.0 s ago"}},
			err: ErrPrecheck, says: []string{"lossless", "b last reported", "9.0 s old"},
		},
		{
			name: "it seems on its way and never comes", copies: &fakeCopies{
				risk: AtRisk{Known: true, Records: map[string]int64{"a1": 4}, Age: time.Second}, ends: map[string]uint64{"a1/x": 5}, has: 1,
			},
			err: ErrPrecheck, says: []string{"catch_up", "lossless", "4 of a1", "5.0 s ago"},
		},
		{
			name: "the old primary does not tell what it has", copies: &fakeCopies{risk: fresh, endsErr: errors.New("no answer")},
			err: ErrPrecheck, says: []string{"catch_up", "not known", "no answer"},
		},
		{
			name: "a loss is accepted", copies: &fakeCopies{risk: behind, ends: map[string]uint64{"a1/x": 45}, has: 2}, accept: true,
			risk: ptr(int64(43)), rpo: ptr(12.0), acceptIs: "the loss is accepted: b lacks 41 of a1",
		},
		{
			name: "a loss is accepted that nobody knows", copies: &fakeCopies{risk: AtRisk{Doubt: "b has not reported"}}, accept: true,
			acceptIs: "the loss is accepted: it is not known",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			simulate(t, ones(8), func(t *testing.T, w *world) {
				w.nodes["a1"].coord.o.Copies = c.copies
				r := planned("b")
				r.AcceptLoss = c.accept
				res, err := w.switchover("a1", r)
				if c.err != nil {
					if !errors.Is(err, c.err) {
						t.Fatalf("got %v", err)
					}
					for _, says := range c.says {
						if !strings.Contains(err.Error(), says) {
							t.Errorf("the refusal %q does not say %q", err, says)
						}
					}
					w.wantPrimary("a", 1)
					if w.agreed().Switchover != nil || !slices.Equal(w.acting(), []string{"a"}) {
						t.Errorf("switchover %+v, acting %v", w.agreed().Switchover, w.acting())
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				w.wantPrimary("b", 2)
				if !equal(res.RecordsAtRisk, c.risk) || !equal(res.RPOSeconds, c.rpo) {
					t.Errorf("at risk %v, %v s; want %v, %v", text(res.RecordsAtRisk), text(res.RPOSeconds), text(c.risk), text(c.rpo))
				}
				f := w.agreed().LastFailover
				if !equal(f.RecordsAtRisk, c.risk) || !equal(f.RPOSeconds, c.rpo) {
					t.Errorf("the record has %v, %v s", text(f.RecordsAtRisk), text(f.RPOSeconds))
				}
				i := slices.IndexFunc(res.Checks, func(k Check) bool { return k.Name == "lossless" })
				if i < 0 || !strings.Contains(res.Checks[i].Detail, c.acceptIs) {
					t.Errorf("checks %+v", res.Checks)
				}
			})
		})
	}
}

// A node of the old primary does not answer, so nobody knows what it has written. The
// switchover needs an accepted loss, also in the first seconds, when all that was known is
// still recent.
func TestASilentNodeIsNotLossless(t *testing.T) {
	simulate(t, twos(12), func(t *testing.T, w *world) {
		w.lead("a1")
		w.nodes["a1"].coord.o.Copies = &fakeCopies{risk: AtRisk{Known: true}}
		w.kill("a2")
		w.pass(3 * time.Second)
		r := planned("b")
		r.Waive = []string{"primary_heard", "voters_reachable"}
		if _, err := w.switchover("a1", r); !errors.Is(err, ErrPrecheck) || !strings.Contains(err.Error(), "lossless") || !strings.Contains(err.Error(), "a2") {
			t.Errorf("got %v", err)
		}
		w.wantPrimary("a", 1)
		r.AcceptLoss = true
		if _, err := w.switchover("a1", r); err != nil {
			t.Error(err)
		}
		w.wantPrimary("b", 2)
	})
}

// What the old primary has when it stops does not arrive: everything is rolled back, and it
// acts again soon.
func TestSwitchoverRollsBackWhenTheCopyStops(t *testing.T) {
	simulate(t, ones(9), func(t *testing.T, w *world) {
		copies := &growingCopies{fakeCopies: fakeCopies{risk: AtRisk{Known: true}, ends: map[string]uint64{"a1/x": 5}, has: 5}}
		w.nodes["a1"].coord.o.Copies = copies
		began := time.Now()
		res, err := w.switchover("a1", planned("b"))
		if !errors.Is(err, ErrRolledBack) || !strings.Contains(err.Error(), "3 of a1") {
			t.Fatalf("got %v (%+v)", err, res.Steps)
		}
		w.wantPrimary("a", 1)
		w.until("a acts again", time.Second, func() bool { return slices.Equal(w.acting(), []string{"a"}) })
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("it took %s", took)
		}
	})
}

// growingCopies has three records more at the second question than the target ever gets.
type growingCopies struct {
	fakeCopies
	asked int
}

func (g *growingCopies) Ends(context.Context, string, []string) (map[string]uint64, error) {
	if g.asked++; g.asked == 2 {
		return map[string]uint64{"a1/x": 8}, nil
	}
	return g.ends, nil
}

// The disk of the target's node hangs. At first nobody can know that, then its answers show
// it. Either way the old primary stays, or acts again within a second.
func TestSwitchoverToASiteWhoseDiskHangs(t *testing.T) {
	for _, c := range []struct {
		name string
		hung time.Duration // when the switchover is asked for
		says string
	}{
		{"just now", 0, "follow"},
		{"for a while", 3 * time.Second, "target_"},
	} {
		for _, asked := range leaders {
			t.Run(c.name+" asked at "+asked, func(t *testing.T) {
				simulate(t, ones(10), func(t *testing.T, w *world) {
					w.lead("a1")
					w.freeze(true, "b1")
					w.pass(c.hung)
					res, err := w.switchover(asked, planned("b"))
					if !errors.Is(err, ErrPrecheck) || (asked != "b1" && !strings.Contains(err.Error(), c.says)) {
						t.Errorf("got %v (%+v)", err, res.Steps)
					}
					w.wantPrimary("a", 1)
					if w.agreed().Switchover != nil || !slices.Equal(w.acting(), []string{"a"}) {
						t.Errorf("switchover %+v, acting %v", w.agreed().Switchover, w.acting())
					}
				})
			})
		}
	}
}

// The disk hangs after the announcement: the switchover is rolled back within a second.
func TestSwitchoverRollsBackWhenTheDiskHangs(t *testing.T) {
	simulate(t, ones(11), func(t *testing.T, w *world) {
		w.lead("a1")
		w.nodes["a1"].coord.o.Releaser = freezing{w, "b1"}
		res, err := w.switchover("a1", planned("b"))
		if !errors.Is(err, ErrRolledBack) {
			t.Fatalf("got %v", err)
		}
		w.until("a acts again", time.Second, func() bool { return slices.Equal(w.acting(), []string{"a"}) })
		var took time.Duration
		for _, s := range res.Steps {
			if s.Name != "follow" {
				took += s.Took
			}
		}
		if took > time.Second {
			t.Errorf("no site acted for %s: %+v", took, res.Steps)
		}
	})
}

// freezing freezes a node before it sees the announcement.
type freezing struct {
	w    *world
	node string
}

func (f freezing) Release(ctx context.Context, node, id string) error {
	f.w.mu.Lock()
	target := f.w.nodes[f.node]
	target.frozen = true
	target.applied = min(target.applied, len(f.w.states)-2)
	target.ticked = 0
	f.w.mu.Unlock()
	return f.w.Release(ctx, node, id)
}

func equal[T comparable](a, b *T) bool {
	return a == nil && b == nil || a != nil && b != nil && *a == *b
}

func text[T any](p *T) string {
	if p == nil {
		return "null"
	}
	return fmt.Sprint(*p)
}
