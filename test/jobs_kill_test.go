//go:build linux

package test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// A node under load is killed at random moments, many times. After each restart every
// acknowledged job exists and succeeds with one result, and journal and table agree.
func TestJobsSurviveKills(t *testing.T) {
	parallelIfShort(t)
	kills := 5
	if full() {
		kills = 200
	}
	l := lab.Start(t, lab.Topology{Nodes: []int{1}, Cluster: withJobs})
	n := l.Nodes()[0]
	// Jobs run as soon as they are submitted, so kills also hit their starts and ends.
	ledger := l.StartJobs(lab.JobLoad{Clients: 16, Durabilities: []string{"node"}, Every: 100 * time.Millisecond})
	for kill := range kills {
		before := ledger.Count()
		l.WaitFor(within(20*time.Second), fmt.Sprintf("jobs acknowledged after kill %d", kill), func(context.Context) error {
			if ledger.Count() < before+20 {
				return fmt.Errorf("%d so far", ledger.Count()-before)
			}
			return nil
		})
		<-time.After(time.Duration(l.Random.IntN(400)) * time.Millisecond) // the random moment
		n.Kill()
		n.Start()
		if kill%10 == 4 { // rarely, since it reads every job
			l.WaitFor(within(60*time.Second), "journal and table to agree", n.CheckJobs)
		}
	}
	jobs := ledger.Stop()
	s := &lossTrial{t: t, lab: l, ledger: ledger, wiped: map[string]bool{}, lostAt: time.Now()}
	s.verify(lossRow{keeps: all}, jobs)
	if err := n.CheckJobs(t.Context()); err != nil {
		t.Error(err)
	}
}
