package drill

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

func TestAbandoned(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	running := agreed.DrillRecord{ID: "d", Deadline: now}
	ended, cut := running, running
	ended.Verdict, cut.Deadline = "pass", now.Add(time.Second)
	gone := runnerView{Runner: "c-1", Self: "b-1", Leads: true, Silent: 10 * time.Second, Now: now}
	change := func(f func(*runnerView)) runnerView {
		v := gone
		f(&v)
		return v
	}
	for _, tc := range []struct {
		name string
		d    agreed.DrillRecord
		v    runnerView
		want string
	}{
		{"the runner is gone", running, gone, "c-1, the node that ran the drill, has not been heard for 10s"},
		{"it has ended", ended, gone, ""},
		{"before the end of the cut", cut, gone, ""},
		{"not silent for long", running, change(func(v *runnerView) { v.Silent = 9 * time.Second }), ""},
		{"the leader decides", running, change(func(v *runnerView) { v.Leads = false }), ""},
		{"the runner is unknown", running, change(func(v *runnerView) { v.Runner = "" }), ""},
		{"this node runs it", running, change(func(v *runnerView) { v.Runner, v.Busy = "b-1", true }), ""},
		{"this node ran it", cut, change(func(v *runnerView) { v.Runner, v.Leads = "b-1", false }), "b-1, the node that ran the drill, was restarted or could not write its report"},
		{"this node ran it, and it has ended", ended, change(func(v *runnerView) { v.Runner = "b-1" }), ""},
	} {
		if got := abandoned(tc.d, tc.v); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

// ofRunner is a drill that a node began.
func ofRunner(t *testing.T, node string, length time.Duration) agreed.DrillRecord {
	t.Helper()
	report, err := Report{Format: reportFormat, ID: "drill-other", Runner: node, Rehearsed: "a loss"}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	return agreed.DrillRecord{
		ID: "drill-other", Kind: string(Isolation), Site: "x", StartedAt: now, Deadline: now.Add(length),
		AbandonedAt: now.Add(length + maxExtraRunning), Report: report,
	}
}

// record waits until the drill has a verdict, and returns it and how long that took.
func (w *world) record(t *testing.T, id string) (agreed.DrillRecord, time.Duration) {
	t.Helper()
	begun := time.Now()
	for time.Since(begun) < 10*time.Minute {
		if i := slices.IndexFunc(w.State().Drills, func(d agreed.DrillRecord) bool { return d.ID == id }); i >= 0 && w.State().Drills[i].Verdict != "" {
			return w.State().Drills[i], time.Since(begun)
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("the drill was not ended")
	return agreed.DrillRecord{}, 0
}

// An abort that a node of the isolated site gets ends the cut at once. The node that runs
// the drill hears the site, and waits for the abort to reach the record.
func TestDrillIsAbortedAtTheIsolatedSite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.runner(t)
		o := r.o
		o.Node, o.Site = "a-1", "a"
		var apart atomic.Bool
		apart.Store(true)
		o.Agreement = cutOff{w, &apart}
		victim := NewRunner(o)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- victim.Run(ctx) }()
		d, err := r.Start(t.Context(), Request{Kind: Isolation, Site: "a", For: time.Minute, By: "ann"})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		victim.AbortLater(d.ID, "bob") // it can't write that yet
		time.Sleep(3 * time.Second)
		if got := w.State().Drills[0].Verdict; got != "" {
			t.Fatalf("%s, and the site is cut off", got)
		}
		w.mu.Lock()
		w.cut = ""
		w.mu.Unlock()
		time.Sleep(5 * time.Second) // it is heard again before it finds the leader
		apart.Store(false)
		report := w.report(t, d.ID)
		if report.Verdict != Aborted || !strings.Contains(report.Why, "aborted by bob") {
			t.Errorf("%s: %s\n%+v", report.Verdict, report.Why, report.Timeline)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// cutOff is what a node sees of the world that can't change the agreed state while it is
// apart.
type cutOff struct {
	*world
	apart *atomic.Bool
}

func (c cutOff) Propose(ctx context.Context, t agreed.CommandType, data any) (uint64, error) {
	if c.apart.Load() {
		return 0, errors.New("no quorum")
	}
	return c.world.Propose(ctx, t, data)
}

// A drill whose runner is gone ends soon after the end of its cut, and blocks no other.
func TestDrillOfARunnerThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.leads, w.silent = true, map[string]bool{"c-1": true}
		if _, err := w.Propose(t.Context(), agreed.CmdDrillPut, ofRunner(t, "c-1", 30*time.Second)); err != nil {
			t.Fatal(err)
		}
		r := w.runner(t)
		d, took := w.record(t, "drill-other")
		report, err := DecodeReport(d.Report)
		if err != nil {
			t.Fatal(err)
		}
		if took < 30*time.Second || took > 35*time.Second || report.Verdict != Aborted || !strings.Contains(report.Why, "c-1, the node that ran the drill, has not been heard") {
			t.Errorf("%s after %v: %s", d.Verdict, took, report.Why)
		}
		if report.Rehearsed != "a loss" || report.Runner != "" || !d.EndedAt.Equal(*report.EndedAt) {
			t.Errorf("the report %+v", report)
		}
		w.awaitHealed(t)
		if got := w.drill(t, r, Request{Kind: Switchover, Site: "b"}); got.Verdict != Pass {
			t.Errorf("the next drill: %s: %s", got.Verdict, got.Why)
		}
	})
}

// awaitHealed waits until no site is cut off.
func (w *world) awaitHealed(t *testing.T) {
	t.Helper()
	for range 600 {
		w.mu.Lock()
		cut := w.cut
		w.mu.Unlock()
		if cut == "" {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("%s stays cut off", w.cut)
}

// A runner that hears only silence for less than a restart ends nothing, and neither does
// a node that does not lead.
func TestDrillOfARunnerThatIsHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.silent = map[string]bool{"c-1": true}
		if _, err := w.Propose(t.Context(), agreed.CmdDrillPut, ofRunner(t, "c-1", 0)); err != nil {
			t.Fatal(err)
		}
		w.runner(t)
		set := func(leads, silent bool) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.leads, w.silent = leads, map[string]bool{"c-1": silent}
		}
		time.Sleep(time.Minute) // it does not lead
		for range 5 {
			set(true, true)
			time.Sleep(8 * time.Second)
			set(true, false)
			time.Sleep(3 * time.Second)
		}
		if v := w.State().Drills[0].Verdict; v != "" {
			t.Errorf("ended as %s", v)
		}
	})
}

