// Package drill rehearses failovers. It checks whether a drill may begin (Plan), runs it
// on a node outside the isolated site (Runner), measures from outside what clients see
// (probe.go), and writes a report with a verdict (report.go, render.go). Start at
// Runner.Start.
//
// The runner cuts nothing off itself. An isolation is a record in the agreed state: the
// nodes of the site obey it and end it by their own timers (isolation.go).
package drill

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dsnode/dsnode/failover"
)

// Kind is what is rehearsed.
type Kind string

const (
	Switchover Kind = "switchover" // move the primary to the site, without loss
	Isolation  Kind = "isolation"  // cut the site off; this is a real failover if it is the primary
)

// Kinds are all of them, for messages.
func Kinds() []string { return []string{string(Switchover), string(Isolation)} }

// How long an isolation may last, and its default.
const (
	DefaultFor = time.Minute
	MinFor     = 10 * time.Second // an election and a promotion fit
	MaxFor     = 10 * time.Minute
)

// Lead is the time between the agreement on an isolation and the cut. The site may have
// the raft leader: without Lead it would cut itself off before the other nodes learn
// what was agreed.
const Lead = 500 * time.Millisecond

// Why a request about drills is refused, besides failover.ErrPrecheck.
var (
	// ErrWrongPlace: a node of the site that is to be cut off was asked.
	ErrWrongPlace = errors.New("a node of another site must run this drill")
	// ErrInvalid: the request is not valid.
	ErrInvalid = errors.New("not a valid drill")
	// ErrUnknown: no record has this id.
	ErrUnknown = errors.New("no such drill")
)

// Request asks for a drill.
type Request struct {
	Kind Kind
	Site string
	// For is how long an isolation lasts; zero is DefaultFor.
	For time.Duration
	// Return asks for a switchover back to the site that was primary before.
	Return bool
	// Waive names checks that need not hold.
	Waive []string
	// ProbeModel adds chat completions of one token to the probe. They may cost money.
	// Empty: none.
	ProbeModel string
	By         string
}

// Normal fills in defaults, and refuses an invalid request with ErrInvalid.
func (r Request) Normal() (Request, error) {
	if !slices.Contains(Kinds(), string(r.Kind)) {
		return r, fmt.Errorf("%w: kind %q: this version rehearses %s", ErrInvalid, r.Kind, strings.Join(Kinds(), " and "))
	}
	if r.Site == "" {
		return r, fmt.Errorf("%w: say which site", ErrInvalid)
	}
	if r.Kind != Isolation {
		if r.For != 0 {
			return r, fmt.Errorf("%w: only an isolation lasts for a time", ErrInvalid)
		}
		return r, nil
	}
	if r.For == 0 {
		r.For = DefaultFor
	}
	if r.For < MinFor || r.For > MaxFor {
		return r, fmt.Errorf("%w: an isolation lasts %s to %s, not %s", ErrInvalid, MinFor, MaxFor, r.For)
	}
	return r, nil
}

// SiteView is a site as Plan sees it.
type SiteView struct {
	Name  string
	Nodes int
	// Ready nodes are heard, hold a lease and are in service.
	Ready            int
	UpstreamsHealthy int
	Voters           int
}

// View is all that Plan looks at, on the node that would run the drill.
type View struct {
	Site    string // of that node
	Sites   []SiteView
	Primary string
	Lease   time.Duration // rest of that node's lease

	Quarantined, Held bool
	// Unhealthy lists what is not healthy in the cluster; empty when it is healthy.
	Unhealthy []string
	// Running is the drill that runs now, empty when none does.
	Running        string
	SwitchoverOpen bool
	// Unacknowledged: no operator has acknowledged the last automatic failover.
	Unacknowledged bool
	// Handoff are the coordinator's checks of a switchover to the site.
	Handoff []failover.Check
}

