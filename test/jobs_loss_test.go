//go:build linux

package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// These tests execute the design's loss table: what an acknowledged job survives, by
// the durability that its 202 named. Each row causes a loss at a random moment while
// hundreds of jobs wait and run. Afterwards every job that must exist according to the
// table exists on every node, with one result, and no final status has changed.

const jobModel = "deepseek-batch" // answers after 0.3 s, so that jobs are running at any time

// withJobs adds the model that jobs ask, and lets a node run 32 at a time.
func withJobs(text string) string {
	var b strings.Builder
	b.WriteString(text)
	fmt.Fprintf(&b, "  %s:\n    serve:\n", jobModel)
	for line := range strings.SplitSeq(text, "\n") {
		if name, rest, found := strings.Cut(strings.TrimSpace(line), ": {site: "); found && rest != "" {
			fmt.Fprintf(&b, "      - {upstream: %s, model: \"m@first=300ms\"}\n", name)
		}
	}
	b.WriteString("jobs: {concurrency: 32}\n")
	return b.String()
}

// lossRow is one row of the table.
type lossRow struct {
	name  string
	nodes []int
	// lose causes the loss.
	lose func(*lossTrial)
	// repair restores what can be restored.
	repair func(*lossTrial)
	// keeps says for each durability whether a job submitted to a lost node must still
	// exist. Jobs submitted to other nodes must exist in any case.
	keeps map[string]bool
	// survivors, if set, are the only nodes left. They have no quorum: their jobs exist
	// but do not run.
	survivors func(*lossTrial) []*lab.Node
	// short rows are in the short form too.
	short bool
}

type lossTrial struct {
	t      *testing.T
	lab    *lab.Lab
	ledger *lab.JobLedger
	victim *lab.Node // for rows that lose a node
	site   *lab.Site // for the others
	lostAt time.Time
	wiped  map[string]bool // nodes whose disks are gone
}

func (s *lossTrial) wipe(nodes ...*lab.Node) {
	for _, n := range nodes {
		n.Kill()
	}
	for _, n := range nodes {
		n.WipeDisk()
		s.ledger.Forget(n)
		s.wiped[n.Name] = true
	}
}

var all = map[string]bool{"node": true, "site": true, "two-sites": true, "two-cities": true}

func lossTable() []lossRow {
	return []lossRow{
		{
			name: "a process is killed", nodes: []int{1, 1, 1}, keeps: all, short: true,
			lose:   func(s *lossTrial) { s.victim.Kill() },
			repair: func(s *lossTrial) { s.victim.Start() },
		},
		{
			name: "the power of all sites fails and returns", nodes: []int{1, 1, 1}, keeps: all,
			lose: func(s *lossTrial) {
				for _, n := range s.lab.Nodes() {
					n.Kill()
				}
			},
			repair: func(s *lossTrial) {
				for _, n := range s.lab.Nodes() {
					n.Start()
				}
			},
		},
		{
			name: "one node's disk is gone", nodes: []int{2, 2, 1}, short: true,
			keeps:  map[string]bool{"site": true, "two-sites": true, "two-cities": true},
			lose:   func(s *lossTrial) { s.wipe(s.victim) },
			repair: func(s *lossTrial) { s.victim.Start() },
		},
		{
			name: "a site is cut off, then returns", nodes: []int{1, 1, 1}, keeps: all,
			lose:   func(s *lossTrial) { s.lab.Net.Isolate(s.site.Index) },
			repair: func(s *lossTrial) { s.lab.Net.MendAll() },
		},
		{
			name: "a site is destroyed", nodes: []int{1, 1, 1}, short: true,
			keeps:  map[string]bool{"two-sites": true, "two-cities": true},
			lose:   func(s *lossTrial) { s.wipe(s.site.Nodes...) },
			repair: func(*lossTrial) {},
		},
		{
			name: "a city is destroyed", nodes: []int{1, 1, 1}, keeps: map[string]bool{"two-cities": true},
			lose: func(s *lossTrial) {
				s.site = s.lab.Sites[0]
				s.wipe(append(slices.Clone(s.lab.Sites[0].Nodes), s.lab.Sites[1].Nodes...)...)
			},
			repair:    func(*lossTrial) {},
			survivors: func(s *lossTrial) []*lab.Node { return s.lab.Sites[2].Nodes },
		},
		{
			name: "a link is cut, then mended", nodes: []int{1, 1, 1}, keeps: all,
			lose: func(s *lossTrial) {
				other := (s.site.Index + 1) % len(s.lab.Sites)
				s.lab.Net.Cut(s.site.Index, other)
				s.lab.Net.Cut(other, s.site.Index)
			},
			repair: func(s *lossTrial) { s.lab.Net.MendAll() },
		},
	}
}

