//go:build linux

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// JobLoad is what clients hand in while a test makes trouble.
type JobLoad struct {
	// Clients of each site; each has one submission in flight.
	Clients int
	// Durabilities are asked for in turn; "" takes the default.
	Durabilities []string
	// Sites are those whose clients submit; all when empty.
	Sites []*Site
	// Model answers the jobs; FastModel when empty.
	Model string
	// Every is the least time between two submissions of a client; 0: none.
	Every time.Duration
}

// Job is one submission, as its client knows it.
type Job struct {
	Number     int64
	ID         string
	Asked      string // durability asked for
	Durability string // what the 202 names
	Site, Node string // where it was submitted
	Key        string // Idempotency-Key, if any
	// Acknowledged is when the 202 arrived; zero: it did not.
	Acknowledged time.Time
	Took         time.Duration // until the answer
	// Code is the answer's status, 0 when there was none.
	Code int
	Err  error
}

// JobView is a job as a node shows it.
type JobView struct {
	ID         string          `json:"id"`
	Status     string          `json:"status"`
	Durability string          `json:"durability"`
	Site       string          `json:"site"`
	ExecutedBy string          `json:"executed_by"`
	Attempts   int             `json:"attempts"`
	Result     json.RawMessage `json:"result"`
	Error      json.RawMessage `json:"error"`
}

// Final reports whether nothing comes after the status.
func (v JobView) Final() bool {
	switch v.Status {
	case "succeeded", "failed", "cancelled", "expired":
		return true
	}
	return false
}

// JobLedger is a load of jobs under way, and the book of what was promised.
type JobLedger struct {
	lab    *Lab
	load   JobLoad
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
	number atomic.Int64

	mu   sync.Mutex // guards what follows
	jobs []Job
	// finals is what a node has shown as final, by node and job; gone back is
	// what it must never show again.
	finals map[string]JobView
	broken []string
}

// ErrNoSuchJob is what a node answers that does not know a job.
var ErrNoSuchJob = errors.New("no such job")

// StartJobs begins at once. Stop it before looking at what it holds.
func (l *Lab) StartJobs(load JobLoad) *JobLedger {
	l.t.Helper()
	if len(load.Sites) == 0 {
		load.Sites = l.Sites
	}
	if load.Model == "" {
		load.Model = FastModel
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &JobLedger{lab: l, load: load, ctx: ctx, cancel: cancel, finals: map[string]JobView{}}
	l.t.Cleanup(func() {
		cancel()
		b.work.Wait()
	})
	for _, s := range load.Sites {
		for range load.Clients {
			b.work.Go(func() { b.submitAll(s) })
		}
		b.work.Go(func() { b.watch(s) })
	}
	return b
}

func (b *JobLedger) submitAll(s *Site) {
	for b.ctx.Err() == nil {
		begun := time.Now()
		j := b.submit(s)
		if b.ctx.Err() != nil && j.Acknowledged.IsZero() {
			return
		}
		b.mu.Lock()
		b.jobs = append(b.jobs, j)
		b.mu.Unlock()
		rest := b.load.Every - time.Since(begun)
		if j.Err != nil {
			rest = max(rest, 20*time.Millisecond) // who is refused does not hammer
		}
		if rest > 0 {
			sleep(b.ctx, rest)
		}
	}
}

// QuestionOf is the prompt of a job, which no other has.
func QuestionOf(number int64) string { return fmt.Sprintf("Job %d: what is carried?", number) }

func (b *JobLedger) submit(s *Site) Job {
	n := b.number.Add(1)
	j := Job{Number: n, Site: s.Name, Asked: b.load.Durabilities[int(n)%len(b.load.Durabilities)]}
	node := s.Nodes[int(n/int64(len(b.load.Durabilities)))%len(s.Nodes)]
	j.Node = node.Name
	if n%2 == 0 {
		j.Key = fmt.Sprintf("key-%d", n)
	}
	begun := time.Now()
	j.send(b.ctx, node, b.load.Model)
	j.Took = time.Since(begun)
	return j
}

// send submits the job to a node and notes the answer.
func (j *Job) send(ctx context.Context, n *Node, model string) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request := map[string]any{
		"endpoint": "/v1/chat/completions",
		"body":     map[string]any{"model": model, "messages": []map[string]string{{"role": "user", "content": QuestionOf(j.Number)}}},
	}
	if j.Asked != "" {
		request["durability"] = j.Asked
	}
	text, err := json.Marshal(request)
	if err != nil {
		j.Err = err
		return
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, n.API()+"/v1/jobs", bytes.NewReader(text))
	if err != nil {
		j.Err = err
		return
	}
	req.Header.Set("Content-Type", "application/json")
	if j.Key != "" {
		req.Header.Set("Idempotency-Key", j.Key)
	}
	answer, err := n.Site.http.Do(req)
	if err != nil {
		j.Err = err
		return
	}
	defer func() { _ = answer.Body.Close() }()
	j.Code = answer.StatusCode
	body, err := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
	switch {
	case err != nil:
		j.Err = err
	case answer.StatusCode != http.StatusAccepted:
		j.Err = fmt.Errorf("status %d: %s", answer.StatusCode, body)
	default:
		var v JobView
		if j.Err = json.Unmarshal(body, &v); j.Err == nil {
			j.ID, j.Durability, j.Acknowledged = v.ID, v.Durability, time.Now()
		}
	}
}

