//go:build linux

package lab

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
)

// Audit compares the status of every node with what the test knows: which nodes
// can't hear each other, and since when.
type Audit struct {
	lab      *Lab
	patience time.Duration

	mu     sync.Mutex // guards all below
	faults []fault
	broken []string      // statuses that can't be true
	read   int           // statuses compared
	late   time.Duration // the longest time after a fault at which a status was still healthy
}

// fault is a time in which a node hears no node of a site. Without a site it is a
// time in which the cluster is not healthy though all nodes hear each other.
type fault struct {
	observer string // node
	site     string
	from, to time.Time // to is zero while it lasts
}

const (
	auditEvery = 200 * time.Millisecond
	// statusWithin is how long after the patience a status may still be healthy.
	statusWithin = 2 * time.Second
	// inFlight is the greatest age of a packet that arrives just as a fault begins.
	inFlight = 500 * time.Millisecond
)

// StartAudit begins at once and ends with the test. The test fails when a status
// was false.
func (l *Lab) StartAudit() *Audit {
	l.t.Helper()
	a := &Audit{lab: l, patience: config.TimingFrom(0).Patience}
	stop := l.watchNodes(auditEvery, a.look)
	l.t.Cleanup(func() {
		stop()
		for _, broken := range a.Broken() {
			l.t.Errorf("a status was false: %s", broken)
		}
		l.t.Logf("%d statuses compared; the latest healthy one came %v after a fault", a.read, a.late.Round(time.Millisecond))
	})
	return a
}

// Unreachable says that from now on no node of the other sites hears this one and,
// if the site's nodes run, that they hear no other site. Call it as soon as that
// is so.
func (a *Audit) Unreachable(site *Site, running bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for _, other := range a.lab.Sites {
		if other == site {
			continue
		}
		for _, n := range other.Nodes {
			a.faults = append(a.faults, fault{observer: n.Name, site: site.Name, from: now})
		}
		if running {
			for _, n := range site.Nodes {
				a.faults = append(a.faults, fault{observer: n.Name, site: other.Name, from: now})
			}
		}
	}
}

// Unhealthy says that from now on the cluster is not healthy, though all nodes hear
// each other.
func (a *Audit) Unhealthy() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range a.lab.Nodes() {
		a.faults = append(a.faults, fault{observer: n.Name, from: time.Now()})
	}
}

// Heal ends what Unreachable and Unhealthy said. Call it right before the test
// ends the faults.
func (a *Audit) Heal() {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for i := range a.faults {
		if a.faults[i].to.IsZero() {
			a.faults[i].to = now
		}
	}
}

// Broken describes the false statuses so far.
func (a *Audit) Broken() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]string(nil), a.broken...)
}

func (a *Audit) look(ctx context.Context, n *Node) {
	if !n.Running() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	asked := time.Now()
	if status, err := n.Status(ctx); err == nil {
		a.compare(status, asked, time.Now())
	}
}

// compare checks one status, which is of some moment between asked and answered.
func (a *Audit) compare(s admin.Status, asked, answered time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.read++
	for _, n := range s.Nodes {
		if n.Name != s.Observer.Node && n.LastHeardSeconds != nil && *n.LastHeardSeconds == 0 {
			a.report(s, asked, "it heard %s exactly now", n.Name)
		}
	}
	for _, f := range a.faults {
		if f.observer != s.Observer.Node || asked.Before(f.from) || (!f.to.IsZero() && answered.After(f.to)) {
			continue
		}
		a.compareDuring(f, s, asked)
	}
}

// compareDuring checks a status that a node gave during a fault.
func (a *Audit) compareDuring(f fault, s admin.Status, asked time.Time) {
	since := asked.Sub(f.from)
	for _, n := range s.Nodes {
		if n.Site != f.site {
			continue
		}
		if n.LastHeardSeconds != nil && *n.LastHeardSeconds < (since-inFlight).Seconds() {
			a.report(s, asked, "it heard %s %.2f s ago, which has been impossible for %v", n.Name, *n.LastHeardSeconds, since)
		}
		if since > a.patience+statusWithin && n.State == admin.NodeAlive {
			a.report(s, asked, "it shows %s as alive, %v after the last packet", n.Name, since)
		}
	}
	if s.Healthy {
		a.late = max(a.late, since)
	}
	if since <= a.patience+statusWithin {
		return
	}
	if s.Healthy {
		a.report(s, asked, "it is healthy, %v after a fault (unreachable site: %q)", since, f.site)
	}
	for _, site := range s.Sites {
		if site.Name != f.site {
			continue
		}
		if site.State == admin.SiteHealthy || site.State == admin.SiteDegraded {
			a.report(s, asked, "it shows site %s as %s, %v after the last packet", f.site, site.State, since)
		}
		if site.UpstreamsHealthy != nil {
			a.report(s, asked, "it shows %d healthy upstreams of site %s, %v after the last packet", *site.UpstreamsHealthy, f.site, since)
		}
		if r := site.Replication; r != nil && r.LagSeconds != nil && *r.LagSeconds < (since-inFlight).Seconds() {
			a.report(s, asked, "its lag behind site %s is %.2f s, %v after the last packet", f.site, *r.LagSeconds, since)
		}
	}
}

func (a *Audit) report(s admin.Status, asked time.Time, format string, args ...any) {
	if len(a.broken) < maxBroken {
		a.broken = append(a.broken, fmt.Sprintf("%s said at %s: ", s.Observer.Node, asked.Format("15:04:05.000"))+fmt.Sprintf(format, args...))
	}
}
