//go:build linux

package lab

import (
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// Statuses at some time after their observer has lost contact with a site, true and
// false ones.
func TestAuditFindsFalseStatuses(t *testing.T) {
	lost := time.Unix(1000, 0)
	seconds := func(f float64) *float64 { return &f }
	count := func(n int) *int { return &n }
	correct := func() admin.Status {
		return admin.Status{
			Observer: admin.Observer{Node: "a-1", Site: "a"},
			Nodes: []admin.NodeStatus{
				{Name: "a-1", Site: "a", State: admin.NodeAlive, LastHeardSeconds: seconds(0)},
				{Name: "b-1", Site: "b", State: admin.NodeDead, LastHeardSeconds: seconds(6.1)},
			},
			Sites: []admin.SiteStatus{{Name: "b", State: admin.SiteDown, NodesAlive: count(0)}},
		}
	}
	for name, c := range map[string]struct {
		change func(*admin.Status)
		after  time.Duration
		want   string
	}{
		"correct":            {func(*admin.Status) {}, 6 * time.Second, ""},
		"healthy":            {func(s *admin.Status) { s.Healthy = true }, 6 * time.Second, "healthy"},
		"healthy, but early": {func(s *admin.Status) { s.Healthy = true }, 4 * time.Second, ""},
		"after the fault":    {func(s *admin.Status) { s.Healthy = true }, 11 * time.Second, ""},
		"alive":              {func(s *admin.Status) { s.Nodes[1].State = admin.NodeAlive }, 6 * time.Second, "alive"},
		"heard lately":       {func(s *admin.Status) { s.Nodes[1].LastHeardSeconds = seconds(1) }, 6 * time.Second, "impossible"},
		"heard exactly now":  {func(s *admin.Status) { s.Nodes[1].LastHeardSeconds = seconds(0) }, 0, "exactly now"},
		"site degraded":      {func(s *admin.Status) { s.Sites[0].State = admin.SiteDegraded }, 6 * time.Second, "degraded"},
		"no upstream":        {func(s *admin.Status) { s.Sites[0].UpstreamsHealthy = count(0) }, 6 * time.Second, "upstreams"},
		"no lag": {func(s *admin.Status) {
			s.Sites[0].Replication = &admin.Replication{LagSeconds: seconds(0)}
		}, 6 * time.Second, "behind"},
	} {
		t.Run(name, func(t *testing.T) {
			a := &Audit{patience: 2500 * time.Millisecond, faults: []fault{
				{observer: "a-1", site: "b", from: lost, to: lost.Add(10 * time.Second)},
				{observer: "c-1", site: "a", from: lost},
			}}
			s := correct()
			c.change(&s)
			a.compare(s, lost.Add(c.after), lost.Add(c.after+time.Millisecond))
			got := strings.Join(a.Broken(), "; ")
			if (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
				t.Errorf("found %q, want %q", got, c.want)
			}
		})
	}
}
