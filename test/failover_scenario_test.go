//go:build linux

package test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// The tests named TestFailover check the promises of failover, with default settings
// and on links like those between cities. The short form has few trials and a tenth of
// the load, runs tests beside each other, and allows three times the promised time for
// everything but the laws, because it shares the machine with other tests. The full
// form checks the promised times with the promised load, one test after another. It
// needs an idle machine and takes two hours:
//
//	DSNODE_TEST_FULL=1 go test ./test -run Failover -timeout 3h -v
//
// DSNODE_TEST_WEATHER=10m shortens the hour with lossy links.
func full() bool { return os.Getenv("DSNODE_TEST_FULL") != "" }

// scenario is a cluster under load with an observer, a watch of the role and an audit.
// At its end the laws are checked, no status may have been false, and no client may
// have failed except those of the sites that the test names.
type scenario struct {
	t       *testing.T
	lab     *lab.Lab
	role    *lab.RoleWatch
	audit   *lab.Audit
	running *lab.Running
}

const (
	betweenCities = 30 * time.Millisecond
	inOneCity     = 2 * time.Millisecond
	// The promised times: until a site that returns is healthy again, until another
	// site is the primary, without an acting primary in a switchover, and until a
	// leader whose disk hangs is replaced.
	returns  = 15 * time.Second
	replaces = 7 * time.Second
	planned  = 500 * time.Millisecond
	stuck    = 15 * time.Second
)

// within returns a promised time as the short or full form checks it.
func within(promised time.Duration) time.Duration {
	if full() {
		return promised
	}
	return 3 * promised
}

// fullOnly skips a test in the short form.
func fullOnly(t *testing.T, why string) {
	t.Helper()
	if !full() {
		t.Skipf("%s: only in the full form, DSNODE_TEST_FULL=1", why)
	}
}

// parallelIfShort runs the test beside others in the short form.
func parallelIfShort(t *testing.T) {
	t.Helper()
	if !full() {
		t.Parallel()
	}
}

// begin starts a cluster, the load and all that watches it.
func begin(t *testing.T, top lab.Topology) *scenario {
	t.Helper()
	parallelIfShort(t)
	top.Link = lab.RoundTrip(betweenCities)
	l := lab.Start(t, top)
	s := &scenario{t: t, lab: l}
	s.ordinaryLinks()
	s.role = l.WatchRole(10 * time.Millisecond)
	s.audit = l.StartAudit()
	s.running = l.StartLoad(s.promisedLoad())
	await(t, s.running, 50)
	return s
}

func (s *scenario) ordinaryLinks() {
	s.lab.Net.SetAll(lab.RoundTrip(betweenCities))
	s.lab.Net.Set(0, 1, lab.RoundTrip(inOneCity))
	s.lab.Net.Set(1, 0, lab.RoundTrip(inOneCity))
}

// promisedLoad is the load of the promised times, a tenth of it in the short form.
func (s *scenario) promisedLoad() lab.Load {
	promised := load(s.lab)
	if !full() {
		promised.Rate, promised.Streams = promised.Rate/10, promised.Streams/10
	}
	return promised
}

// continueLoad waits for more results, since requests after a change count too.
func (s *scenario) continueLoad() {
	s.t.Helper()
	more := 60
	if full() {
		more = 1000
	}
	await(s.t, s.running, more)
}

// end stops the load and fails the test if a request failed of a client in another
// than the affected sites.
func (s *scenario) end(affected ...*lab.Site) {
	s.t.Helper()
	results := s.running.Stop()
	s.t.Log(lab.Summary(results))
	for _, r := range lab.Failed(results) {
		if slices.ContainsFunc(affected, func(site *lab.Site) bool { return site.Name == r.Site }) {
			continue
		}
		s.t.Errorf("a client of %s, which had no fault, failed at %s: %v", r.Site, r.At.Format("15:04:05.000"), r.Err)
		return // the summary has the others
	}
}

// primary returns the primary that the first running node shows.
func (s *scenario) primary() (site *lab.Site, epoch uint64, leader string) {
	s.t.Helper()
	return s.primaryBy(s.lab.Running()[0])
}

