//go:build linux

package test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// Measures the replication of jobs between cities, with round trips of 30 ms, and logs
// the figures. It asserts only that the replication works.
func TestJobsBetweenCitiesFigures(t *testing.T) {
	fullOnly(t, "it measures for a minute and a half and needs an idle machine")
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond), Cluster: func(text string) string {
		return text + "jobs: {paused: true, max_queued: 1000000}\n"
	}})
	one := l.StartJobs(lab.JobLoad{Clients: 1, Durabilities: []string{"two-cities"}, Sites: l.Sites[:1]})
	awaitJobs(l, one, 300)
	report := func(what string, jobs []lab.Job) {
		var took []time.Duration
		for _, j := range jobs {
			if !j.Acknowledged.IsZero() {
				took = append(took, j.Took)
			}
		}
		slices.Sort(took)
		t.Logf("%s: %d jobs, p50 %v, p99 %v", what, len(took), percentile(took, 0.5), percentile(took, 0.99))
	}
	report("two-cities, 1 in flight", one.Stop())

	// The lag of the remote copy during steady submissions.
	remote := l.Sites[2].Nodes[0]
	var lags []float64
	many := l.StartJobs(lab.JobLoad{Clients: 64, Durabilities: []string{"node"}, Sites: l.Sites[:1]})
	begun := time.Now()
	for time.Since(begun) < 15*time.Second {
		m, err := remote.Metrics(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for name, v := range m {
			if strings.HasPrefix(name, "dsnode_replication_lag_seconds") && strings.Contains(name, `origin_site="shanghai-a"`) {
				lags = append(lags, v)
			}
		}
		<-time.After(100 * time.Millisecond)
	}
	jobs := many.Stop()
	slices.Sort(lags)
	if len(lags) == 0 {
		t.Fatal("the metrics show no lag")
	}
	report(fmt.Sprintf("node, 64 in flight, %.0f jobs/s", float64(len(jobs))/15), jobs)
	t.Logf("lag of the remote copy during these: p50 %.3f s, p99 %.3f s", lags[len(lags)/2], lags[len(lags)*99/100])

	// A site that was isolated catches up while new jobs are submitted.
	l.Net.Isolate(remote.Site.Index)
	away := l.StartJobs(lab.JobLoad{Clients: 64, Durabilities: []string{"node"}, Sites: l.Sites[:1]})
	awaitJobs(l, away, 20000)
	missed := len(away.Stop())
	l.Net.MendAll()
	fresh := l.StartJobs(lab.JobLoad{Clients: 1, Durabilities: []string{"two-sites"}, Sites: l.Sites[:1], Every: 20 * time.Millisecond})
	took := l.WaitFor(2*time.Minute, "the isolated site to catch up", func(ctx context.Context) error {
		m, err := remote.Metrics(ctx)
		if err != nil {
			return err
		}
		for name, v := range m {
			if strings.HasPrefix(name, "dsnode_replication_records_behind") && strings.Contains(name, `origin_site="shanghai-a"`) {
				if v > 20 {
					return fmt.Errorf("%.0f records behind", v)
				}
				return nil
			}
		}
		return fmt.Errorf("no metric for the records behind yet")
	})
	t.Logf("%d records missed, caught up after %v: %.0f records/s", missed, took, float64(missed)/took.Seconds())
	report("two-sites while the site catches up", fresh.Stop())
}

func awaitJobs(l *lab.Lab, b *lab.JobLedger, n int) {
	l.WaitFor(2*time.Minute, fmt.Sprintf("%d jobs", n), func(context.Context) error {
		if got := b.Count(); got < n {
			return fmt.Errorf("%d so far", got)
		}
		return nil
	})
}
