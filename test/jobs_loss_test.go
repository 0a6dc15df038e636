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

// The loss table of the design, executed: what an acknowledged job survives, by
// the durability that its 202 named. Each row loses something at a random moment
// while hundreds of jobs wait and run; afterwards every job that the table says
// must exist does, on every node, with one result, and nothing that was shown as
// final has gone back.

const jobModel = "deepseek-batch" // answers after 0.3 s, so that jobs are in flight

// withJobs adds the model that jobs ask, and room to run them.
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
	// lose makes the loss and gives the nodes that a client can no longer reach.
	lose func(*lossStory)
	// repair brings back what can come back.
	repair func(*lossStory)
	// keeps says of each durability whether a job submitted where it was lost must
	// still exist. Jobs submitted elsewhere must always.
	keeps map[string]bool
	// survivors, if given, are all that is left, without a quorum: jobs exist
	// there but do not run.
	survivors func(*lossStory) []*lab.Node
	// short rows are played in the short form too.
	short bool
}

type lossStory struct {
	t      *testing.T
	lab    *lab.Lab
	ledger *lab.JobLedger
	victim *lab.Node // of the rows that lose a node
	site   *lab.Site // of the others
	lostAt time.Time
	wiped  map[string]bool // nodes whose disks are gone
}

func (s *lossStory) wipe(nodes ...*lab.Node) {
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
			lose:   func(s *lossStory) { s.victim.Kill() },
			repair: func(s *lossStory) { s.victim.Start() },
		},
		{
			name: "the power of all sites fails and returns", nodes: []int{1, 1, 1}, keeps: all,
			lose: func(s *lossStory) {
				for _, n := range s.lab.Nodes() {
					n.Kill()
				}
			},
			repair: func(s *lossStory) {
				for _, n := range s.lab.Nodes() {
					n.Start()
				}
			},
		},
		{
			name: "one node's disk is gone", nodes: []int{2, 2, 1}, short: true,
			keeps:  map[string]bool{"site": true, "two-sites": true, "two-cities": true},
			lose:   func(s *lossStory) { s.wipe(s.victim) },
			repair: func(s *lossStory) { s.victim.Start() },
		},
		{
			name: "a site is cut off, then returns", nodes: []int{1, 1, 1}, keeps: all,
			lose:   func(s *lossStory) { s.lab.Net.Isolate(s.site.Index) },
			repair: func(s *lossStory) { s.lab.Net.MendAll() },
		},
		{
			name: "a site is destroyed", nodes: []int{1, 1, 1}, short: true,
			keeps:  map[string]bool{"two-sites": true, "two-cities": true},
			lose:   func(s *lossStory) { s.wipe(s.site.Nodes...) },
			repair: func(*lossStory) {},
		},
		{
			name: "a city is destroyed", nodes: []int{1, 1, 1}, keeps: map[string]bool{"two-cities": true},
			lose: func(s *lossStory) {
				s.site = s.lab.Sites[0]
				s.wipe(append(slices.Clone(s.lab.Sites[0].Nodes), s.lab.Sites[1].Nodes...)...)
			},
			repair:    func(*lossStory) {},
			survivors: func(s *lossStory) []*lab.Node { return s.lab.Sites[2].Nodes },
		},
		{
			name: "a link is cut, then mended", nodes: []int{1, 1, 1}, keeps: all,
			lose: func(s *lossStory) {
				other := (s.site.Index + 1) % len(s.lab.Sites)
				s.lab.Net.Cut(s.site.Index, other)
				s.lab.Net.Cut(other, s.site.Index)
			},
			repair: func(s *lossStory) { s.lab.Net.MendAll() },
		},
	}
}

