package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// statusTable writes a status for people. It fits 100 columns when names have up to
// about 12 characters.
type statusTable struct {
	admin.Status
	now time.Time // by the clock of the node that answered, as are all times of a status
}

func (t statusTable) write(w io.Writer, p palette) error {
	if err := emit(w, "%s\n", t.headline(p)); err != nil {
		return err
	}
	for _, reason := range t.Reasons {
		if err := emit(w, "  - %s\n", printable(reason)); err != nil {
			return err
		}
	}
	for _, fact := range t.facts() {
		if err := emit(w, "%s  %s\n", p.paint(faint, fmt.Sprintf("%-10s", fact[0])), printable(fact[1])); err != nil {
			return err
		}
	}
	for _, table := range []grid{t.sites(), t.nodes()} {
		if len(table.rows) == 0 {
			continue
		}
		if err := emit(w, "\n"); err != nil {
			return err
		}
		if err := table.write(w, p); err != nil {
			return err
		}
	}
	return nil
}

func (t statusTable) headline(p palette) string {
	name := p.paint(bold, printable(t.Cluster))
	switch {
	case t.Healthy:
		return name + " is " + p.paint(green, "healthy")
	case t.Raft.Quorum:
		return name + " is " + p.paint(yellow, "degraded")
	}
	return name + " has " + p.paint(red, "no quorum")
}

// facts are the lines between the headline and the tables, each with its label.
func (t statusTable) facts() [][2]string {
	primary := unknown
	if p := t.Primary; p != nil {
		primary = fmt.Sprintf("%s, epoch %d (%s)%s", p.Site, p.Epoch, p.Reason, t.since(&p.Since))
	}
	quorum := "no quorum"
	if t.Raft.Quorum {
		quorum = "quorum"
	}
	leader := text(t.Raft.Leader)
	if t.Raft.LeaderSite != nil {
		leader += " at " + *t.Raft.LeaderSite
	}
	facts := [][2]string{
		{"primary", primary},
		{"generation", number(t.Generation)},
		{"raft", fmt.Sprintf("%s%s, leader %s", quorum, t.since(t.Raft.QuorumSince), leader)},
		{"", fmt.Sprintf("term %s, commit %s, %s voters", number(t.Raft.Term), number(t.Raft.CommitIndex), number(t.Raft.Voters))},
	}
	if f := t.FeatureLevel; f != nil && f.Agreed < f.Newest {
		held := "all nodes support it"
		if len(f.HeldBy) > 0 {
			held = "held by " + strings.Join(f.HeldBy, ", ") + " (an older version, or feature_level in node.yaml)"
		}
		facts = append(facts, [2]string{"features", fmt.Sprintf("level %d of %d, %s", f.Agreed, f.Newest, held)})
	}
	if j := t.Jobs; j != nil {
		facts = append(facts, [2]string{"jobs", fmt.Sprintf("%s queued, %s running, %s succeeded, %s failed",
			number(j.Queued), number(j.Running), number(j.Succeeded), number(j.Failed))})
	}
	if f := t.LastFailover; f != nil {
		facts = append(facts, [2]string{"failover", fmt.Sprintf("%s, %s to %s, epoch %d, %s ago, took %s",
			f.Kind, f.From, f.To, f.Epoch, age(t.now.Sub(f.At)), secondsText(f.RTOSeconds))})
		switch {
		case f.RecordsAtRisk != nil && f.RPOSeconds != nil && *f.RecordsAtRisk > 0:
			facts = append(facts, [2]string{"", fmt.Sprintf("up to %d job records of %s at %s may be lost", *f.RecordsAtRisk, secondsText(f.RPOSeconds), f.From)})
		case f.RecordsAtRisk == nil && f.Kind == "unplanned":
			facts = append(facts, [2]string{"", "it is not known what was lost at " + f.From})
		}
		if !f.Acknowledged {
			facts = append(facts, [2]string{"", "not acknowledged: run dsnode failover ack when you have seen it"})
		}
	}
	if h := t.Hold; h != nil {
		facts = append(facts, [2]string{"hold", fmt.Sprintf("automatic failovers are paused by %s%s%s; dsnode failover resume ends the pause",
			h.By, t.since(&h.At), inBrackets(h.Reason))})
	}
	if site := t.FailbackAvailable; site != nil {
		facts = append(facts, [2]string{"failback", fmt.Sprintf("available: dsnode failover --to %s", *site)})
	}
	for i, warning := range t.Warnings {
		label := "warning"
		if i > 0 {
			label = ""
		}
		facts = append(facts, [2]string{label, warning})
	}
	for _, a := range t.Alerts {
		facts = append(facts, [2]string{"alert", fmt.Sprintf("%s %s %s%s", a.Name, a.State, a.Site, t.since(&a.Since))})
	}
	return append(facts, [2]string{"seen by", fmt.Sprintf("%s at %s, dsnode %s, %s",
		t.Observer.Node, t.Observer.Site, t.Version, t.ObservedAt.UTC().Format(time.RFC3339))})
}

