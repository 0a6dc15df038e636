package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Job is a submission as its client knows it.
type Job struct {
	ID         string
	Durability string // that the 202 promised
	Node       string
	Acked      time.Time
	Final      string // the first final status that a node has shown
	FinalBy    string
}

// view is a job as a node shows it.
type view struct {
	ID         string `json:"id"`
	Status     string `json:"status"`
	Durability string `json:"durability"`
}

func final(status string) bool {
	switch status {
	case "succeeded", "failed", "cancelled", "expired":
		return true
	}
	return false
}

// strong reports whether a job survives the loss of one disk.
func (j *Job) strong() bool { return j.Durability == "two-sites" || j.Durability == "two-cities" }

// Ledger is what all clients know.
type Ledger struct {
	w *World

	mu     sync.Mutex // guards all below
	random *rand.Rand
	jobs   []*Job
	sent   int
	refuse map[string]int
}

func newLedger(w *World, seed uint64) *Ledger {
	return &Ledger{w: w, random: rand.New(rand.NewPCG(seed, 0xc11e)), refuse: map[string]int{}}
}

func (l *Ledger) draw(n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.random.IntN(n)
}

// submitAll submits jobs to the nodes of a site until ctx ends.
func (l *Ledger) submitAll(ctx context.Context, machines []*Machine, every time.Duration, body int) {
	for sleep(ctx, every/2+time.Duration(l.draw(int(every)))) == nil {
		m := machines[l.draw(len(machines))]
		durability := [...]string{"", "node", "site", "two-sites", "two-sites", "two-cities"}[l.draw(6)]
		_, _ = l.submit(ctx, m, durability, body/2+l.draw(body/2+1)) // a refusal is no loss
	}
}

// submit returns the job that was acknowledged.
func (l *Ledger) submit(ctx context.Context, m *Machine, durability string, size int) (*Job, error) {
	l.mu.Lock()
	l.sent++
	n := l.sent
	l.mu.Unlock()
	question := fmt.Sprintf("job %d "+secret+" %s", n, strings.Repeat("x", size))
	body := fmt.Sprintf(`{"endpoint":"/v1/chat/completions","durability":%q,"body":{"model":%q,"messages":[{"role":"user","content":%q}]}}`, durability, modelName, question)
	if durability == "" {
		body = strings.Replace(body, `"durability":"",`, "", 1)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+m.at(portAPI)+"/v1/jobs", strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if n%2 == 0 {
		req.Header.Set("Idempotency-Key", fmt.Sprintf("key-%d", n))
	}
	var v view
	if _, err = l.w.do(m.Site, req, &v); err != nil {
		return nil, err
	}
	j := &Job{ID: v.ID, Durability: v.Durability, Node: m.Name, Acked: time.Now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.jobs = append(l.jobs, j)
	return j, nil
}

// ask asks a node for a job. The status is empty when the node doesn't know the job.
func (l *Ledger) ask(ctx context.Context, m *Machine, j *Job) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var v view
	code, err := l.w.call(ctx, m, http.MethodGet, m.at(portAPI)+"/v1/jobs/"+j.ID, "", &v)
	switch {
	case code == http.StatusNotFound:
		return "", nil
	case err != nil:
		return "", err
	}
	return v.Status, nil
}

// watch reads random jobs at random nodes until ctx ends.
func (l *Ledger) watch(ctx context.Context, machines []*Machine, broken func(law int, format string, args ...any)) {
	for sleep(ctx, 500*time.Millisecond) == nil {
		l.mu.Lock()
		var j *Job
		if len(l.jobs) > 0 {
			recent := l.jobs[max(0, len(l.jobs)-50):]
			j = recent[l.random.IntN(len(recent))]
		}
		l.mu.Unlock()
		if j == nil {
			continue
		}
		m := machines[l.draw(len(machines))]
		if status, err := l.ask(ctx, m, j); err == nil && status != "" {
			l.seen(j, m, status, broken)
		}
	}
}

// seen notes what a node showed, and finds a final status that has changed. Jobs of weak
// durability may have two results until sites that were cut off from each other converge.
func (l *Ledger) seen(j *Job, m *Machine, status string, broken func(law int, format string, args ...any)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !final(status) {
		if j.strong() && j.FinalBy == m.Name {
			broken(3, "%s was shown as %s by %s, which now shows %s", j.ID, j.Final, m.Name, status)
		}
		return
	}
	if j.Final == "" {
		j.Final, j.FinalBy = status, m.Name
	}
	if j.strong() && j.Final != status {
		broken(3, "%s was shown as %s by %s and as %s by %s", j.ID, j.Final, j.FinalBy, status, m.Name)
	}
}

// acknowledged returns the jobs that were acknowledged before a time.
func (l *Ledger) acknowledged(before time.Time, want func(*Job) bool) []*Job {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []*Job
	for _, j := range l.jobs {
		if j.Acked.Before(before) && want(j) {
			found = append(found, j)
		}
	}
	return found
}