// Plan gives the prechecks of a drill and whether they hold. The request must come from
// Normal. It is pure.
func Plan(v View, r Request) []failover.Check {
	var checks []failover.Check
	add := func(name string, ok, waivable bool, format string, args ...any) {
		checks = append(checks, failover.Check{Name: name, OK: ok, Waivable: waivable, Detail: fmt.Sprintf(format, args...)})
	}
	at := slices.IndexFunc(v.Sites, func(s SiteView) bool { return s.Name == r.Site })
	add("site_known", at >= 0, false, "site %s", r.Site)
	if at < 0 {
		return checks
	}
	add("quorum", v.Lease > 0, false, "this node's lease is good for %s", max(0, v.Lease).Round(time.Millisecond))
	add("not_quarantined", !v.Quarantined, false, "%s", either(v.Quarantined, "quarantined after a cold restart", "not quarantined"))
	add("no_drill", v.Running == "", false, "%s", either(v.Running != "", "drill "+v.Running+" is running", "no drill is running"))
	add("no_switchover", !v.SwitchoverOpen, false, "%s", either(v.SwitchoverOpen, "a switchover is under way", "none is under way"))
	add("healthy", len(v.Unhealthy) == 0, true, "%s", either(len(v.Unhealthy) > 0, strings.Join(v.Unhealthy, "; "), "the cluster is healthy"))
	add("acknowledged", !v.Unacknowledged, true, "%s", either(v.Unacknowledged,
		"the last automatic failover waits for dsnode failover ack", "no automatic failover waits to be acknowledged"))
	if r.Kind == Isolation {
		planIsolation(v, r, add)
	}
	for _, c := range v.Handoff {
		if !slices.ContainsFunc(checks, func(o failover.Check) bool { return o.Name == c.Name }) {
			checks = append(checks, c)
		}
	}
	return checks
}

func planIsolation(v View, r Request, add func(name string, ok, waivable bool, format string, args ...any)) {
	add("runs_elsewhere", v.Site != r.Site, false, "this node is at %s; the drill is run and measured from another site", v.Site)
	voters, apart := 0, 0
	var others []string
	for _, s := range v.Sites {
		voters += s.Voters
		switch {
		case s.Name == r.Site:
			apart = s.Voters
		case s.Ready > 0 && s.UpstreamsHealthy > 0:
			others = append(others, s.Name)
		}
	}
	add("others_have_quorum", 2*(voters-apart) > voters, false, "%d of %d voters are outside %s", voters-apart, voters, r.Site)
	add("others_can_serve", len(others) > 0, false, "ready with a healthy upstream: %s", either(len(others) > 0, strings.Join(others, ", "), "none"))
	// A new cluster, or one that has lost a voter, grows from one voter to three and has
	// two for a while.
	add("voters_placed", voters >= min(3, len(v.Sites)) && voters%2 == 1, true, "%d voters in %d sites", voters, len(v.Sites))
	if v.Primary != r.Site {
		return
	}
	// With a single other site no third one can confirm the loss.
	add("loss_confirmed", len(v.Sites) >= 3, true, "%d sites: %s", len(v.Sites),
		either(len(v.Sites) >= 3, "a third one confirms the loss", "no third one confirms the loss, so it takes 30 s without a lease"))
	add("not_held", !v.Held, false, "%s", either(v.Held, "automatic promotions are paused: dsnode failover resume", "automatic promotions are on"))
}

// Rehearses describes what a drill will do.
func Rehearses(v View, r Request) string {
	switch {
	case r.Kind == Switchover:
		return fmt.Sprintf("a planned switchover of the primary from %s to %s", v.Primary, r.Site)
	case r.Site == v.Primary:
		return fmt.Sprintf("the loss of the primary: %s is cut off from the other sites for %s, and another site takes over", r.Site, r.For)
	}
	return fmt.Sprintf("the loss of a site that is not the primary: %s is cut off from the other sites for %s, and %s stays the primary", r.Site, r.For, v.Primary)
}

// blocking are the checks that don't hold and are not waived.
func blocking(checks []failover.Check, waive []string) []failover.Check {
	return slices.DeleteFunc(slices.Clone(checks), func(c failover.Check) bool {
		return c.Passes(waive)
	})
}

func either(first bool, a, b string) string {
	if first {
		return a
	}
	return b
}