func TestJobsSurviveWhatTheTableSays(t *testing.T) {
	sharing(t)
	trials := 1
	if full() {
		trials = 5
	}
	for _, row := range lossTable() {
		if !row.short && !full() {
			continue
		}
		t.Run(row.name, func(t *testing.T) {
			sharing(t)
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
	s := &lossStory{t: t, lab: l, ledger: l.StartJobs(load), wiped: map[string]bool{}}
	s.site = l.Sites[l.Random.IntN(len(l.Sites))]
	if slices.Max(r.nodes) > 1 { // where a neighbour is left
		s.site = l.Sites[l.Random.IntN(2)]
	}
	s.victim = s.site.Nodes[l.Random.IntN(len(s.site.Nodes))]
	s.awaitCount(before)
	<-time.After(time.Duration(l.Random.IntN(500)) * time.Millisecond) // the random moment
	t.Logf("now: %s, of %s", r.name, s.victim.Name)
	s.lostAt = time.Now()
	r.lose(s)
	if r.survivors == nil && r.name != "the power of all sites fails and returns" {
		s.awaitCount(s.ledger.Count() + after)
	}
	r.repair(s)
	<-time.After(time.Second) // clients go on for a moment with the repaired cluster
	jobs := s.ledger.Stop()
	s.verify(r, jobs)
}

func (s *lossStory) awaitCount(n int) {
	s.t.Helper()
	s.lab.WaitFor(within(20*time.Second), fmt.Sprintf("%d acknowledged jobs", n), func(context.Context) error {
		if got := s.ledger.Count(); got < n {
			return fmt.Errorf("%d so far", got)
		}
		return nil
	})
}

// settleWithin is how long the cluster has for the jobs of a lost owner (10 s
// until they are adopted) and for the rest of the queue.
const settleWithin = 60 * time.Second

// verify asks every node that runs for every acknowledged job.
func (s *lossStory) verify(r lossRow, jobs []lab.Job) {
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
	s.t.Logf("submitted %d: %v; %d must exist; of the others %d do, %d are lost with what was lost", len(jobs), count, len(must), allowed, missing)
	if len(must) < 100 {
		s.t.Errorf("only %d jobs were promised, that proves little", len(must))
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
	report(s.t, "promised jobs are lost", lost)
	report(s.t, "jobs did not end well", undone)
	report(s.t, "jobs have more than one result", differ)
	report(s.t, "jobs went back", s.ledger.Broken())
}

type problemKind int

const (
	isLost problemKind = iota
	isUndone
	isDifferent
)

// mustExist is the table: a job submitted where it was lost, acknowledged before,
// may go where its durability says so.
func (s *lossStory) mustExist(r lossRow, j lab.Job) bool {
	if r.keeps[j.Durability] || j.Acknowledged.After(s.lostAt.Add(time.Second)) {
		return true
	}
	if s.wiped[j.Node] {
		return false
	}
	return true
}

// mustEnd: without a quorum nothing is executed, and a result is shown when it is
// as durable as the job asked, which takes a second city.
func (s *lossStory) mustEnd(r lossRow, j lab.Job) bool {
	cities := map[string]bool{}
	for _, n := range s.lab.Running() {
		cities[n.Site.City] = true
	}
	return r.survivors == nil && (len(cities) > 1 || j.Asked != "two-cities")
}

func (s *lossStory) find(nodes []*lab.Node, id string) bool {
	for _, n := range nodes {
		if _, err := n.Job(s.t.Context(), id); err == nil {
			return true
		}
	}
	return false
}

// settle waits until all nodes show the job with the same good end.
func (s *lossStory) settle(r lossRow, nodes []*lab.Node, j lab.Job, until time.Time) (lab.JobView, string, problemKind) {
	var last string
	kind := isUndone
	for first := true; first || time.Now().Before(until); first = false {
		var seen []lab.JobView
		last = ""
		for _, n := range nodes {
			v, err := n.Job(s.t.Context(), j.ID)
			if err != nil {
				last, kind = fmt.Sprintf("job %d (%s, named %s, at %s): %v", j.Number, j.ID, j.Durability, j.Node, err), isUndone
				if errors.Is(err, lab.ErrNoSuchJob) {
					kind = isLost
				}
				break
			}
			s.ledger.Seen(n, v)
			if s.mustEnd(r, j) && v.Status != "succeeded" {
				last, kind = fmt.Sprintf("job %d (%s, named %s, at %s): %s shows it as %s %s", j.Number, j.ID, j.Durability, j.Node, n.Name, v.Status, v.Error), isUndone
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