func (t statusTable) sites() grid {
	g := grid{heads: []string{"SITE", "CITY", "ROLE", "STATE", "NODES", "UPSTREAMS", "HEARD", "LAG"}}
	for _, s := range t.Sites {
		lag := unknown
		if s.Replication != nil {
			lag = secondsText(s.Replication.LagSeconds)
		}
		g.add(plain(s.Name), plain(s.City), plain(string(s.Role)), stateCell(string(s.State)),
			plain(number(s.NodesAlive)+"/"+number(s.NodesTotal)),
			plain(number(s.UpstreamsHealthy)+"/"+number(s.UpstreamsTotal)),
			plain(secondsText(s.LastHeardSeconds)), plain(lag))
	}
	return g
}

func (t statusTable) nodes() grid {
	g := grid{heads: []string{"NODE", "SITE", "STATE", "RAFT", "HEARD", "VERSION", "API", "PID", "UP"}}
	for _, n := range t.Nodes {
		g.add(plain(n.Name), plain(n.Site), nodeState(n), plain(raftPart(n)), plain(secondsText(n.LastHeardSeconds)),
			plain(n.Version), plain(n.API), plain(number(n.PID)), plain(upFor(n, t.now)))
	}
	return g
}

func nodeState(n admin.NodeStatus) cell {
	switch {
	case n.Draining != nil && *n.Draining:
		return cell{string(n.State) + ", draining", yellow}
	case n.Via != "" && n.State == admin.NodeAlive:
		return cell{"alive through " + n.Via, yellow}
	}
	return stateCell(string(n.State))
}

func upFor(n admin.NodeStatus, now time.Time) string {
	if n.StartedAt == nil || n.State != admin.NodeAlive {
		return unknown
	}
	return age(now.Sub(*n.StartedAt))
}

func raftPart(n admin.NodeStatus) string {
	switch {
	case n.Leader != nil && *n.Leader:
		return "leader"
	case n.Voter == nil:
		return unknown
	case *n.Voter:
		return "voter"
	}
	return "non-voter"
}

// stateCell colours a state.
func stateCell(state string) cell {
	switch state {
	case "healthy", "alive", "active":
		return cell{state, green}
	case "degraded", "suspect", "expired":
		return cell{state, yellow}
	case "down", "isolated", "dead", "unhealthy", "revoked":
		return cell{state, red}
	}
	return plain(state)
}

// unknown is shown for a value that is not known.
const unknown = "-"

func number[T int | int64 | uint64](n *T) string {
	if n == nil {
		return unknown
	}
	return strconv.FormatInt(int64(*n), 10) //nolint:gosec // counters stay far below 2^63
}

func text(s *string) string {
	if s == nil || *s == "" {
		return "unknown"
	}
	return *s
}

// since is appended to a text; it is empty when the time is unknown.
func (t statusTable) since(at *time.Time) string {
	if at == nil || at.IsZero() {
		return ""
	}
	return fmt.Sprintf(" for %s (since %s)", age(t.now.Sub(*at)), at.UTC().Format(time.RFC3339))
}

func inBrackets(text string) string {
	if text == "" {
		return ""
	}
	return " (" + text + ")"
}

func secondsText(s *float64) string {
	if s == nil {
		return unknown
	}
	return age(time.Duration(*s * float64(time.Second)))
}

// age formats a duration with its two largest units: 0.2s, 12s, 3m5s, 4h10m, 12d3h.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "0s" // the observer's clock was set back
	case d < 10*time.Second:
		return strconv.FormatFloat(d.Seconds(), 'f', 1, 64) + "s"
	case d < time.Minute:
		return d.Truncate(time.Second).String()
	case d < time.Hour:
		return strings.TrimSuffix(d.Truncate(time.Second).String(), "0s")
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}
