package drill

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// cutWorld is a node's Isolator, with an agreed state that the test changes.
type cutWorld struct {
	*Isolator
	state   atomic.Pointer[agreed.State]
	news    atomic.Pointer[chan struct{}]
	severed atomic.Int32
	start   time.Time
}

// newCutWorld must be called in a synctest bubble: it uses the bubble's clock.
func newCutWorld(t *testing.T) *cutWorld {
	return restartedCutWorld(filepath.Join(t.TempDir(), "isolation.json"))
}

// restartedCutWorld is a process that finds the file of an earlier one, and has no agreed
// state yet.
func restartedCutWorld(file string) *cutWorld {
	w := &cutWorld{start: time.Now()}
	w.Isolator = NewIsolator("a", file, func() { w.severed.Add(1) }, func() time.Duration { return time.Since(w.start) }, time.Now, slog.New(slog.DiscardHandler))
	w.agree()
	return w
}

func (w *cutWorld) agree(drills ...agreed.DrillRecord) {
	w.state.Store(&agreed.State{Drills: drills})
	next := make(chan struct{})
	if old := w.news.Swap(&next); old != nil {
		close(*old)
	}
}

// run runs the Isolator until the test ends.
func (w *cutWorld) run(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.Run(ctx, w.state.Load, func() <-chan struct{} { return *w.news.Load() }); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
}

func (w *cutWorld) isCut() bool { return w.Admit("b") != nil }

// begun is the record of an isolation that is agreed on now.
func begun(site string, length time.Duration) agreed.DrillRecord {
	return agreed.DrillRecord{ID: "drill-1", Kind: "isolation", Site: site, StartedAt: time.Now(), Deadline: time.Now().Add(500*time.Millisecond + length)}
}

func TestIsolationBeginsAndHealsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCutWorld(t)
		w.run(t)
		w.agree(begun("a", 10*time.Second))
		time.Sleep(200 * time.Millisecond)
		if w.isCut() {
			t.Fatal("cut off before the other nodes could learn of the drill")
		}
		time.Sleep(700 * time.Millisecond)
		if !w.isCut() || w.Admit("") == nil || w.severed.Load() != 1 {
			t.Fatalf("not cut off: %v, unknown addresses %v, severed %d times", w.Admit("b"), w.Admit(""), w.severed.Load())
		}
		if err := w.Admit("a"); err != nil {
			t.Errorf("its own site: %v", err)
		}
		time.Sleep(9 * time.Second)
		if !w.isCut() {
			t.Error("healed before its time")
		}
		time.Sleep(time.Second)
		if w.isCut() || w.cut.Load() != nil {
			t.Error("not healed in time")
		}
		time.Sleep(time.Minute) // by its record the drill still runs
		if w.isCut() || w.severed.Load() != 1 {
			t.Error("it began again")
		}
	})
}

// The timer is in Admit, so Run need not work.
func TestIsolationHealsWithoutRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCutWorld(t)
		w.look([]agreed.DrillRecord{begun("a", 10*time.Second)})
		time.Sleep(time.Second)
		if !w.isCut() {
			t.Fatal("not cut off")
		}
		time.Sleep(9500 * time.Millisecond)
		if w.isCut() {
			t.Error("not healed by the clock in Admit")
		}
	})
}

func TestIsolationEndsWithItsDrill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCutWorld(t)
		w.run(t)
		d := begun("a", time.Minute)
		w.agree(d)
		time.Sleep(2 * time.Second)
		if !w.isCut() {
			t.Fatal("not cut off")
		}
		d.Verdict = "aborted"
		w.agree(d)
		time.Sleep(200 * time.Millisecond)
		if w.isCut() {
			t.Error("the drill has ended, the cut has not")
		}
	})
}

func TestIsolationIsAborted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCutWorld(t)
		w.run(t)
		w.agree(begun("a", time.Minute))
		time.Sleep(2 * time.Second)
		if w.Heal("another") || !w.isCut() {
			t.Error("another drill's end was taken for this one's")
		}
		if !w.Heal("drill-1") || w.isCut() {
			t.Error("not healed")
		}
		time.Sleep(2 * time.Second)
		if w.isCut() {
			t.Error("it began again")
		}
	})
}

