package drill

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/failover"
)

// world is a cluster of three sites in virtual time, as b-1 sees it. The site of an
// isolation cuts itself off. If it was the primary, b is promoted 3 s later.
type world struct {
	start time.Time
	over  <-chan struct{} // the test's end

	mu      sync.Mutex // guards what follows
	state   *agreed.State
	changed chan struct{}
	cut     string        // the site that is cut off now
	cutAt   time.Duration // since when it is silent
	broken  string        // requests to this site fail

	noPromotion bool // the primary is not replaced
	neverHeals  bool // the site stays cut off
	disobeys    bool // the site does not cut itself off
	// restarts is how long after the beginning of the cut the site's nodes restart; 0:
	// never. forgets: they are then no longer cut off.
	restarts  time.Duration
	forgets   bool
	process   string          // of all nodes of the site that restarted
	leads     bool            // b-1 is the Raft leader
	silent    map[string]bool // nodes that are not heard for another reason than a cut
	behind    func()          // brings the node's copy of the agreed state up to date at its next entry
	switchErr error

	beforeState func() // called by State
}

const worldConfig = `version: 1
sites:
  a: {city: x, priority: 1}
  b: {city: x, priority: 2}
  c: {city: y, priority: 3}
upstreams:
  ua: {site: a, url: "http://127.0.0.1:1/v1"}
models:
  m: {serve: [{upstream: ua}]}
`

func newWorld(t *testing.T) *world {
	t.Helper()
	cfg, err := config.Parse("cluster.yaml", []byte(worldConfig))
	if err != nil {
		t.Fatal(err)
	}
	nodes := map[string]agreed.Node{}
	for _, site := range []string{"a", "b", "c"} {
		nodes[site+"-1"] = agreed.Node{Name: site + "-1", Site: site, API: site + ":1", Admin: site + ":2"}
	}
	return &world{
		start: time.Now(), over: t.Context().Done(), changed: make(chan struct{}),
		state: &agreed.State{
			ClusterID: "c", FeatureLevel: 1, Generation: agreed.Generation{Number: 1}, Nodes: nodes, Parsed: cfg,
			Primary: agreed.Primary{Site: "a", Epoch: 1},
		},
	}
}

func (w *world) now() time.Duration { return time.Since(w.start) }

