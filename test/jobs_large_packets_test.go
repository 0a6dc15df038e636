//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// mostStreams is how many streams of a node may be agreed on at a time: the one that it
// writes, and one that is about to be dropped.
const mostStreams = 2

// Around the primary, which leads Raft, all packets above 1,100 bytes are dropped while
// jobs come in at the other sites. The primary's pings share their connections with the
// records that it pulls, and get no answers. The others' pings do, with leases, and
// Raft's small messages pass: the leader stays, and hears nobody. It may not take the
// others for gone. When the fault ends, every job that was accepted has its one result within a
// minute, and all nodes run new ones. A node that refused jobs because it could not start
// them has said so in its status.
func TestJobsWhileLargePacketsAreLost(t *testing.T) {
	parallelIfShort(t)
	lasts := 20 * time.Second
	if full() {
		lasts = time.Minute
	}
	l := lab.Start(t, lab.Topology{Nodes: []int{1, 1, 1}, Link: lab.RoundTrip(betweenCities), Cluster: withJobs})
	primary := l.Sites[0]
	l.WaitFor(within(returns), "the primary to lead Raft", func(ctx context.Context) error {
		status, err := primary.Nodes[0].Status(ctx)
		if err == nil && (status.Raft.LeaderSite == nil || *status.Raft.LeaderSite != primary.Name) {
			err = errors.New("another site leads")
		}
		return err
	})
	s := &lossTrial{
		t: t, lab: l, wiped: map[string]bool{},
		ledger: l.StartJobs(lab.JobLoad{Clients: 2, Sites: l.Sites[1:], Durabilities: []string{"node", "", "two-sites"}, Model: jobModel, Every: 50 * time.Millisecond}),
	}
	s.awaitCount(100)
	w := watchStreams(l)
	s.lostAt = time.Now()
	l.Net.Shrink(primary.Index, 1100)
	<-time.After(lasts) // the length of the fault
	before := s.ledger.Count()
	l.Net.Shrink(primary.Index, 0)
	healed := time.Now()
	l.WaitHealthy(within(settleWithin))
	t.Logf("healthy %.1f s after the fault; %d jobs were acknowledged before its end", time.Since(healed).Seconds(), before)
	s.awaitCount(s.ledger.Count() + 50)
	jobs := s.ledger.Stop()
	s.verify(lossRow{keeps: all}, jobs)
	l.WaitFor(within(settleWithin), "one stream of each node", func(ctx context.Context) error {
		for _, n := range l.Nodes() {
			of, err := streamsByOrigin(ctx, n)
			if err != nil {
				return err
			}
			for _, origin := range l.Nodes() {
				if count := of[origin.Name]; count < 1 || count > mostStreams {
					return fmt.Errorf("%s shows %d streams of %s", n.Name, count, origin.Name)
				}
			}
		}
		return nil
	})
	most, told := w.stop()
	t.Logf("most streams at a time: %v; nodes that said that they can't start jobs: %v", most, told)
	for node, count := range most {
		if count > mostStreams {
			t.Errorf("%s had %d streams at a time, want %d at most", node, count, mostStreams)
		}
	}
	for _, j := range jobs {
		if j.Err != nil && strings.Contains(j.Err.Error(), "job could not start here") && !told[j.Node] {
			t.Errorf("%s refused job %d, and its status never said why: %v", j.Node, j.Number, j.Err)
		}
	}
}

// streamWatch reads the agreed streams and the statuses of all nodes until stop.
type streamWatch struct {
	end  context.CancelFunc
	work sync.WaitGroup

	mu   sync.Mutex // guards all below
	most map[string]int
	told map[string]bool
}

func watchStreams(l *lab.Lab) *streamWatch {
	ctx, end := context.WithCancel(context.Background())
	w := &streamWatch{end: end, most: map[string]int{}, told: map[string]bool{}}
	for _, n := range l.Nodes() {
		w.work.Go(func() {
			for ; ctx.Err() == nil; rest(ctx, 250*time.Millisecond) {
				w.look(ctx, n)
			}
		})
	}
	return w
}

func (w *streamWatch) look(ctx context.Context, n *lab.Node) {
	of, err := streamsByOrigin(ctx, n)
	status, errStatus := n.Status(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		for origin, count := range of {
			w.most[origin] = max(w.most[origin], count)
		}
	}
	if errStatus == nil && strings.Contains(strings.Join(status.Reasons, "; "), "refuses new jobs") {
		w.told[n.Name] = true
	}
}

func (w *streamWatch) stop() (most map[string]int, told map[string]bool) {
	w.end()
	w.work.Wait()
	return maps.Clone(w.most), maps.Clone(w.told)
}

func streamsByOrigin(ctx context.Context, n *lab.Node) (map[string]int, error) {
	got, err := n.JobStreams(ctx)
	if err != nil {
		return nil, err
	}
	of := map[string]int{}
	for _, j := range got.Data {
		of[j.Origin]++
	}
	return of, nil
}