func TestJobsSurviveWhatTheTableSays(t *testing.T) {
	parallelIfShort(t)
	trials := 1
	if full() {
		trials = 5
	}
	for _, row := range lossTable() {
		if !row.short && !full() {
			continue
		}
		t.Run(row.name, func(t *testing.T) {
			parallelIfShort(t)
			for trial := range trials {
				t.Run(fmt.Sprint(trial+1), func(t *testing.T) { row.play(t) })
			}
		})
	}
}

func (r lossRow) play(t *testing.T) {
	l := lab.Start(t, lab.Topology{Nodes: r.nodes, Link: lab.RoundTrip(30 * time.Millisecond), Cluster: withJobs})
	durabilities := []string{"node", "two-sites", "two-cities", ""}
	if slices.Max(r.nodes) > 1 {
		durabilities = []string{"node", "two-sites", "two-cities", "", "site"}
	}
	load := lab.JobLoad{Clients: 4, Durabilities: durabilities, Model: jobModel, Every: 20 * time.Millisecond}
	before, after := 200, 100
	if full() {
		load.Clients, before, after = 12, 600, 300
	}
	s := &lossTrial{t: t, lab: l, ledger: l.StartJobs(load), wiped: map[string]bool{}}
	s.site = l.Sites[l.Random.IntN(len(l.Sites))]
	if slices.Max(r.nodes) > 1 { // a site with a second node
		s.site = l.Sites[l.Random.IntN(2)]
	}
	s.victim = s.site.Nodes[l.Random.IntN(len(s.site.Nodes))]
	s.awaitCount(before)
	<-time.After(time.Duration(l.Random.IntN(500)) * time.Millisecond) // the random moment
	t.Logf("loss: %s (%s)", r.name, s.victim.Name)
	s.lostAt = time.Now()
	r.lose(s)
	if r.survivors == nil && r.name != "the power of all sites fails and returns" {
		s.awaitCount(s.ledger.Count() + after)
	}
	r.repair(s)
	<-time.After(time.Second) // clients submit to the repaired cluster too
	jobs := s.ledger.Stop()
	s.verify(r, jobs)
}

func (s *lossTrial) awaitCount(n int) {
	s.t.Helper()
	s.lab.WaitFor(within(20*time.Second), fmt.Sprintf("%d acknowledged jobs", n), func(context.Context) error {
		if got := s.ledger.Count(); got < n {
			return fmt.Errorf("%d so far", got)
		}
		return nil
	})
}

// settleWithin bounds the time for the jobs of a lost owner, which are adopted after
// 10 s, and for the rest of the queue.
const settleWithin = 60 * time.Second

