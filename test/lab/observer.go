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

// observeEvery is how often every node is asked how the cluster is.
const observeEvery = 100 * time.Millisecond

// maxObservations bounds the record: five nodes for five hours.
const maxObservations = 1 << 20

// Observer asks every running node for its status, from within its own site, so
// that cuts don't blind it. Its record is what tests compare with the truth
// that they made.
type Observer struct {
	lab  *Lab
	stop func()

	mu      sync.Mutex // guards all below
	seen    []Observation
	dropped int
	laws    lawBook
}

// Observation is one answer of one node, or none.
type Observation struct {
	Node string
	PID  int // of the process that answered
	// Asked and Answered bracket the moment that the answer is about.
	Asked, Answered time.Time
	Err             error // no answer; all below is zero

	Healthy    bool
	Quorum     bool
	Generation uint64 // 0 unknown
	Primary    string // site
	Epoch      uint64
	Leader     string // node
	Reasons    []string
}

// observe begins at once.
func (l *Lab) observe() *Observer {
	o := &Observer{lab: l, laws: newLawBook()}
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

// Between gives what was answered from one time to another, in order.
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

// Laws gives the laws that were broken so far, in words.
func (o *Observer) Laws() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	broken := append([]string(nil), o.laws.broken...)
	for leader, by := range o.laws.leaders {
		if !slices.ContainsFunc(o.lab.Nodes(), func(n *Node) bool { return n.Name == leader }) {
			broken = append(broken, fmt.Sprintf("law 5: %s named %q for Raft's leader, which is no node", by, leader))
		}
	}
	if o.dropped > 0 {
		broken = append(broken, fmt.Sprintf("the record was full: %d observations were checked and not kept", o.dropped))
	}
	return broken
}

// lawBook holds what can be broken by what nodes say of each other. Law 1: at
// most one primary per (generation, epoch), and both only rise. Law 5, as far as it
// goes by names.
type lawBook struct {
	primaries map[term]string   // which site it is
	last      map[int]term      // what each process said last; a new one may know less at first
	leaders   map[string]string // named as Raft's, and by whom first
	broken    []string
}

type term struct{ generation, epoch uint64 }

const maxBroken = 100 // one is enough to fail; more help to understand

func newLawBook() lawBook {
	return lawBook{primaries: map[term]string{}, last: map[int]term{}, leaders: map[string]string{}}
}

func (b *lawBook) check(s Observation) {
	if _, known := b.leaders[s.Leader]; !known && s.Leader != "" && len(b.leaders) < maxBroken {
		b.leaders[s.Leader] = s.Node
	}
	if s.Err != nil || s.Primary == "" || s.Generation == 0 {
		return
	}
	now := term{s.Generation, s.Epoch}
	if other, known := b.primaries[now]; known && other != s.Primary {
		b.breaks("law 1: generation %d, epoch %d has two primaries, %s and (says %s) %s", now.generation, now.epoch, other, s.Node, s.Primary)
	} else if !known {
		b.primaries[now] = s.Primary
	}
	before := b.last[s.PID]
	if now.generation < before.generation || now.generation == before.generation && now.epoch < before.epoch {
		b.breaks("law 1: %s went back from generation %d, epoch %d to %d, %d", s.Node, before.generation, before.epoch, now.generation, now.epoch)
	}
	b.last[s.PID] = now
}

func (b *lawBook) breaks(format string, args ...any) {
	if len(b.broken) < maxBroken {
		b.broken = append(b.broken, fmt.Sprintf(format, args...))
	}
}