// Job asks a node for a job; ErrNoSuchJob when it answers 404.
func (n *Node) Job(ctx context.Context, id string) (JobView, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.API()+"/v1/jobs/"+id, nil)
	if err != nil {
		return JobView{}, err
	}
	answer, err := n.Site.http.Do(req)
	if err != nil {
		return JobView{}, err
	}
	defer func() { _ = answer.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 32<<20))
	if err != nil {
		return JobView{}, err
	}
	switch answer.StatusCode {
	case http.StatusOK:
		var v JobView
		return v, json.Unmarshal(body, &v)
	case http.StatusNotFound:
		return JobView{}, fmt.Errorf("%s: %s: %w", n.Name, id, ErrNoSuchJob)
	}
	return JobView{}, fmt.Errorf("%s: %s: status %d: %s", n.Name, id, answer.StatusCode, body)
}

// CheckJobs asks a node whether its journal and its table of jobs agree.
func (n *Node) CheckJobs(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, n.AdminURL()+"/admin/v1/jobs/check", nil)
	if err != nil {
		return err
	}
	_, err = n.ask(req)
	return err
}

// JobStreams asks a node who executes what, by its copy of the agreed state.
func (n *Node) JobStreams(ctx context.Context) (admin.JobStreams, error) {
	var s admin.JobStreams
	text, err := n.get(ctx, n.AdminURL()+"/admin/v1/jobs/streams")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("%s's job streams: %w", n.Name, err)
	}
	return s, nil
}

// watch asks for acknowledged jobs of all ages, to catch one that goes back.
func (b *JobLedger) watch(s *Site) {
	for turn := 0; sleep(b.ctx, 25*time.Millisecond); turn++ {
		id, ok := b.sample(turn)
		node := s.Nodes[turn%len(s.Nodes)]
		if !ok || !node.Running() {
			continue
		}
		if v, err := node.Job(b.ctx, id); err == nil {
			b.Seen(node, v)
		}
	}
}

// sample is a recent job or, each other time, any.
func (b *JobLedger) sample(turn int) (string, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for back := range 20 {
		if len(b.jobs) <= back {
			return "", false
		}
		at := len(b.jobs) - 1 - (turn*7+back)%min(len(b.jobs), 200)
		if turn%2 == 0 {
			at = (turn*7919 + back) % len(b.jobs)
		}
		if j := b.jobs[at]; !j.Acknowledged.IsZero() {
			return j.ID, true
		}
	}
	return "", false
}

// Seen notes what a node shows of a job. What it has shown as final it must not
// show otherwise.
func (b *JobLedger) Seen(n *Node, v JobView) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := n.Name + "/" + v.ID
	before, known := b.finals[key]
	if known && (v.Status != before.Status || !bytes.Equal(v.Result, before.Result)) && len(b.broken) < 50 {
		b.broken = append(b.broken, fmt.Sprintf("%s showed %s as %s, then as %s", n.Name, v.ID, describe(before), describe(v)))
	}
	if v.Final() {
		b.finals[key] = v
	}
}

func describe(v JobView) string {
	return fmt.Sprintf("%s (result of %d bytes)", v.Status, len(v.Result))
}

// Forget is for a node whose disk was lost: it may know less than it has shown.
func (b *JobLedger) Forget(n *Node) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.finals, func(key string, _ JobView) bool { return len(key) > len(n.Name) && key[:len(n.Name)+1] == n.Name+"/" })
}

// Count is how many jobs were acknowledged so far.
func (b *JobLedger) Count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	count := 0
	for _, j := range b.jobs {
		if !j.Acknowledged.IsZero() {
			count++
		}
	}
	return count
}

// Stop ends the submissions and gives all of them.
func (b *JobLedger) Stop() []Job {
	b.cancel()
	b.work.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.jobs)
}

// Broken is what was seen to go back.
func (b *JobLedger) Broken() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.broken)
}

// CacheEntries is how many answers are in the node's shared tier.
func (n *Node) CacheEntries(ctx context.Context) (int64, error) {
	text, err := n.get(ctx, n.AdminURL()+"/admin/v1/cache")
	if err != nil {
		return 0, err
	}
	var stats struct {
		Shared struct {
			Entries *int64 `json:"entries"`
		} `json:"shared"`
	}
	if err := json.Unmarshal(text, &stats); err != nil {
		return 0, err
	}
	if stats.Shared.Entries == nil {
		return 0, errors.New("how many entries there are is not known yet")
	}
	return *stats.Shared.Entries, nil
}

// Post sends a body to a node as a client of its site does.
func (n *Node) Post(ctx context.Context, path string, body []byte, header map[string]string) (status int, got http.Header, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, n.API()+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	for name, value := range header {
		req.Header.Set(name, value)
	}
	resp, err := n.Site.http.Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err = io.ReadAll(io.LimitReader(resp.Body, 32<<20))
	return resp.StatusCode, resp.Header, answer, err
}
