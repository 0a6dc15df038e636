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

// JobLoad says which jobs clients submit while a test causes faults.
type JobLoad struct {
	// Clients of each site; each has one submission in flight.
	Clients int
	// Durabilities are asked for in turn; "" is the default.
	Durabilities []string
	// Sites whose clients submit; all when empty.
	Sites []*Site
	// Model answers the jobs; FastModel when empty.
	Model string
	// Every is the least time between two submissions of a client.
	Every time.Duration
}

// Job is one submission as its client knows it.
type Job struct {
	Number     int64
	ID         string
	Asked      string // durability asked for
	Durability string // durability that the 202 promises
	Site, Node string // that it was submitted to
	Key        string // Idempotency-Key, if any
	// Acknowledged is when the 202 arrived, zero if it did not.
	Acknowledged time.Time
	Took         time.Duration // until the answer
	// Code is the answer's status, 0 without an answer.
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

// Final reports whether the status can't change any more.
func (v JobView) Final() bool {
	switch v.Status {
	case "succeeded", "failed", "cancelled", "expired":
		return true
	}
	return false
}

// JobLedger is a running JobLoad with a record of what was acknowledged.
type JobLedger struct {
	lab    *Lab
	load   JobLoad
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
	number atomic.Int64

	mu   sync.Mutex // guards what follows
	jobs []Job
	// finals are the final views that nodes have shown, by node and job. A node must
	// not show another view of the job after that.
	finals map[string]JobView
	broken []string
}

// ErrNoSuchJob is the error for a node's 404.
var ErrNoSuchJob = errors.New("no such job")

// StartJobs begins at once. Stop it before reading the record.
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
			rest = max(rest, 20*time.Millisecond) // a refused client does not retry at once
		}
		if rest > 0 {
			sleep(b.ctx, rest)
		}
	}
}

// QuestionOf returns a job's prompt, which is unique.
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

// send submits the job to a node and records the answer.
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

// Job asks a node for a job. The error is ErrNoSuchJob when it answers 404.
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

// JobIDs returns the ids of all jobs that a node has itself: unlike the client API, its
// admin API asks no other node.
func (n *Node) JobIDs(ctx context.Context) (map[string]bool, error) {
	ids := map[string]bool{}
	for page := ""; ; {
		text, err := n.get(ctx, n.AdminURL()+"/admin/v1/jobs?limit=100"+page)
		if err != nil {
			return nil, err
		}
		var list struct {
			Data []struct {
				ID string `json:"id"`
			} `json:"data"`
			LastID  string `json:"last_id"`
			HasMore bool   `json:"has_more"`
		}
		if err := json.Unmarshal(text, &list); err != nil {
			return nil, fmt.Errorf("%s's list of jobs: %w", n.Name, err)
		}
		for _, j := range list.Data {
			ids[j.ID] = true
		}
		if !list.HasMore || list.LastID == "" {
			return ids, nil
		}
		page = "&after=" + list.LastID
	}
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

// JobStreams asks a node which node executes each stream, by its copy of the agreed
// state.
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

// watch asks for acknowledged jobs of all ages, to find a final status that changes.
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

// sample returns an acknowledged job: in odd turns a recent one, in even turns any.
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

// Seen records a node's view of a job. A view that differs from an earlier final
// view of the same node is a violation.
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

// Forget drops what a node has shown. It is for a node that has lost its disk and
// with it what it knew.
func (b *JobLedger) Forget(n *Node) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.finals, func(key string, _ JobView) bool { return len(key) > len(n.Name) && key[:len(n.Name)+1] == n.Name+"/" })
}

// Count returns how many jobs were acknowledged so far.
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

// Lacking describes the acknowledged jobs of some durabilities that were acknowledged
// before a time and that a node does not have itself.
func (b *JobLedger) Lacking(ctx context.Context, n *Node, before time.Time, durabilities ...string) ([]string, error) {
	has, err := n.JobIDs(ctx)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var lacks []string
	for _, j := range b.jobs {
		if !j.Acknowledged.IsZero() && j.Acknowledged.Before(before) && slices.Contains(durabilities, j.Durability) && !has[j.ID] {
			lacks = append(lacks, fmt.Sprintf("%s has no job %d (%s, %s, submitted to %s)", n.Name, j.Number, j.ID, j.Durability, j.Node))
		}
	}
	return lacks, nil
}

// Stop ends the submissions and returns all of them.
func (b *JobLedger) Stop() []Job {
	b.cancel()
	b.work.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.jobs)
}

// Broken describes final views that changed.
func (b *JobLedger) Broken() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.broken)
}

// CacheEntries returns the number of answers in the node's shared tier.
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
		return 0, errors.New("the number of entries is not known yet")
	}
	return *stats.Shared.Entries, nil
}

// Post sends a body to a node from a client in the node's site.
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