// A node that was restarted ends the drill that it ran, unless the verdict was agreed on
// before: after the start its copy of the agreed state may be old.
func TestDrillOfARunnerThatWasRestarted(t *testing.T) {
	for _, late := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			d := ofRunner(t, "b-1", time.Minute)
			if _, err := w.Propose(t.Context(), agreed.CmdDrillPut, d); err != nil {
				t.Fatal(err)
			}
			if late {
				d.Verdict = string(Pass)
				w.behind = func() {
					if _, err := w.Propose(t.Context(), agreed.CmdDrillPut, d); err != nil {
						t.Error(err)
					}
				}
			}
			w.runner(t)
			got, took := w.record(t, "drill-other")
			want := map[bool]string{false: string(Aborted), true: string(Pass)}[late]
			if got.Verdict != want || took > 2*time.Second {
				t.Errorf("%s after %v, want %s", got.Verdict, took, want)
			}
			time.Sleep(10 * time.Second)
			if now, _ := w.record(t, "drill-other"); now.Verdict != want {
				t.Errorf("later %s, want %s", now.Verdict, want)
			}
		})
	}
}

// A drill that this node begins while it looks for abandoned ones is not one of them.
func TestDrillThatBeginsDuringALookIsNotAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := NewRunner(Options{
			Node: "b-1", Site: "b", Agreement: w, Boottime: w.now, Now: time.Now, Logger: slog.New(slog.DiscardHandler),
		})
		d := ofRunner(t, "b-1", time.Minute)
		w.beforeState = func() {
			w.beforeState = nil
			r.mu.Lock()
			r.busy = true
			r.mu.Unlock()
			if _, err := w.Propose(t.Context(), agreed.CmdDrillPut, d); err != nil {
				t.Error(err)
			}
		}
		r.lookForAbandoned(t.Context(), &runnerSilence{})
		if drills := w.State().Drills; len(drills) != 1 || drills[0].Verdict != "" {
			t.Errorf("the drill was ended: %+v", drills)
		}
	})
}