func (w *world) State() *agreed.State {
	if w.beforeState != nil {
		w.beforeState()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state
}

func (w *world) Changed() <-chan struct{}       { return w.changed }
func (w *world) Lease() (time.Duration, uint64) { return time.Second, 1 }
func (w *world) Timing() config.Timing          { return config.TimingFrom(0) }

func (w *world) Raft() cluster.RaftView {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := cluster.RaftView{Leader: "b-1", Leads: w.leads, Quorum: true, CommitIndex: 10}
	for _, n := range []string{"a-1", "b-1", "c-1"} {
		v.Servers = append(v.Servers, cluster.Server{Name: n, Voter: true})
	}
	return v
}

func (w *world) Peers() map[string]cluster.PeerView {
	w.mu.Lock()
	defer w.mu.Unlock()
	peers := map[string]cluster.PeerView{}
	for name, n := range w.state.Nodes {
		if name == "b-1" {
			continue
		}
		p := cluster.PeerView{Name: name, Site: n.Site, Info: n, Heard: true, Ago: 100 * time.Millisecond, LeaseLeft: time.Second}
		p.AppliedIndex, p.UpstreamsHealthy = 10, 1
		if w.silent[name] {
			p.Ago = time.Minute
		}
		if n.Site == "a" {
			p.Info.Instance = w.process
		}
		if n.Site == w.cut {
			p.Ago += w.now() - w.cutAt
			p.LeaseLeft -= w.now() - w.cutAt
		}
		peers[name] = p
	}
	return peers
}

// Propose applies at once. The record of an isolation cuts its site off.
func (w *world) Propose(_ context.Context, t agreed.CommandType, data any) (uint64, error) {
	cmd, err := agreed.NewCommand(t, time.Now(), data)
	if err != nil {
		return 0, err
	}
	w.mu.Lock()
	catchUp := w.behind
	w.behind = nil
	w.mu.Unlock()
	if catchUp != nil {
		catchUp()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	next, err := agreed.Apply(w.state, cmd)
	if err != nil {
		return 0, err
	}
	w.state = next
	if d, is := data.(agreed.DrillRecord); is && d.Kind == string(Isolation) && d.Verdict == "" && !w.disobeys {
		go w.isolate(d)
	}
	return 1, nil
}

func (w *world) isolate(d agreed.DrillRecord) {
	w.sleep(Lead)
	w.mu.Lock()
	w.cut, w.cutAt = d.Site, w.now()
	primary, stays, restarts := w.state.Primary, w.noPromotion, w.restarts
	w.mu.Unlock()
	if restarts > 0 {
		go func() {
			w.sleep(restarts)
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.process = "second"; w.forgets {
				w.cut = ""
			}
		}()
	}
	if primary.Site == d.Site && !stays {
		w.sleep(3 * time.Second)
		w.promote("b", primary.Epoch, agreed.FailoverUnplanned)
	}
	w.sleep(time.Until(d.Deadline))
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.neverHeals {
		w.cut = ""
	}
}

func (w *world) sleep(d time.Duration) {
	select {
	case <-w.over:
	case <-time.After(d):
	}
}

func (w *world) promote(site string, epoch uint64, kind agreed.FailoverKind) {
	_, _ = w.Propose(context.Background(), agreed.CmdPromote, agreed.Promote{
		Site: site, ExpectEpoch: epoch, Generation: 1, Reason: "test", Kind: kind,
	})
}

func (w *world) Precheck(failover.SwitchoverRequest) []failover.Check {
	return []failover.Check{{Name: "target_ready", OK: true, Detail: "yes"}}
}

func (w *world) Switchover(_ context.Context, r failover.SwitchoverRequest) (failover.SwitchoverResult, error) {
	if w.switchErr != nil {
		return failover.SwitchoverResult{}, w.switchErr
	}
	time.Sleep(100 * time.Millisecond)
	epoch := w.State().Primary.Epoch
	w.promote(r.To, epoch, r.Kind)
	return failover.SwitchoverResult{To: r.To, Epoch: epoch + 1, Idle: 100 * time.Millisecond, Steps: []failover.Step{{Name: "promote"}}}, nil
}

// Ask implements Asker.
func (w *world) Ask(_ context.Context, t Target, q Question) (Answer, error) {
	time.Sleep(3 * time.Millisecond)
	w.mu.Lock()
	defer w.mu.Unlock()
	if t.Site == w.broken {
		return Answer{}, errors.New("connection refused")
	}
	return Answer{Primary: q == AskPrimary && w.state.Primary.Site == t.Site && t.Site != w.cut}, nil
}

func (w *world) runner(t *testing.T) *Runner {
	r := NewRunner(Options{
		Node: "b-1", Site: "b", API: "b:1", Agreement: w, Switcher: w, Quarantined: func() bool { return false },
		Health: func() cluster.Health { return cluster.Health{UpstreamsHealthy: 1} },
		Unhealthy: func() []string {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.cut != "" {
				return []string{"site " + w.cut + " is down"}
			}
			return nil
		},
		NewAsker: func(string) (Asker, func()) { return w, func() {} },
		Boottime: w.now, Now: time.Now, Logger: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

// drill runs a drill to its end.
func (w *world) drill(t *testing.T, r *Runner, q Request) Report {
	t.Helper()
	q.By = "ann"
	d, err := r.Start(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return w.report(t, d.ID)
}

func (w *world) report(t *testing.T, id string) Report {
	t.Helper()
	for range 10_000 {
		for _, d := range w.State().Drills {
			if r, err := DecodeReport(d.Report); d.ID == id && d.Verdict != "" && err == nil && r.Runner != "" {
				return r
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("the drill did not end")
	return Report{}
}

func TestDrills(t *testing.T) {
	isolate := Request{Kind: Isolation, Site: "a", For: 20 * time.Second}
	for _, tc := range []struct {
		name    string
		q       Request
		world   func(*world)
		verdict Verdict
		why     string
		primary string
		epoch   uint64
	}{
		{"the primary is lost and replaced", isolate, func(*world) {}, Pass, "", "b", 2},
		{"the primary is lost, replaced and returned", Request{Kind: Isolation, Site: "a", For: 20 * time.Second, Return: true}, func(*world) {}, Pass, "", "a", 3},
		{"another site is lost", Request{Kind: Isolation, Site: "c", For: 20 * time.Second}, func(*world) {}, Pass, "", "a", 1},
		{"a switchover", Request{Kind: Switchover, Site: "b"}, func(*world) {}, Pass, "", "b", 2},
		{"a switchover and back", Request{Kind: Switchover, Site: "c", Return: true}, func(*world) {}, Pass, "", "a", 3},
		{"no site is promoted", isolate, func(w *world) { w.noPromotion = true }, Fail, "another site to be promoted", "a", 1},
		{"the site does not come back", isolate, func(w *world) { w.neverHeals = true }, Fail, "to be heard again", "b", 2},
		{"the site does not cut itself off", isolate, func(w *world) { w.disobeys = true }, Fail, "a to be cut off", "a", 1},
		{"requests to another site fail", isolate, func(w *world) { w.broken = "c" }, Fail, "requests failed", "b", 2},
		{"requests to the lost site fail, which does not count", isolate, func(w *world) { w.broken = "a" }, Pass, "", "b", 2},
		{"the lost site restarts, and stays cut off", isolate, func(w *world) { w.restarts = 10 * time.Second }, Pass, "", "b", 2},
		{"the cut ends early", isolate, func(w *world) { w.restarts, w.forgets = 10*time.Second, true }, Fail, "the cut ended 10s early: a-1 was restarted", "b", 2},
		{"the switchover fails", Request{Kind: Switchover, Site: "b"}, func(w *world) { w.switchErr = failover.ErrRolledBack }, Fail, "rolled back", "a", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				tc.world(w)
				r := w.drill(t, w.runner(t), tc.q)
				if r.Verdict != tc.verdict || !strings.Contains(r.Why, tc.why) || (tc.why == "") != (r.Why == "") {
					text, _ := r.Render("markdown")
					t.Fatalf("%s: %q, want %s: %q\n%s", r.Verdict, r.Why, tc.verdict, tc.why, text)
				}
				if p := w.State().Primary; p.Site != tc.primary || p.Epoch != tc.epoch || r.Primary.ToEpoch != tc.epoch {
					t.Errorf("primary %+v, report %+v; want %s in epoch %d", p, r.Primary, tc.primary, tc.epoch)
				}
				if tc.verdict != Pass {
					return
				}
				if restarted := w.restarts > 0; restarted != strings.Contains(fmt.Sprint(r.Timeline), "a-1 was restarted during the cut, and stayed cut off") {
					t.Errorf("the timeline: %+v", r.Timeline)
				}
				if moved := tc.epoch > 1; moved != (r.RTO.Achieved != nil) {
					t.Errorf("RTO %v", r.RTO.Achieved)
				}
				if f := w.State().LastFailover; f != nil && !f.Acknowledged {
					t.Error("the failover that the drill caused waits for an acknowledgement")
				}
				if r.RPO.Achieved != nil || r.JobsLost != nil || r.RecordsAtRisk != nil {
					t.Errorf("figures that were not measured: %+v", r)
				}
			})
		})
	}
}

// RTO counts from when the lost primary was last heard to the first answer of the new
// one.
func TestRTOIsMeasuredFromOutside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.drill(t, w.runner(t), Request{Kind: Isolation, Site: "a", For: 20 * time.Second})
		if rto := *r.RTO.Achieved; rto < 3 || rto > 3.5 {
			t.Errorf("%.2f s, want 3 s of isolation, a ping interval and a poll interval", rto)
		}
		if *r.RTO.Target != 900 || r.Requests < 500 {
			t.Errorf("target %v, %d requests", *r.RTO.Target, r.Requests)
		}
	})
}

func TestDrillIsAborted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.runner(t)
		d, err := r.Start(t.Context(), Request{Kind: Isolation, Site: "a", For: time.Minute, By: "ann"})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		if live, ok := r.Live(d.ID); !ok || live.Verdict != "" || len(live.Timeline) < 2 {
			t.Errorf("so far: %v %+v", ok, live)
		}
		if _, err := r.Start(t.Context(), Request{Kind: Switchover, Site: "b"}); !errors.Is(err, agreed.ErrDrillRunning) {
			t.Errorf("a second one: %v", err)
		}
		if err := r.Abort(t.Context(), "nothing", "bob"); !errors.Is(err, ErrUnknown) {
			t.Errorf("abort of nothing: %v", err)
		}
		if err := r.Abort(t.Context(), d.ID, "bob"); err != nil {
			t.Fatal(err)
		}
		report := w.report(t, d.ID)
		if report.Verdict != Aborted || !strings.Contains(report.Why, "aborted by bob; a heals by itself by") {
			t.Errorf("%s: %s", report.Verdict, report.Why)
		}
		if err := r.Abort(t.Context(), d.ID, "bob"); !errors.Is(err, agreed.ErrDrillEnded) {
			t.Errorf("abort again: %v", err)
		}
	})
}

func TestDrillsThatCannotBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.runner(t)
		for _, tc := range []struct {
			q    Request
			want error
		}{
			{Request{Kind: "fire", Site: "a"}, ErrInvalid},
			{Request{Kind: Isolation, Site: "x"}, failover.ErrPrecheck},
			{Request{Kind: Isolation, Site: "b"}, ErrWrongPlace},
		} {
			if _, err := r.Start(t.Context(), tc.q); !errors.Is(err, tc.want) {
				t.Errorf("%+v: %v, want %v", tc.q, err, tc.want)
			}
		}
		for _, tc := range []struct {
			site string
			want error
		}{{"a", nil}, {"b", ErrWrongPlace}} {
			if _, _, err := r.Plan(Request{Kind: Isolation, Site: tc.site}); !errors.Is(err, tc.want) {
				t.Errorf("the plan for %s: %v, want %v", tc.site, err, tc.want)
			}
		}
		if n := len(w.State().Drills); n != 0 {
			t.Errorf("%d records of drills that did not begin", n)
		}
		// This drill runs on another node: it is in the agreed state only.
		other := agreed.DrillRecord{ID: "drill-other", Kind: "switchover", AbandonedAt: time.Now().Add(time.Minute)}
		if _, err := w.Propose(t.Context(), agreed.CmdDrillPut, other); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Start(t.Context(), Request{Kind: Isolation, Site: "a"}); !errors.Is(err, failover.ErrPrecheck) || !strings.Contains(fmt.Sprint(err), "drill-other") {
			t.Errorf("beside a drill of another node: %v", err)
		}
		time.Sleep(time.Minute)
		// The other drill's runner died: after AbandonedAt it does not count.
		if got := w.drill(t, r, Request{Kind: Switchover, Site: "b"}); got.Verdict != Pass {
			t.Errorf("%s: %s", got.Verdict, got.Why)
		}
	})
}

