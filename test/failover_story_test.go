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

// The promises of failover, at default settings and on links as between cities.
// By themselves these tests are short: few trials, a light load, two at a time,
// and three times the promised time for everything but the laws, since a machine
// that is busy with other tests is slow. The promised numbers, times and load,
// one test after another on a machine of their own, which takes two hours:
//
//	DSNODE_TEST_FULL=1 go test ./test -run Failover -timeout 3h -v
//
// DSNODE_TEST_WEATHER=10m shortens the hour of bad weather.
func full() bool { return os.Getenv("DSNODE_TEST_FULL") != "" }

// story is a cluster under load with everybody watching: at its end the laws
// are checked, the statuses compared with the truth, and no client may have
// failed but those that the test names.
type story struct {
	t       *testing.T
	lab     *lab.Lab
	role    *lab.RoleWatch
	audit   *lab.Audit
	running *lab.Running
}

const (
	betweenCities = 30 * time.Millisecond
	inOneCity     = 2 * time.Millisecond
	// returns is how long a site may take to be well again, replaces how long the
	// worst change of primary, planned how long the role may be idle in a switchover,
	// and stuck how long a leader whose disk hangs may stay.
	returns  = 15 * time.Second
	replaces = 7 * time.Second
	planned  = 500 * time.Millisecond
	stuck    = 15 * time.Second
)

// within is a promised time as this form of the tests holds it.
func within(promised time.Duration) time.Duration {
	if full() {
		return promised
	}
	return 3 * promised
}

// fullOnly skips a test that takes too long for every day.
func fullOnly(t *testing.T, why string) {
	t.Helper()
	if !full() {
		t.Skipf("%s: only in the full form, DSNODE_TEST_FULL=1", why)
	}
}

// sharing makes a short test one of those that run at once.
func sharing(t *testing.T) {
	t.Helper()
	if !full() {
		t.Parallel()
	}
}

// begin starts sites with so many nodes each.
func begin(t *testing.T, top lab.Topology) *story {
	t.Helper()
	sharing(t)
	top.Link = lab.RoundTrip(betweenCities)
	l := lab.Start(t, top)
	s := &story{t: t, lab: l}
	s.ordinaryLinks()
	s.role = l.WatchRole(10 * time.Millisecond)
	s.audit = l.StartAudit()
	s.running = l.StartLoad(s.promisedLoad())
	await(t, s.running, 50)
	return s
}

func (s *story) ordinaryLinks() {
	s.lab.Net.SetAll(lab.RoundTrip(betweenCities))
	s.lab.Net.Set(0, 1, lab.RoundTrip(inOneCity))
	s.lab.Net.Set(1, 0, lab.RoundTrip(inOneCity))
}

// promisedLoad is 300 requests/s and 100 streams in all; a tenth in a short test.
func (s *story) promisedLoad() lab.Load {
	promised := load(s.lab)
	if !full() {
		promised.Rate, promised.Streams = promised.Rate/10, promised.Streams/10
	}
	return promised
}

// goOn lets some time pass: what clients see after a change counts too.
func (s *story) goOn() {
	s.t.Helper()
	more := 60
	if full() {
		more = 1000
	}
	await(s.t, s.running, more)
}

// end stops the load; clients of the sites named alone may have failed.
func (s *story) end(hurt ...*lab.Site) {
	s.t.Helper()
	results := s.running.Stop()
	s.t.Log(lab.Summary(results))
	for _, r := range lab.Failed(results) {
		if slices.ContainsFunc(hurt, func(site *lab.Site) bool { return site.Name == r.Site }) {
			continue
		}
		s.t.Errorf("a client of %s, which was well, failed at %s: %v", r.Site, r.At.Format("15:04:05.000"), r.Err)
		return // the summary has the others
	}
}

// primary is what the first running node holds for it.
func (s *story) primary() (site *lab.Site, epoch uint64, leader string) {
	s.t.Helper()
	return s.primaryBy(s.lab.Running()[0])
}

// primaryBy is what that node holds for it.
func (s *story) primaryBy(n *lab.Node) (site *lab.Site, epoch uint64, leader string) {
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

// change is how a new primary came, in times since the fault.
type change struct {
	site   string
	reason string
	known  time.Duration // the first surviving node's status shows it
	all    time.Duration // the statuses of all do
	acts   time.Duration // /healthz/primary of its site answers 200
}

func (c change) String() string {
	return fmt.Sprintf("%s (%s): known after %.2f s, by all after %.2f s, acts after %.2f s", c.site, c.reason, c.known.Seconds(), c.all.Seconds(), c.acts.Seconds())
}

// awaitChange waits until the statuses of all these nodes show that epoch, and
// its primary acts.
func (s *story) awaitChange(fault time.Time, epoch uint64, limit time.Duration, nodes []*lab.Node) change {
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
		s.t.Fatalf("epoch %d is not known to %s %v after the fault; %s", epoch, strings.Join(missing, ", "), time.Since(fault).Round(time.Millisecond), c)
	}
	s.lab.WaitFor(limit, "the new primary to act", func(context.Context) error {
		look, ok := s.role.Begun(epoch)
		if !ok {
			return fmt.Errorf("nobody acts in epoch %d", epoch)
		}
		c.acts = look.Answered.Sub(fault)
		return nil
	})
	return c
}

// others are the nodes of all other sites.
func (s *story) others(of *lab.Site) []*lab.Node {
	return slices.DeleteFunc(s.lab.Nodes(), func(n *lab.Node) bool { return n.Site == of })
}

// returned waits until the cluster is well again, and checks that who came back
// did not take the role.
func (s *story) returned(site *lab.Site, epoch uint64) time.Duration {
	s.t.Helper()
	begun := time.Now()
	took := s.lab.WaitHealthy(within(returns))
	primary, now, _ := s.primary()
	if primary == site || now != epoch {
		s.t.Errorf("%s returned, and %s is the primary in epoch %d, want still epoch %d", site.Name, primary.Name, now, epoch)
	}
	for _, a := range s.role.Runs() {
		if a.Site == site.Name && a.First.Answered.After(begun) {
			s.t.Errorf("%s acts as primary in epoch %d since its return", a.Node, a.Epoch)
		}
	}
	return took
}

// percentile of durations, which it sorts.
func percentile(all []time.Duration, share float64) time.Duration {
	slices.Sort(all)
	return all[int(share*float64(len(all)-1)+0.5)]
}
