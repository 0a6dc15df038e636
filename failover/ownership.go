package failover

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// ErrNotOwner is why a job of a stream may not be started here.
var ErrNotOwner = errors.New("this node may not execute the jobs of that stream")

// OwnershipStanding is what Ownership needs of the cluster; *cluster.Cluster is one.
type OwnershipStanding interface {
	State() *agreed.State
	Changed() <-chan struct{}
	// OwnershipLease is how long the lease is good, and the newest change of
	// State.Ownership that was heard of with it.
	OwnershipLease() (left time.Duration, ownership uint64)
	Propose(ctx context.Context, t agreed.CommandType, data any) (index uint64, err error)
}

// Ownership says which job streams this node may execute, start by start.
//
// A node may start a job of a stream while all of this holds: the agreed owner
// is this node; it holds a lease; with that lease it has heard of no change of
// ownership that its own copy of the state lacks; and every lease of the owner
// before has ended. It is Role's proof, with State.Ownership for the epoch.
type Ownership struct {
	node     string
	standing OwnershipStanding
	boottime func() time.Duration
	wait     func() time.Duration

	mu sync.Mutex // guards known; the state and the lease are read under it
	// known holds, of each stream that this node owns, the token and from when on
	// it may act.
	known map[string]tenancy
}

type tenancy struct {
	token     agreed.FenceToken
	notBefore time.Duration
}

// NewOwnership makes an Ownership of a node. newLeaderWait is 1.1 L of
// cluster.Timing, which is known once the node is a member; boottime is the clock
// that leases are counted on.
func NewOwnership(node string, s OwnershipStanding, newLeaderWait func() time.Duration, boottime func() time.Duration) *Ownership {
	return &Ownership{node: node, standing: s, boottime: boottime, wait: newLeaderWait, known: map[string]tenancy{}}
}

// Permit permits one start of a job.
type Permit struct {
	Token    agreed.FenceToken
	deadline time.Duration
	boottime func() time.Duration
}

// InTime reports whether the start that it permits may still happen. What is
// found to have started later counts as a breach, and its result is not current.
func (p Permit) InTime() bool { return p.boottime != nil && p.boottime() < p.deadline }

// Check permits one start of a job of a stream (its cluster.StreamKey), within
// StartWithin and while the lease lasts. The error wraps ErrNotOwner.
func (o *Ownership) Check(stream string) (Permit, error) {
	now := o.boottime() // before what is read after it
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.standing.State()
	o.note(s, o.boottime())
	left, heard := o.standing.OwnershipLease()
	j, agreed := s.Streams[stream]
	switch {
	case !agreed:
		return Permit{}, fmt.Errorf("%w: %s is not agreed on", ErrNotOwner, stream)
	case j.Owner != o.node:
		return Permit{}, fmt.Errorf("%w: %s belongs to %s", ErrNotOwner, stream, j.Owner)
	case left <= 0:
		return Permit{}, fmt.Errorf("%w: %s: no lease", ErrNotOwner, stream)
	case heard > s.Ownership:
		return Permit{}, fmt.Errorf("%w: %s: there was a change of ownership (entry %d) that has not arrived here", ErrNotOwner, stream, heard)
	case now < o.known[stream].notBefore:
		return Permit{}, fmt.Errorf("%w: %s: the lease of %s may still run", ErrNotOwner, stream, j.Before)
	}
	return Permit{Token: j.Token, deadline: now + min(StartWithin, left), boottime: o.boottime}, nil
}

// note starts the wait for each stream that came to this node from another: its
// lease may run for L after it was disowned. A process that has just started
// doesn't know how long it has owned what it owns, so it waits as well.
func (o *Ownership) note(s *agreed.State, now time.Duration) {
	for key := range o.known {
		if s.Streams[key].Owner != o.node {
			delete(o.known, key)
		}
	}
	for key, j := range s.Streams {
		if j.Owner != o.node || o.known[key].token == j.Token {
			continue
		}
		t := tenancy{token: j.Token}
		if j.Before != "" && j.Before != o.node {
			t.notBefore = now + o.wait()
		}
		o.known[key] = t
	}
}

// Mine are the streams that this node owns by its copy of the agreed state,
// whether it may act for them now or not.
func (o *Ownership) Mine() []agreed.JobStream { return o.standing.State().StreamsOf(o.node) }

// Changed closes at the next change of the agreed state.
func (o *Ownership) Changed() <-chan struct{} { return o.standing.Changed() }

// Leased reports whether this node holds a lease now.
func (o *Ownership) Leased() bool {
	left, _ := o.standing.OwnershipLease()
	return left > 0
}

// Open makes a stream of this node known to the cluster: from the moment that it
// was asked for, others may adopt it, so its jobs need a permit. Repeating it is
// safe.
func (o *Ownership) Open(ctx context.Context, incarnation string) (agreed.FenceToken, error) {
	if _, err := o.standing.Propose(ctx, agreed.CmdStreamOpen, agreed.StreamOpen{Origin: o.node, Incarnation: incarnation}); err != nil {
		return agreed.FenceToken{}, fmt.Errorf("open job stream: %w", err)
	}
	return o.agreed(ctx, agreed.StreamKey(o.node, incarnation))
}

// Inherit makes a stream known that a removed node took alone and never told of,
// and asks for it: some node of those that have jobs of it gets it. Repeating it is
// safe. The error wraps cluster.ErrStillMember when its node is one.
func (o *Ownership) Inherit(ctx context.Context, origin, incarnation string) error {
	d := agreed.StreamInherit{Origin: origin, Incarnation: incarnation, Owner: o.node}
	if _, err := o.standing.Propose(ctx, agreed.CmdStreamInherit, d); err != nil {
		return fmt.Errorf("inherit job stream: %w", err)
	}
	_, err := o.agreed(ctx, agreed.StreamKey(origin, incarnation))
	return err
}

// agreed waits until the own copy of the state has a stream.
func (o *Ownership) agreed(ctx context.Context, key string) (agreed.FenceToken, error) {
	for {
		changed := o.standing.Changed()
		if j, agreed := o.standing.State().Streams[key]; agreed {
			return j.Token, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return agreed.FenceToken{}, fmt.Errorf("wait for job stream %s: %w", key, ctx.Err())
		}
	}
}

// Drop forgets streams of this node's of which nothing is left to do.
func (o *Ownership) Drop(ctx context.Context, streams ...string) error {
	if _, err := o.standing.Propose(ctx, agreed.CmdStreamDrop, agreed.StreamDrop{Owner: o.node, Streams: streams}); err != nil {
		return fmt.Errorf("drop job streams: %w", err)
	}
	return nil
}