// A restarted node knows by the wall clock alone how much of the cut is left.
func TestIsolationAfterARestart(t *testing.T) {
	for _, tc := range []struct {
		name          string
		after, length time.Duration
		cut           bool
		healed        time.Duration // after the restart
	}{
		{"in the middle", 30 * time.Second, time.Minute, true, 31 * time.Second},
		{"when it was over", 2 * time.Minute, time.Minute, false, 0},
		{"never longer than the bound", 0, 5 * time.Hour, true, 10*time.Minute + time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := begun("a", tc.length)
				time.Sleep(tc.after)
				w := newCutWorld(t)
				w.agree(d)
				w.run(t)
				if tc.after == 0 {
					time.Sleep(Lead)
				}
				time.Sleep(150 * time.Millisecond) // one or two intervals
				if w.isCut() != tc.cut {
					t.Fatalf("cut off %v, want %v", w.isCut(), tc.cut)
				}
				time.Sleep(tc.healed)
				if w.isCut() {
					t.Error("not healed in time")
				}
			})
		})
	}
}

// A process that starts during the cut is cut off from its first moment, and to the same
// end, although its copy of the agreed state does not know the drill yet.
func TestCutSurvivesARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, d := newCutWorld(t), begun("a", 30*time.Second)
		first.look([]agreed.DrillRecord{d})
		time.Sleep(10 * time.Second)

		w := restartedCutWorld(first.file)
		if !w.isCut() {
			t.Fatal("not cut off right after the start")
		}
		w.run(t)
		time.Sleep(time.Second)
		if !w.isCut() {
			t.Fatal("healed because the agreed state does not know the drill yet")
		}
		w.agree(d)
		time.Sleep(18 * time.Second)
		if !w.isCut() {
			t.Error("healed before its time")
		}
		time.Sleep(2 * time.Second)
		if w.isCut() {
			t.Error("not healed in time")
		}
		// Its drill does not cut a third process off either.
		third := restartedCutWorld(first.file)
		third.run(t)
		third.agree(begun("a", 30*time.Second))
		time.Sleep(2 * time.Second)
		if third.isCut() {
			t.Error("it began again after a second restart")
		}
	})
}

func TestAbortedCutStaysAbortedOverARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := newCutWorld(t)
		first.look([]agreed.DrillRecord{begun("a", time.Minute)})
		time.Sleep(5 * time.Second)
		if !first.Heal("drill-1") {
			t.Fatal("not healed")
		}
		w := restartedCutWorld(first.file)
		w.run(t)
		w.agree(begun("a", time.Minute))
		time.Sleep(2 * time.Second)
		if w.isCut() {
			t.Error("it began again after a restart")
		}
	})
}

// When the record ends, so does a cut from before the start.
func TestCutFromBeforeTheStartEndsWithItsDrill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := newCutWorld(t)
		d := begun("a", time.Minute)
		first.look([]agreed.DrillRecord{d})
		time.Sleep(5 * time.Second)
		w := restartedCutWorld(first.file)
		w.run(t)
		d.Verdict = "aborted"
		w.agree(d)
		time.Sleep(200 * time.Millisecond)
		if w.isCut() {
			t.Error("the drill has ended, the cut has not")
		}
	})
}

// The wall clock may have been set back meanwhile, and the file may be damaged.
func TestCutFromAFileIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := newCutWorld(t)
		first.look([]agreed.DrillRecord{begun("a", 20*time.Second)})
		back := NewIsolator("a", first.file, func() {}, func() time.Duration { return 0 },
			func() time.Time { return time.Now().Add(-time.Hour) }, slog.New(slog.DiscardHandler))
		if c := back.cut.Load(); c == nil || c.until > 21*time.Second {
			t.Errorf("the cut %+v, want one of 20.5 s", c)
		}
		if err := os.WriteFile(first.file, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if w := restartedCutWorld(first.file); w.isCut() {
			t.Error("cut off by a damaged file")
		}
	})
}

func TestOtherDrillsCutNothingOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCutWorld(t)
		w.run(t)
		other, planned, over := begun("b", time.Minute), begun("a", time.Minute), begun("a", time.Minute)
		planned.ID, planned.Kind = "drill-2", "switchover"
		over.ID, over.Verdict = "drill-3", "pass"
		w.agree(other, planned, over)
		time.Sleep(5 * time.Second)
		if w.cut.Load() != nil || w.severed.Load() != 0 {
			t.Error("cut off by a drill of another site, of another kind, or that has ended")
		}
	})
}