// primaryBy returns the primary that a node shows.
func (s *scenario) primaryBy(n *lab.Node) (site *lab.Site, epoch uint64, leader string) {
	s.t.Helper()
	s.lab.WaitFor(within(5*time.Second), "a status", func(ctx context.Context) error {
		status, err := n.Status(ctx)
		switch {
		case err != nil:
			return err
		case status.Primary == nil || status.Raft.Leader == nil:
			return fmt.Errorf("primary %v, leader %v", status.Primary, status.Raft.Leader)
		}
		site, epoch, leader = s.lab.Site(status.Primary.Site), status.Primary.Epoch, *status.Raft.Leader
		return nil
	})
	return site, epoch, leader
}

// change describes how another site became the primary, in times since the fault.
type change struct {
	site   string
	reason string
	leads  time.Duration // a surviving node's status names a surviving Raft leader
	known  time.Duration // a surviving node's status shows it
	all    time.Duration // the statuses of all surviving nodes show it
	acts   time.Duration // /healthz/primary of its site answers 200
}

func (c change) String() string {
	return fmt.Sprintf("%s (%s): a leader after %.2f s, shown by a node after %.2f s, by all after %.2f s, acts after %.2f s", c.site, c.reason, c.leads.Seconds(), c.known.Seconds(), c.all.Seconds(), c.acts.Seconds())
}

// awaitChange waits until all these nodes show the epoch or a later one, and its
// primary acts.
func (s *scenario) awaitChange(fault time.Time, epoch uint64, limit time.Duration, nodes []*lab.Node) change {
	s.t.Helper()
	ctx, cancel := context.WithDeadline(s.t.Context(), fault.Add(limit+5*time.Second))
	defer cancel()
	var mu sync.Mutex // guards c, missing
	var c change
	var missing []string
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			for tick := time.NewTicker(10 * time.Millisecond); ; {
				ask, cancel := context.WithTimeout(ctx, time.Second)
				status, err := n.Status(ask)
				cancel()
				if err == nil && status.Raft.Leader != nil && slices.ContainsFunc(nodes, func(o *lab.Node) bool { return o.Name == *status.Raft.Leader }) {
					mu.Lock()
					if c.leads == 0 {
						c.leads = time.Since(fault)
					}
					mu.Unlock()
				}
				if err == nil && status.Primary != nil && status.Primary.Epoch >= epoch {
					mu.Lock()
					defer mu.Unlock()
					took := time.Since(fault)
					if c.site == "" {
						c.site, c.reason, c.known = status.Primary.Site, status.Primary.Reason, took
					}
					c.all = took
					return
				}
				select {
				case <-ctx.Done():
					mu.Lock()
					defer mu.Unlock()
					missing = append(missing, n.Name)
					return
				case <-tick.C:
				}
			}
		})
	}
	wg.Wait()
	if len(missing) > 0 {
		s.t.Fatalf("epoch %d is not shown by %s %v after the fault; %s", epoch, strings.Join(missing, ", "), time.Since(fault).Round(time.Millisecond), c)
	}
	s.lab.WaitFor(limit, "the new primary to act", func(context.Context) error {
		look, ok := s.role.Begun(epoch)
		if !ok {
			return fmt.Errorf("no primary acts in epoch %d", epoch)
		}
		c.acts = look.Answered.Sub(fault)
		return nil
	})
	return c
}

// others returns the nodes of all other sites.
func (s *scenario) others(of *lab.Site) []*lab.Node {
	return slices.DeleteFunc(s.lab.Nodes(), func(n *lab.Node) bool { return n.Site == of })
}

// returned waits until the cluster is healthy after a site's return, and checks that
// the site did not take the role back.
func (s *scenario) returned(site *lab.Site, epoch uint64) time.Duration {
	s.t.Helper()
	begun := time.Now()
	took := s.lab.WaitHealthy(within(returns))
	primary, now, _ := s.primary()
	if primary == site || now != epoch {
		s.t.Errorf("after the return of %s, %s is the primary in epoch %d, want another site in epoch %d", site.Name, primary.Name, now, epoch)
	}
	for _, a := range s.role.Runs() {
		if a.Site == site.Name && a.First.Answered.After(begun) {
			s.t.Errorf("%s acted as primary in epoch %d after its return", a.Node, a.Epoch)
		}
	}
	return took
}

// percentile returns a percentile of durations, which it sorts.
func percentile(all []time.Duration, share float64) time.Duration {
	slices.Sort(all)
	return all[int(share*float64(len(all)-1)+0.5)]
}