// A node that stops ends its drill, which would look running otherwise.
func TestDrillOfANodeThatStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.runner(t)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		o := r.o
		o.Node = "b-2"
		second := NewRunner(o)
		go func() { ended <- second.Run(ctx) }()
		d, err := second.Start(t.Context(), Request{Kind: Isolation, Site: "c", For: time.Minute, By: "ann"})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if got := w.report(t, d.ID); got.Verdict != Aborted || !strings.Contains(got.Why, "stopping") {
			t.Errorf("%s: %s", got.Verdict, got.Why)
		}
	})
}

func TestLastSuccessIsAbsentUntilThereIsOne(t *testing.T) {
	s := &agreed.State{Drills: []agreed.DrillRecord{{ID: "x", Verdict: "fail", EndedAt: time.Unix(2000, 0)}}}
	reg := prometheus.NewRegistry()
	reg.MustRegister(Metrics{State: func() *agreed.State { return s }})
	if n, err := testutil.GatherAndCount(reg); n != 0 || err != nil {
		t.Errorf("%d samples, %v", n, err)
	}
	s = &agreed.State{Drills: append(s.Drills, agreed.DrillRecord{ID: "y", Verdict: "pass", EndedAt: time.Unix(1000, 0)})}
	want := "# HELP dsnode_drill_last_success_timestamp_seconds When the last drill that passed ended.\n" +
		"# TYPE dsnode_drill_last_success_timestamp_seconds gauge\ndsnode_drill_last_success_timestamp_seconds 1000\n"
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}
