package drill

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Question is a small request as a client or a load balancer sends it.
type Question string

const (
	AskModels     Question = "GET /v1/models"
	AskReady      Question = "GET /healthz/ready"
	AskPrimary    Question = "GET /healthz/primary"
	AskCompletion Question = "POST /v1/chat/completions"
)

// Target is one node's API port.
type Target struct{ Site, Node, API string }

// Answer is how a request ended.
type Answer struct {
	// Refused: 401 or 403, because the probe has no API key.
	Refused bool
	// Primary: the node answers that it acts as primary. For AskPrimary only.
	Primary bool
}

// Asker sends one request and judges the answer. It gives an error when a client would
// see one. That a node is not the primary is no error.
type Asker interface {
	Ask(ctx context.Context, t Target, q Question) (Answer, error)
}

// Bounds of the probe.
const (
	askEvery   = 50 * time.Millisecond // per target: 20 requests a second
	roleEvery  = 100 * time.Millisecond
	payEvery   = time.Second // completions
	askTimeout = 5 * time.Second
	maxPending = 128 // unanswered requests of a loop: more than 5 s of them
	maxTargets = 16
	maxPerSite = 4
)

// probe asks the nodes of all sites from outside until it is stopped.
type probe struct {
	asker    Asker
	boottime func() time.Duration
	now      func() time.Time
	paid     bool // send completions too

	mu    sync.Mutex // guards sites, roles
	sites map[string]*Clients
	roles map[string]role // by node
}

// role tells whether a node answers that it acts as primary, and since when.
type role struct {
	site  string
	since time.Duration // Boottime
	acts  bool
}

// chosen bounds the targets to the first few nodes of each site, by name.
func chosen(all []Target) []Target {
	slices.SortFunc(all, func(a, b Target) int { return strings.Compare(a.Node, b.Node) })
	count := map[string]int{}
	var some []Target
	for _, t := range all {
		if count[t.Site] < maxPerSite && len(some) < maxTargets {
			count[t.Site]++
			some = append(some, t)
		}
	}
	return some
}

// run sends requests until ctx ends, and then waits for their answers.
func (p *probe) run(ctx context.Context, targets []Target) {
	var loops sync.WaitGroup
	defer loops.Wait()
	for _, t := range targets {
		p.mu.Lock()
		if p.sites[t.Site] == nil {
			p.sites[t.Site] = &Clients{Site: t.Site, Judged: true, Samples: []ClientError{}}
		}
		p.mu.Unlock()
		loops.Go(func() { p.every(ctx, askEvery, t, AskModels, AskReady) })
		loops.Go(func() { p.every(ctx, roleEvery, t, AskPrimary) })
		if p.paid {
			loops.Go(func() { p.every(ctx, payEvery, t, AskCompletion) })
		}
	}
}

// every sends a request at each interval, whether or not earlier ones were answered: a
// closed loop would hide a node that hangs.
func (p *probe) every(ctx context.Context, interval time.Duration, t Target, questions ...Question) {
	// Requests under way when the drill ends may still be answered.
	asking := context.WithoutCancel(ctx)
	var pending sync.WaitGroup
	defer pending.Wait()
	slots := make(chan struct{}, maxPending)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		q := questions[i%len(questions)]
		select {
		case slots <- struct{}{}:
		default:
			p.note(t, q, p.now(), 0, Answer{}, fmt.Errorf("%d requests wait for an answer", maxPending))
			continue
		}
		pending.Go(func() {
			defer func() { <-slots }()
			p.ask(asking, t, q)
		})
	}
}

func (p *probe) ask(ctx context.Context, t Target, q Question) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	at, began := p.now(), p.boottime()
	answer, err := p.asker.Ask(ctx, t, q)
	p.note(t, q, at, p.boottime()-began, answer, err)
}

func (p *probe) note(t Target, q Question, at time.Time, took time.Duration, a Answer, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if q == AskPrimary {
		acts := err == nil && a.Primary
		if r := p.roles[t.Node]; r.acts != acts || r.site == "" {
			p.roles[t.Node] = role{site: t.Site, since: p.boottime(), acts: acts}
		}
		return
	}
	c := p.sites[t.Site]
	c.Requests++
	c.Slowest = max(c.Slowest, took.Seconds())
	if a.Refused {
		c.Refused++
	}
	if err == nil {
		return
	}
	c.Errors++
	if len(c.Samples) < maxSamples {
		c.Samples = append(c.Samples, ClientError{At: at.UTC(), Node: t.Node, Asked: string(q), Error: brief(err.Error())})
	}
}

// acting tells since when a node of the site has answered that it acts as primary. It
// gives false when none does.
func (p *probe) acting(site string) (since time.Duration, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.roles {
		if r.site == site && r.acts && (!ok || r.since < since) {
			since, ok = r.since, true
		}
	}
	return since, ok
}

// seen is what clients have seen so far, by site. requests and errors are the sums of all
// sites except one: the one that is cut off.
func (p *probe) seen(except string) (clients []Clients, requests, errors int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	clients = []Clients{}
	for _, c := range p.sites {
		one := *c
		one.Samples = slices.Clone(c.Samples)
		one.Judged = c.Site != except
		if one.Judged {
			requests += one.Requests
			errors += one.Errors
		}
		clients = append(clients, one)
	}
	slices.SortFunc(clients, func(a, b Clients) int { return strings.Compare(a.Site, b.Site) })
	return clients, requests, errors
}
