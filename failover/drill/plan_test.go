package drill

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/failover"
)

// healthyView is a cluster of three sites, 1+1+1, as a node of b sees it.
func healthyView() View {
	return View{
		Site: "b", Primary: "a", Lease: time.Second,
		Sites: []SiteView{
			{Name: "a", Nodes: 1, Ready: 1, UpstreamsHealthy: 1, Voters: 1},
			{Name: "b", Nodes: 1, Ready: 1, UpstreamsHealthy: 1, Voters: 1},
			{Name: "c", Nodes: 1, Ready: 1, UpstreamsHealthy: 1, Voters: 1},
		},
	}
}

func TestPlan(t *testing.T) {
	isolate := Request{Kind: Isolation, Site: "a", For: time.Minute}
	for _, tc := range []struct {
		name   string
		q      Request
		change func(*View)
		blocks string // names of the checks that block, in order
	}{
		{"isolate the primary", isolate, func(*View) {}, ""},
		{"isolate another", Request{Kind: Isolation, Site: "c", For: time.Minute}, func(*View) {}, ""},
		{"switch over", Request{Kind: Switchover, Site: "b"}, func(*View) {}, ""},
		{"an unknown site", Request{Kind: Isolation, Site: "x", For: time.Minute}, func(*View) {}, "site_known"},
		{"without a lease", isolate, func(v *View) { v.Lease = -time.Second }, "quorum"},
		{"quarantined", isolate, func(v *View) { v.Quarantined = true }, "not_quarantined"},
		{"another drill runs", isolate, func(v *View) { v.Running = "drill-x" }, "no_drill"},
		{"a switchover runs", isolate, func(v *View) { v.SwitchoverOpen = true }, "no_switchover"},
		{"not healthy", isolate, func(v *View) { v.Unhealthy = []string{"site c is down"} }, "healthy"},
		{
			"not healthy, waived",
			Request{Kind: Isolation, Site: "a", For: time.Minute, Waive: []string{"healthy"}},
			func(v *View) { v.Unhealthy = []string{"site c is down"} }, "",
		},
		{
			"no quorum can't be waived",
			Request{Kind: Isolation, Site: "a", For: time.Minute, Waive: []string{"quorum"}},
			func(v *View) { v.Lease = 0 }, "quorum",
		},
		{"a failover waits to be acknowledged", isolate, func(v *View) { v.Unacknowledged = true }, "acknowledged"},
		{"asked on a node of the site", isolate, func(v *View) { v.Site = "a" }, "runs_elsewhere"},
		{"the site holds the majority", isolate, func(v *View) { v.Sites[0].Voters = 3 }, "others_have_quorum"},
		{"exactly half is no quorum", isolate, func(v *View) { v.Sites[2].Voters = 0 }, "others_have_quorum,voters_placed"},
		{"voters are not all placed yet", isolate, func(v *View) { v.Sites[0].Voters, v.Sites[2].Voters = 0, 0 }, "voters_placed"},
		{"no other site can serve", isolate, func(v *View) { v.Sites[1].UpstreamsHealthy, v.Sites[2].Ready = 0, 0 }, "others_can_serve"},
		{"two sites have no witness", isolate, func(v *View) { v.Sites = v.Sites[:2]; v.Sites[1].Voters = 2 }, "loss_confirmed"},
		{"promotions are paused", isolate, func(v *View) { v.Held = true }, "not_held"},
		{"paused promotions don't matter when another site is isolated", Request{Kind: Isolation, Site: "c", For: time.Minute}, func(v *View) { v.Held = true }, ""},
		{"the coordinator refuses", Request{Kind: Switchover, Site: "a"}, func(v *View) {
			v.Handoff = []failover.Check{{Name: "quorum", OK: true}, {Name: "target_not_primary", Detail: "it is"}}
		}, "target_not_primary"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := healthyView()
			tc.change(&v)
			var names []string
			for _, c := range blocking(Plan(v, tc.q), tc.q.Waive) {
				if c.Detail == "" {
					t.Errorf("%s has no detail", c.Name)
				}
				names = append(names, c.Name)
			}
			if got := strings.Join(names, ","); got != tc.blocks {
				t.Errorf("blocked by %q, want %q", got, tc.blocks)
			}
			seen := map[string]bool{}
			for _, c := range Plan(v, tc.q) {
				if seen[c.Name] {
					t.Errorf("check %s is there twice", c.Name)
				}
				seen[c.Name] = true
			}
		})
	}
}

func TestInvalidRequests(t *testing.T) {
	for _, q := range []Request{
		{},
		{Kind: "fire", Site: "a"},
		{Kind: Isolation},
		{Kind: Isolation, Site: "a", For: time.Second},
		{Kind: Isolation, Site: "a", For: time.Hour},
		{Kind: Switchover, Site: "a", For: time.Minute},
	} {
		if _, err := q.Normal(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", q, err)
		}
	}
	q, err := Request{Kind: Isolation, Site: "a"}.Normal()
	if err != nil || q.For != DefaultFor {
		t.Errorf("%+v, %v", q, err)
	}
}