// verify asks every running node for every acknowledged job.
func (s *lossTrial) verify(r lossRow, jobs []lab.Job) {
	s.t.Helper()
	nodes := s.lab.Running()
	if r.survivors != nil {
		nodes = r.survivors(s)
	}
	count, missing, allowed := map[string]int{}, 0, 0
	var must []lab.Job
	for _, j := range jobs {
		if j.Acknowledged.IsZero() {
			count["refused"]++
			continue
		}
		count[j.Durability]++
		if s.mustExist(r, j) {
			must = append(must, j)
			continue
		}
		if s.find(nodes, j.ID) {
			allowed++
		} else {
			missing++
		}
	}
	s.t.Logf("submitted %d: %v; %d must exist; of the others %d exist and %d are lost, as the table allows", len(jobs), count, len(must), allowed, missing)
	if len(must) < 100 {
		s.t.Errorf("only %d jobs must exist, too few for the test to prove anything", len(must))
	}
	begun := time.Now()
	results := make([]lab.JobView, len(must))
	var lost, undone, differ []string
	var mu sync.Mutex
	var work sync.WaitGroup
	next := make(chan int)
	for range 16 {
		work.Go(func() {
			for i := range next {
				v, problem, kind := s.settle(r, nodes, must[i], begun.Add(within(settleWithin)))
				results[i] = v
				if problem == "" {
					continue
				}
				mu.Lock()
				switch kind {
				case isLost:
					lost = append(lost, problem)
				case isUndone:
					undone = append(undone, problem)
				default:
					differ = append(differ, problem)
				}
				mu.Unlock()
			}
		})
	}
	for i := range must {
		next <- i
	}
	close(next)
	work.Wait()
	s.t.Logf("all %d settled on %d nodes after %.1f s", len(must), len(nodes), time.Since(begun).Seconds())
	report(s.t, "jobs that must exist are lost", lost)
	report(s.t, "jobs have not succeeded", undone)
	report(s.t, "jobs have more than one result", differ)
	report(s.t, "final statuses changed", s.ledger.Broken())
}

type problemKind int

const (
	isLost problemKind = iota
	isUndone
	isDifferent
)

// mustExist applies the table: a job may be lost if it was submitted to a node that
// was lost, acknowledged before that, and its durability does not cover the loss.
func (s *lossTrial) mustExist(r lossRow, j lab.Job) bool {
	if r.keeps[j.Durability] || j.Acknowledged.After(s.lostAt.Add(time.Second)) {
		return true
	}
	if s.wiped[j.Node] {
		return false
	}
	return true
}

// mustEnd reports whether the job must succeed. Without a quorum no job runs, and a
// result is shown only when it is as durable as the job asked, which for two-cities
// needs a running node in a second city.
func (s *lossTrial) mustEnd(r lossRow, j lab.Job) bool {
	cities := map[string]bool{}
	for _, n := range s.lab.Running() {
		cities[n.Site.City] = true
	}
	return r.survivors == nil && (len(cities) > 1 || j.Asked != "two-cities")
}

func (s *lossTrial) find(nodes []*lab.Node, id string) bool {
	for _, n := range nodes {
		if _, err := n.Job(s.t.Context(), id); err == nil {
			return true
		}
	}
	return false
}

// settle waits until all nodes show the job as succeeded with the same result.
func (s *lossTrial) settle(r lossRow, nodes []*lab.Node, j lab.Job, until time.Time) (lab.JobView, string, problemKind) {
	var last string
	kind := isUndone
	for first := true; first || time.Now().Before(until); first = false {
		var seen []lab.JobView
		last = ""
		for _, n := range nodes {
			v, err := n.Job(s.t.Context(), j.ID)
			if err != nil {
				last, kind = fmt.Sprintf("job %d (%s, %s, at %s): %v", j.Number, j.ID, j.Durability, j.Node, err), isUndone
				if errors.Is(err, lab.ErrNoSuchJob) {
					kind = isLost
				}
				break
			}
			s.ledger.Seen(n, v)
			if s.mustEnd(r, j) && v.Status != "succeeded" {
				last, kind = fmt.Sprintf("job %d (%s, %s, at %s): %s shows it as %s %s", j.Number, j.ID, j.Durability, j.Node, n.Name, v.Status, v.Error), isUndone
				break
			}
			seen = append(seen, v)
		}
		if last == "" {
			for _, v := range seen[1:] {
				if !bytes.Equal(v.Result, seen[0].Result) {
					last, kind = fmt.Sprintf("job %d (%s): %s and %s", j.Number, j.ID, seen[0].Result, v.Result), isDifferent
				}
			}
		}
		if last == "" {
			return seen[0], "", isUndone
		}
		<-time.After(100 * time.Millisecond)
	}
	return lab.JobView{}, last, kind
}

func report(t *testing.T, what string, problems []string) {
	t.Helper()
	if len(problems) > 0 {
		t.Errorf("%d %s, such as\n  %s", len(problems), what, strings.Join(problems[:min(5, len(problems))], "\n  "))
	}
}
