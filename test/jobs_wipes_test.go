//go:build linux

package test

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// Nodes lose their disks one after the other under load, each as soon as all nodes say
// that the cluster is healthy. That must mean that the loss of any one disk loses no job
// that is at two sites, so none is lost. Most jobs are of streams that have ended: such
// jobs are in the nodes' tables alone, and in no journal.
func TestJobsSurviveDiskLossesInARow(t *testing.T) {
	parallelIfShort(t)
	losses, first, each := 3, 150, 20
	if full() {
		losses, first, each = 10, 2000, 200
	}
	l := lab.Start(t, lab.Topology{Nodes: []int{1, 1, 1}, Link: lab.RoundTrip(30 * time.Millisecond), Cluster: withJobs})
	ledger := l.StartJobs(lab.JobLoad{Clients: 4, Durabilities: []string{"two-sites", "two-cities"}, Every: 20 * time.Millisecond})
	s := &lossTrial{t: t, lab: l, ledger: ledger, wiped: map[string]bool{}}
	s.awaitCount(first)
	s.endStreams()
	for loss := range losses {
		s.awaitCount(ledger.Count() + each)
		s.lostAt = time.Now()
		victim := l.Nodes()[loss%len(l.Nodes())]
		ledger.Forget(victim)
		victim.LoseDisk()
		took := l.WaitHealthy(within(60 * time.Second))
		var lacks []string
		for _, n := range l.Nodes() {
			lacking, err := ledger.Lacking(t.Context(), n, s.lostAt, "two-sites", "two-cities")
			if err != nil {
				t.Fatal(err)
			}
			lacks = append(lacks, lacking...)
		}
		t.Logf("loss %d, of %s's disk: every node says healthy after %.1f s, with %d jobs", loss+1, victim.Name, took.Seconds(), ledger.Count())
		report(t, "jobs are missing although every node says healthy", lacks)
		if t.Failed() {
			return
		}
	}
	jobs := ledger.Stop()
	s.verify(lossRow{keeps: map[string]bool{"two-sites": true, "two-cities": true}}, jobs)
	s.awaitNothingBehind()
}

// endStreams restarts all nodes and waits until the streams of their earlier processes have
// been dropped.
func (s *lossTrial) endStreams() {
	s.t.Helper()
	for _, n := range s.lab.Nodes() {
		n.Restart()
		s.lab.WaitHealthy(within(30 * time.Second))
	}
	s.lab.WaitFor(within(60*time.Second), "the earlier streams to be dropped", func(ctx context.Context) error {
		for _, n := range s.lab.Nodes() {
			streams, err := n.JobStreams(ctx)
			if err != nil {
				return err
			}
			if len(streams.Data) > len(s.lab.Nodes()) {
				return fmt.Errorf("%s has %d streams", n.Name, len(streams.Data))
			}
		}
		return nil
	})
}

// awaitNothingBehind waits until every node says of every site that its copy lacks no
// record.
func (s *lossTrial) awaitNothingBehind() {
	s.t.Helper()
	took := s.lab.WaitFor(within(20*time.Second), "no site to be behind", func(ctx context.Context) error {
		var behind []string
		for _, n := range s.lab.Nodes() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			for _, site := range status.Sites {
				if r := site.Replication; r == nil || r.RecordsBehind == nil {
					behind = append(behind, fmt.Sprintf("%s does not know how far %s is behind", n.Name, site.Name))
				} else if *r.RecordsBehind > 0 {
					behind = append(behind, fmt.Sprintf("%s says that %s is %d records behind", n.Name, site.Name, *r.RecordsBehind))
				}
			}
		}
		if len(behind) > 0 {
			return fmt.Errorf("%s", strings.Join(behind, "; "))
		}
		return nil
	})
	s.t.Logf("no site is behind after %.1f s", took.Seconds())
}

// How long it takes until every node says healthy again after the loss of a disk, by the
// number of jobs that have ended. Nothing else is going on meanwhile.
func TestHealthyAfterADiskLossFigures(t *testing.T) {
	fullOnly(t, "100,000 jobs take minutes")
	counts := []int{1000, 100_000}
	if text := os.Getenv("DSNODE_TEST_JOBS"); text != "" {
		counts = nil
		for one := range strings.SplitSeq(text, ",") {
			n, err := strconv.Atoi(one)
			if err != nil {
				t.Fatal(err)
			}
			counts = append(counts, n)
		}
	}
	l := lab.Start(t, lab.Topology{Nodes: []int{1, 1, 1}, Link: lab.RoundTrip(30 * time.Millisecond), Cluster: func(text string) string { return text + "jobs: {max_queued: 1000000}\n" }})
	s := &lossTrial{t: t, lab: l, wiped: map[string]bool{}}
	have := 0
	for i, count := range counts {
		began := time.Now()
		ledger := l.StartJobs(lab.JobLoad{Clients: 32, Durabilities: []string{"two-sites"}})
		l.WaitFor(2*time.Hour, fmt.Sprintf("%d jobs", count), func(context.Context) error {
			if got := have + ledger.Count(); got < count {
				return fmt.Errorf("%d so far", got)
			}
			return nil
		})
		have += len(ledger.Stop())
		l.WaitFor(time.Hour, "all jobs to have ended", func(ctx context.Context) error {
			for _, n := range l.Nodes() {
				status, err := n.Status(ctx)
				switch {
				case err != nil:
					return err
				case status.Jobs == nil || status.Jobs.Queued == nil || status.Jobs.Running == nil || *status.Jobs.Queued+*status.Jobs.Running > 0:
					return fmt.Errorf("%s has jobs to run", n.Name)
				}
			}
			return nil
		})
		t.Logf("%d jobs took %.0f s", have, time.Since(began).Seconds())
		s.endStreams()
		victim := l.Nodes()[(i+1)%len(l.Nodes())]
		victim.LoseDisk()
		took := l.WaitHealthy(time.Hour)
		t.Logf("%d jobs that have ended: every node says healthy %.1f s after %s came back without its disk", have, took.Seconds(), victim.Name)
	}
}