func TestJudge(t *testing.T) {
	five, yes, no := 5.0, true, false
	good := Outcome{
		Kind: Isolation, Site: "a", Primary: Change{From: "a", FromEpoch: 1, To: "b", ToEpoch: 2}, Moves: 1,
		RTO: &five, RTOTarget: 900, Requests: 100, InPlace: true,
	}
	for _, tc := range []struct {
		name    string
		change  func(*Outcome)
		verdict Verdict
		missed  string
	}{
		{"all criteria hold", func(*Outcome) {}, Pass, ""},
		{"returned", func(o *Outcome) { o.Returned, o.Moves, o.Primary.ToEpoch = &yes, 2, 3 }, Pass, ""},
		{"not the primary: no RTO", func(o *Outcome) { o.Moves, o.Primary.ToEpoch, o.RTO = 0, 1, nil }, Pass, ""},
		{"a switchover has no site to heal", func(o *Outcome) { o.Kind, o.InPlace = Switchover, false }, Pass, ""},
		{"one change of the primary too many", func(o *Outcome) { o.Primary.ToEpoch = 3 }, Fail, "epoch"},
		{"no site was promoted", func(o *Outcome) { o.Primary.ToEpoch, o.RTO = 1, nil }, Fail, "epoch,rto"},
		{"too slow", func(o *Outcome) { o.RTOTarget = 4 }, Fail, "rto"},
		{"one request failed", func(o *Outcome) { o.Errors = 1 }, Fail, "client_errors"},
		{"no requests", func(o *Outcome) { o.Requests = 0 }, Fail, "client_errors"},
		{"the site did not come back", func(o *Outcome) { o.InPlace = false }, Fail, "in_its_place"},
		{"not returned", func(o *Outcome) { o.Returned = &no }, Fail, "returned"},
		{"a step failed", func(o *Outcome) { o.Failed = "waited 15s" }, Fail, "completed"},
		{"aborted", func(o *Outcome) { o.Aborted = "aborted by ann"; o.Errors = 5 }, Aborted, "completed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := good
			tc.change(&o)
			verdict, criteria := Judge(o)
			var missed []string
			for _, c := range criteria {
				if !c.OK {
					missed = append(missed, c.Name)
				}
			}
			if verdict != tc.verdict || strings.Join(missed, ",") != tc.missed {
				t.Errorf("%s, missed %q; want %s, %q", verdict, missed, tc.verdict, tc.missed)
			}
		})
	}
}

var update = flag.Bool("update", false, "rewrite the golden files")

func TestReportIsRendered(t *testing.T) {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	end := at.Add(70 * time.Second)
	rto, target, rpo := 4.25, 900.0, 3600.0
	r := Report{
		Format: reportFormat, ID: "drill-abc", Kind: Isolation, Site: "a", By: "ann@desk", Runner: "b-1", Rehearsed: "the loss of the primary",
		StartedAt: at, EndedAt: &end, Primary: Change{From: "a", FromEpoch: 1, To: "b", ToEpoch: 2},
		Checks: []Precheck{
			{Check: failover.Check{Name: "quorum", OK: true, Detail: "good for 1s"}},
			{Check: failover.Check{Name: "healthy", Detail: "site c | is <b>down</b>", Waivable: true}, WaivedBy: "ann@desk"},
		},
		Timeline: []Event{{At: at, What: "started"}, {At: at.Add(time.Second), After: 1, What: "cut off", Detail: "no node of a is heard"}},
		RTO:      Figure{Achieved: &rto, Target: &target}, RPO: Figure{Target: &rpo},
		Clients: []Clients{
			{Site: "a", Requests: 10, Errors: 1, Samples: []ClientError{{At: at, Node: "a-1", Asked: "GET /v1/models", Error: "reset"}}},
			{Site: "b", Judged: true, Requests: 20, Slowest: 0.031},
		},
		Requests: 20, Criteria: []Criterion{{Name: "rto", OK: true, Detail: "4.25 s"}, {Name: "epoch", Detail: "rose by 2"}},
		Verdict: Fail, Why: "rose by 2",
	}
	for _, format := range Formats() {
		got, err := r.Render(format)
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", "report."+format)
		if *update {
			if err := os.WriteFile(golden, got, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Errorf("%s differs from %s (go test -update rewrites it):\n%s", format, golden, got)
		}
	}
	if _, err := r.Render("pdf"); !errors.Is(err, ErrInvalid) {
		t.Errorf("pdf: %v", err)
	}
}

// A report that is too large is cut, not refused: the agreed state keeps fifty.
func TestReportIsBounded(t *testing.T) {
	r := Report{Format: reportFormat}
	for range 1000 {
		r.Timeline = append(r.Timeline, Event{What: "x", Detail: strings.Repeat("y", maxDetail)})
	}
	text, err := r.Encode()
	if err != nil || len(text) > maxReportSize {
		t.Errorf("%d bytes, %v", len(text), err)
	}
	if back, err := DecodeReport(text); err != nil || len(back.Timeline) != 20 {
		t.Errorf("%d events, %v", len(back.Timeline), err)
	}
}

func FuzzDecodeReport(f *testing.F) {
	text, err := Report{Format: reportFormat, ID: "drill-x", Verdict: Pass}.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeReport(b)
		if err != nil {
			return
		}
		for _, format := range Formats() {
			if _, err := r.Render(format); err != nil {
				t.Fatalf("%s: %v", format, err)
			}
		}
	})
}
