//go:build linux

package lab

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/node/admin"
)

// Audit compares what every node says with the truth, which only the test
// knows: who can't hear whom, and since when.
type Audit struct {
	lab      *Lab
	patience time.Duration

	mu     sync.Mutex // guards all below
	deaf   []deafness
	broken []string
	read   int
	late   time.Duration
}

// deafness: an observer hears none of a site's nodes. Without a site it is only
// that something is wrong.
type deafness struct {
	observer string
	site     string
	from, to time.Time // to is zero while it lasts
}

const (
	auditEvery = 200 * time.Millisecond
	// statusWithin is how long a status may stay healthy after a fault, on top of
	// the patience.
	statusWithin = 2 * time.Second
	// onTheWay is how old an answer may be that arrives just as a fault begins.
	onTheWay = 500 * time.Millisecond
)

// StartAudit begins at once, and ends with the test: then what was found false
// fails it.
func (l *Lab) StartAudit() *Audit {
	l.t.Helper()
	a := &Audit{lab: l, patience: cluster.TimingFrom(0).Patience}
	stop := l.watchNodes(auditEvery, a.look)
	l.t.Cleanup(func() {
		stop()
		for _, broken := range a.Broken() {
			l.t.Errorf("a status lied: %s", broken)
		}
		l.t.Logf("%d statuses compared with the truth; the last healthy one came %v after its fault", a.read, a.late.Round(time.Millisecond))
	})
	return a
}

// Lost says that from now on no node of the other sites hears this one, and,
// when it lives, that it hears none of them. It is called as soon as it is true.
func (a *Audit) Lost(site *Site, lives bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for _, other := range a.lab.Sites {
		if other == site {
			continue
		}
		for _, n := range other.Nodes {
			a.deaf = append(a.deaf, deafness{observer: n.Name, site: site.Name, from: now})
		}
		if lives {
			for _, n := range site.Nodes {
				a.deaf = append(a.deaf, deafness{observer: n.Name, site: other.Name, from: now})
			}
		}
	}
}

// Hurt says that from now on something is wrong, though everybody hears everybody.
func (a *Audit) Hurt() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range a.lab.Nodes() {
		a.deaf = append(a.deaf, deafness{observer: n.Name, from: time.Now()})
	}
}

// Found ends all that Lost and Hurt said. It is called right before it ends.
func (a *Audit) Found() {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for i := range a.deaf {
		if a.deaf[i].to.IsZero() {
			a.deaf[i].to = now
		}
	}
}

// Broken is what was found false so far, in words.
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

// compare holds one status against the truth; it is about some moment from
// asked to answered.
func (a *Audit) compare(s admin.Status, asked, answered time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.read++
	for _, n := range s.Nodes {
		if n.Name != s.Observer.Node && n.LastHeardSeconds != nil && *n.LastHeardSeconds == 0 {
			a.lie(s, asked, "it heard %s exactly now", n.Name)
		}
	}
	for _, d := range a.deaf {
		if d.observer != s.Observer.Node || asked.Before(d.from) || (!d.to.IsZero() && answered.After(d.to)) {
			continue
		}
		a.compareDeaf(s, d, asked)
	}
}

func (a *Audit) compareDeaf(s admin.Status, d deafness, asked time.Time) {
	since := asked.Sub(d.from)
	for _, n := range s.Nodes {
		if n.Site != d.site {
			continue
		}
		if n.LastHeardSeconds != nil && *n.LastHeardSeconds < (since-onTheWay).Seconds() {
			a.lie(s, asked, "it heard %s %.2f s ago, which has been impossible for %v", n.Name, *n.LastHeardSeconds, since)
		}
		if since > a.patience+statusWithin && n.State == admin.NodeAlive {
			a.lie(s, asked, "%s is alive, unheard for %v", n.Name, since)
		}
	}
	if s.Healthy {
		a.late = max(a.late, since)
	}
	if since <= a.patience+statusWithin {
		return
	}
	if s.Healthy {
		a.lie(s, asked, "healthy, %v after a fault (site lost: %q)", since, d.site)
	}
	for _, site := range s.Sites {
		if site.Name != d.site {
			continue
		}
		if site.State == admin.SiteHealthy || site.State == admin.SiteDegraded {
			a.lie(s, asked, "site %s is %s, unheard for %v", d.site, site.State, since)
		}
		if site.UpstreamsHealthy != nil {
			a.lie(s, asked, "site %s has %d healthy upstreams, but it has been unheard for %v", d.site, *site.UpstreamsHealthy, since)
		}
		if r := site.Replication; r != nil && r.LagSeconds != nil && *r.LagSeconds < (since-onTheWay).Seconds() {
			a.lie(s, asked, "the copy of site %s is %.2f s behind, but it has been unheard for %v", d.site, *r.LagSeconds, since)
		}
	}
}

func (a *Audit) lie(s admin.Status, asked time.Time, format string, args ...any) {
	if len(a.broken) < maxBroken {
		a.broken = append(a.broken, fmt.Sprintf("%s said at %s: ", s.Observer.Node, asked.Format("15:04:05.000"))+fmt.Sprintf(format, args...))
	}
}
