//go:build linux

package lab

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// observeEvery is the interval at which every node is asked for its status.
const observeEvery = 100 * time.Millisecond

// maxObservations bounds the record. It suffices for five nodes and five hours.
const maxObservations = 1 << 20

// Observer asks every running node for its status from within the node's site, so
// that cut links don't matter, records the answers and checks the laws.
type Observer struct {
	lab  *Lab
	stop func()

	mu      sync.Mutex // guards all below
	seen    []Observation
	dropped int
	laws    lawCheck
}

// Observation is one question to a node with its answer, if any.
type Observation struct {
	Node string
	PID  int // of the process that answered
	// The answer describes a moment between Asked and Answered.
	Asked, Answered time.Time
	Err             error // there was no answer; all below is zero

	Healthy    bool
	Quorum     bool
	Generation uint64 // 0 unknown
	Primary    string // site
	Epoch      uint64
	Leader     string // node
	Reasons    []string
}

// observe starts an Observer.
func (l *Lab) observe() *Observer {
	o := &Observer{lab: l, laws: newLawCheck()}
	o.stop = l.watchNodes(observeEvery, o.look)
	return o
}

func (o *Observer) look(ctx context.Context, n *Node) {
	if !n.Running() {
		return
	}
	ask, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	asked, pid := time.Now(), n.PID()
	status, err := n.Status(ask)
	if ctx.Err() == nil {
		seen := observation(n.Name, asked, status, err)
		seen.PID = pid
		o.note(seen)
	}
}

func observation(node string, asked time.Time, s admin.Status, err error) Observation {
	seen := Observation{Node: node, Asked: asked, Answered: time.Now(), Err: err}
	if err != nil {
		return seen
	}
	seen.Healthy, seen.Quorum, seen.Reasons = s.Healthy, s.Raft.Quorum, s.Reasons
	if s.Generation != nil {
		seen.Generation = *s.Generation
	}
	if s.Primary != nil {
		seen.Primary, seen.Epoch = s.Primary.Site, s.Primary.Epoch
	}
	if s.Raft.Leader != nil {
		seen.Leader = *s.Raft.Leader
	}
	return seen
}

func (o *Observer) note(seen Observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.laws.check(seen)
	if len(o.seen) >= maxObservations {
		o.dropped++
		return
	}
	o.seen = append(o.seen, seen)
}

// Between returns the observations answered from one time to another, in order.
func (o *Observer) Between(from, to time.Time) []Observation {
	o.mu.Lock()
	defer o.mu.Unlock()
	var some []Observation
	for _, s := range o.seen {
		if !s.Answered.Before(from) && s.Answered.Before(to) {
			some = append(some, s)
		}
	}
	return some
}

// Laws describes the violations of laws so far.
func (o *Observer) Laws() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	broken := append([]string(nil), o.laws.broken...)
	for leader, by := range o.laws.leaders {
		if !slices.ContainsFunc(o.lab.Nodes(), func(n *Node) bool { return n.Name == leader }) {
			broken = append(broken, fmt.Sprintf("law 5: %s named %q as the Raft leader, and there is no such node", by, leader))
		}
	}
	if o.dropped > 0 {
		broken = append(broken, fmt.Sprintf("the record was full: %d observations were checked but not kept", o.dropped))
	}
	return broken
}

// lawCheck checks what statuses can show of the laws. Law 1: there is at most one
// primary per (generation, epoch), and both only rise. Law 5 (a status is true): the
// Raft leader that a status names is a node.
type lawCheck struct {
	primaries map[term]string   // site by term
	last      map[int]term      // latest term that each process reported; a new process may start lower
	leaders   map[string]string // Raft leaders named, each with the node that first named it
	broken    []string
}

type term struct{ generation, epoch uint64 }

const maxBroken = 100 // one fails the test; the others help to understand

func newLawCheck() lawCheck {
	return lawCheck{primaries: map[term]string{}, last: map[int]term{}, leaders: map[string]string{}}
}

func (c *lawCheck) check(s Observation) {
	if _, known := c.leaders[s.Leader]; !known && s.Leader != "" && len(c.leaders) < maxBroken {
		c.leaders[s.Leader] = s.Node
	}
	if s.Err != nil || s.Primary == "" || s.Generation == 0 {
		return
	}
	now := term{s.Generation, s.Epoch}
	if other, known := c.primaries[now]; known && other != s.Primary {
		c.violated("law 1: generation %d, epoch %d has two primaries, %s and (says %s) %s", now.generation, now.epoch, other, s.Node, s.Primary)
	} else if !known {
		c.primaries[now] = s.Primary
	}
	before := c.last[s.PID]
	if now.generation < before.generation || now.generation == before.generation && now.epoch < before.epoch {
		c.violated("law 1: %s went back from generation %d, epoch %d to %d, %d", s.Node, before.generation, before.epoch, now.generation, now.epoch)
	}
	c.last[s.PID] = now
}

func (c *lawCheck) violated(format string, args ...any) {
	if len(c.broken) < maxBroken {
		c.broken = append(c.broken, fmt.Sprintf(format, args...))
	}
}
