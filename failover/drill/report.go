package drill

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
)

// Verdict is how a drill ended.
type Verdict string

const (
	Pass    Verdict = "pass"
	Fail    Verdict = "fail"
	Aborted Verdict = "aborted" // by an operator, or because its runner died
	Skipped Verdict = "skipped" // it could not begin
)

// reportFormat is the version of Report.
const reportFormat = 1

// Bounds of a report: the agreed state keeps fifty of them.
const (
	maxEvents     = 100
	maxDetail     = 400 // bytes of one detail
	maxSamples    = 5   // errors shown for each site
	maxReportSize = agreed.MaxDrillReport
)

// Report is the evidence of one drill. A value that was not measured is nil, and null in
// JSON.
type Report struct {
	Format    int        `json:"format"`
	ID        string     `json:"id"`
	Kind      Kind       `json:"kind"`
	Site      string     `json:"site"`
	By        string     `json:"by"`     // the operator
	Runner    string     `json:"runner"` // the node that ran it
	Rehearsed string     `json:"rehearsed"`
	StartedAt time.Time  `json:"started_at"`
	EndedAt   *time.Time `json:"ended_at"`

	Primary Change     `json:"primary"`
	Checks  []Precheck `json:"checks"`
	// Timeline has at most 100 events, in order.
	Timeline []Event `json:"timeline"`

	RTO Figure `json:"rto_seconds"`
	RPO Figure `json:"rpo_seconds"`
	// IdleSeconds is how long no site acted as primary during a switchover.
	IdleSeconds *float64 `json:"idle_seconds"`
	// InPlaceSeconds is the time from the end of the cut until the site was healthy.
	InPlaceSeconds *float64 `json:"in_place_seconds"`
	RecordsAtRisk  *int64   `json:"records_at_risk"`
	JobsLost       *int64   `json:"jobs_lost"`

	Clients  []Clients `json:"clients"`
	Requests int       `json:"requests"`
	Errors   int       `json:"errors"` // at judged sites

	Criteria []Criterion `json:"criteria"`
	Verdict  Verdict     `json:"verdict"` // empty while it runs
	Why      string      `json:"why"`     // for any verdict but pass
}

// Change is the primary before and after the drill.
type Change struct {
	From      string `json:"from"`
	FromEpoch uint64 `json:"from_epoch"`
	To        string `json:"to"`
	ToEpoch   uint64 `json:"to_epoch"`
}

// Precheck is a check before the drill.
type Precheck struct {
	failover.Check
	// WaivedBy is the operator who waived the check. Empty when it holds.
	WaivedBy string `json:"waived_by,omitempty"`
}

// Event is one line of the timeline.
type Event struct {
	At     time.Time `json:"at"`
	After  float64   `json:"after_seconds"` // since the start
	What   string    `json:"what"`
	Detail string    `json:"detail,omitempty"`
}

// Figure is a measured value and its target.
type Figure struct {
	Achieved *float64 `json:"achieved"`
	Target   *float64 `json:"target"`
}

// Clients is what the probe saw at one site.
type Clients struct {
	Site string `json:"site"`
	// Judged: errors at this site count. Those at the site that is cut off don't.
	Judged   bool `json:"judged"`
	Requests int  `json:"requests"`
	Errors   int  `json:"errors"`
	// Refused counts answers 401 and 403. The probe has no API key, so these count as
	// served.
	Refused int           `json:"refused"`
	Slowest float64       `json:"slowest_seconds"`
	Samples []ClientError `json:"samples"`
}

// ClientError is one error that the probe saw.
type ClientError struct {
	At    time.Time `json:"at"`
	Node  string    `json:"node"`
	Asked string    `json:"asked"`
	Error string    `json:"error"`
}

// Criterion is one condition of a pass.
type Criterion struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// Outcome is all that Judge looks at.
type Outcome struct {
	Kind Kind
	Site string
	// Aborted and Failed tell why the drill did not complete. Empty when it did.
	Aborted, Failed string
	Primary         Change
	// Moves is the expected number of changes of the primary.
	Moves     uint64
	RTO       *float64 // nil: no new primary answered
	RTOTarget float64
	Requests  int
	Errors    int
	// InPlace: after the cut the site was heard, caught up and healthy in time.
	InPlace  bool
	Returned *bool // nil: no return was asked for
}

// Judge gives the verdict and its criteria. It is pure.
func Judge(o Outcome) (Verdict, []Criterion) {
	var all []Criterion
	add := func(name string, ok bool, format string, args ...any) {
		all = append(all, Criterion{Name: name, OK: ok, Detail: fmt.Sprintf(format, args...)})
	}
	if o.Aborted != "" {
		add("completed", false, "%s", o.Aborted)
		return Aborted, all
	}
	add("completed", o.Failed == "", "%s", either(o.Failed != "", o.Failed, "every step ended in time"))
	moves := o.Primary.ToEpoch - o.Primary.FromEpoch
	add("epoch", moves == o.Moves, "the epoch rose by %d, from %d to %d, and should by %d", moves, o.Primary.FromEpoch, o.Primary.ToEpoch, o.Moves)
	if o.Moves > 0 {
		switch {
		case o.RTO == nil:
			add("rto", false, "no new primary answered")
		default:
			add("rto", *o.RTO <= o.RTOTarget, "%.2f s, the target is %.0f s", *o.RTO, o.RTOTarget)
		}
	}
	add("client_errors", o.Errors == 0 && o.Requests > 0, "%d of %d requests failed", o.Errors, o.Requests)
	if o.Kind == Isolation {
		add("in_its_place", o.InPlace, "%s %s", o.Site, either(o.InPlace, "is healthy again and did not become primary by itself", "did not become healthy again in time"))
	}
	if o.Returned != nil {
		add("returned", *o.Returned, "the primary %s", either(*o.Returned, "is back where it was", "did not go back"))
	}
	if slices.ContainsFunc(all, func(c Criterion) bool { return !c.OK }) {
		return Fail, all
	}
	return Pass, all
}

// Encode is the report as JSON, at most maxReportSize bytes.
func (r Report) Encode() ([]byte, error) {
	b, err := json.Marshal(r)
	if err == nil && len(b) > maxReportSize {
		// This takes hundreds of sites or checks. The timeline's end is worth more than
		// the clients' errors.
		for i := range r.Clients {
			r.Clients[i].Samples = nil
		}
		r.Timeline = r.Timeline[max(0, len(r.Timeline)-20):]
		b, err = json.Marshal(r)
	}
	if err != nil {
		return nil, fmt.Errorf("encode the drill's report: %w", err)
	}
	return b, nil
}

// DecodeReport reads the report of a drill's record.
func DecodeReport(b []byte) (Report, error) {
	var r Report
	if err := json.Unmarshal(b, &r); err != nil {
		return Report{}, fmt.Errorf("decode the drill's report: %w", err)
	}
	if r.Format != reportFormat {
		return Report{}, fmt.Errorf("the drill's report has format %d, this version reads %d", r.Format, reportFormat)
	}
	return r, nil
}

// brief cuts the text of a peer or of an error to maxDetail.
func brief(s string) string {
	if len(s) > maxDetail {
		return s[:maxDetail] + "…"
	}
	return s
}
