package failover

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

var (
	// ErrNotPrimary is why a start as primary is refused, and the cause with which
	// a context of WhilePrimary ends.
	ErrNotPrimary = errors.New("this site is not the primary, or this node may not act for it")
	// ErrNotOwner is why the start of a job is refused.
	ErrNotOwner = errors.New("this node may not execute the jobs of that stream")
)

// StartWithin is the longest time between a check and the start that it permits.
const StartWithin = 50 * time.Millisecond

// Standing is what a Fence needs of the cluster; *cluster.Cluster is one.
type Standing interface {
	State() *agreed.State
	Changed() <-chan struct{}
	// Lease and OwnershipLease tell how long this node's lease is good, and the
	// highest epoch or the newest change of State.Ownership that was heard of with
	// it.
	Lease() (left time.Duration, epoch uint64)
	OwnershipLease() (left time.Duration, ownership uint64)
	// LeaseChanged closes when a lease begins, or a higher epoch is heard of.
	LeaseChanged() <-chan struct{}
}

// Claim is something that only one may do at a time: act as the primary, or
// execute the jobs of a stream.
type Claim string

// Primary is the claim of the nodes of the primary site. Stream keys contain a
// slash, so it is none of them.
const Primary Claim = "primary"

// Stream is the claim of the node that owns a job stream, by its agreed.StreamKey.
func Stream(key string) Claim { return Claim(key) }

// Permit permits one start.
type Permit struct {
	// Token fences what the start leads to: the token of a stream's owner, or the
	// generation and the epoch of the primary.
	Token    agreed.FenceToken
	deadline time.Duration
	boottime func() time.Duration
}

// InTime reports whether the start that it permits may still happen. A start that
// is found to have happened later counts as a breach, and its result is not
// current.
func (p Permit) InTime() bool { return p.boottime != nil && p.boottime() < p.deadline }

// Fence proves that this node has a claim. Every claim is proved in the same way.
// A node has it while all of this holds:
//
//   - the agreed state, as far as this node has applied it, gives it the claim;
//   - the node holds a lease;
//   - with that lease it has heard of no newer epoch, or change of ownership, than
//     those that it has applied;
//   - every lease from before the entry that gave it the claim has ended: 1.1 L have
//     passed since this node saw that entry.
//
// A node that has lost a claim and has not applied the entry stops in time: a lease
// from after that entry carries its number, and leases from before it end within L.
// All times are on CLOCK_BOOTTIME, so a machine that was suspended finds its lease
// ended.
type Fence struct {
	node, site string
	standing   Standing
	boottime   func() time.Duration
	wait       func() time.Duration
	log        *slog.Logger

	// mu guards what follows. The agreed state and the lease are read under it, so
	// that nothing begins on a look from before a Release.
	mu sync.Mutex
	// epoch is the newest that was seen. This node does not act as primary before
	// primaryFrom.
	epoch       uint64
	primaryFrom time.Duration
	// startedFrom is until when the first epoch that was seen makes this process wait.
	startedFrom time.Duration
	// streams holds each stream that this node owns.
	streams map[Claim]ownedStream
	// lastPermit is the deadline of the newest Permit of Primary.
	lastPermit time.Duration
	// running are the contexts of WhilePrimary. stopping are those that have ended
	// and whose work has not come back yet.
	running, stopping map[*primaryContext]struct{}
	acting            bool
	change            chan struct{} // closes at the next change of running, stopping or acting
}

type ownedStream struct {
	token agreed.FenceToken
	from  time.Duration // no start before it
}

// NewFence makes the Fence of a node; Run keeps it up to date. newLeaderWait is
// 1.1 L of config.Timing, which is known once the node is a member. boottime is
// the clock that leases are counted on.
func NewFence(node, site string, s Standing, newLeaderWait, boottime func() time.Duration, log *slog.Logger) *Fence {
	return &Fence{
		node: node, site: site, standing: s, boottime: boottime, wait: newLeaderWait, log: log,
		streams: map[Claim]ownedStream{}, running: map[*primaryContext]struct{}{}, stopping: map[*primaryContext]struct{}{},
		change: make(chan struct{}),
	}
}

// Check permits one start under a claim, within StartWithin and while the lease
// lasts. The error wraps ErrNotPrimary or ErrNotOwner.
func (f *Fence) Check(c Claim) (Permit, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.boottime()
	token, left, err := f.prove(c, now)
	if err != nil {
		return Permit{}, err
	}
	p := Permit{Token: token, deadline: now + min(StartWithin, left), boottime: f.boottime}
	if c == Primary {
		f.lastPermit = max(f.lastPermit, p.deadline)
	}
	return p, nil
}

// Acting reports whether this node may act as primary.
func (f *Fence) Acting() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, _, err := f.prove(Primary, f.boottime())
	return err == nil
}

// StartWait is for how long this process may not act as primary because it has just
// started; unknown while it knows no primary.
func (f *Fence) StartWait() (left time.Duration, known bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return max(0, f.startedFrom-f.boottime()), f.epoch != 0
}

// ActingEpoch is the epoch in which this node may act as primary, 0 if it may not.
func (f *Fence) ActingEpoch() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	token, _, err := f.prove(Primary, f.boottime())
	if err != nil {
		return 0
	}
	return token.Index
}

// prove is the one proof of all claims; it assumes the lock. now is from before the
// call, so what is read here is at least as new. left is the rest of the lease.
func (f *Fence) prove(c Claim, now time.Duration) (token agreed.FenceToken, left time.Duration, err error) {
	s := f.standing.State()
	// This clock is read after the state: a wait must not begin before the entry
	// that it waits for was seen.
	f.note(s, f.boottime())
	var seen, heard uint64
	var from time.Duration
	if c == Primary {
		token, err = f.primary(s)
		seen, from = s.Primary.Epoch, f.primaryFrom
		left, heard = f.standing.Lease()
	} else {
		token, err = f.stream(s, c)
		seen, from = s.Ownership, f.streams[c].from
		left, heard = f.standing.OwnershipLease()
	}
	switch {
	case err != nil:
	case left <= 0:
		err = errors.New("no lease")
	case heard > seen:
		err = fmt.Errorf("the lease tells of change %d, this node has applied %d", heard, seen)
	case now < from:
		err = errors.New("leases from before the change may still run")
	default:
		return token, left, nil
	}
	if c == Primary {
		return agreed.FenceToken{}, 0, fmt.Errorf("%w: %w", ErrNotPrimary, err)
	}
	return agreed.FenceToken{}, 0, fmt.Errorf("%w: %s: %w", ErrNotOwner, c, err)
}

// primary tells whether the agreed state lets this node's site act as primary. An
// announced switchover forbids it to the site that it leaves. Its deadline is not
// looked at: clocks differ, and a promotion by the coordinator's clock may still
// come. The raft leader clears what is overdue.
func (f *Fence) primary(s *agreed.State) (agreed.FenceToken, error) {
	switch {
	case s.ClusterID == "" || s.Primary.Site != f.site:
		return agreed.FenceToken{}, fmt.Errorf("the primary is %q in epoch %d", s.Primary.Site, s.Primary.Epoch)
	case s.Switchover != nil && s.Switchover.From == f.site:
		return agreed.FenceToken{}, fmt.Errorf("a switchover to %s is under way", s.Switchover.To)
	}
	return agreed.FenceToken{Generation: s.Generation.Number, Index: s.Primary.Epoch}, nil
}

// stream tells whether the agreed state names this node the owner of a stream.
func (f *Fence) stream(s *agreed.State, c Claim) (agreed.FenceToken, error) {
	j, known := s.Streams[string(c)]
	switch {
	case !known:
		return agreed.FenceToken{}, errors.New("the stream is not agreed on")
	case j.Owner != f.node:
		return agreed.FenceToken{}, fmt.Errorf("%s owns it", j.Owner)
	}
	return j.Token, nil
}

// note starts the wait of each claim when this process sees the entry that gave it to
// this node for the first time: leases from before that entry run for up to L.
func (f *Fence) note(s *agreed.State, now time.Duration) {
	f.notePrimary(s.Primary, now)
	for c := range f.streams {
		if s.Streams[string(c)].Owner != f.node {
			delete(f.streams, c)
		}
	}
	for key, j := range s.Streams {
		c := Stream(key)
		if j.Owner != f.node || f.streams[c].token == j.Token {
			continue
		}
		owned := ownedStream{token: j.Token}
		if j.Before != "" && j.Before != f.node {
			owned.from = now + f.wait()
		}
		f.streams[c] = owned
	}
}

// notePrimary starts no wait when all nodes of the previous primary have confirmed
// their release; a wait of an earlier epoch goes on. For epochs that this node did
// not see one by one it doesn't know of a release, so it waits.
//
// A process that has just started waits twice as long: it has forgotten which
// releases it confirmed, and its copy of the state may be from before a switchover
// whose promotion follows within L.
func (f *Fence) notePrimary(p agreed.Primary, now time.Duration) {
	switch {
	case p.Epoch <= f.epoch:
		return
	case f.epoch == 0:
		f.primaryFrom = now + 2*f.wait()
		f.startedFrom = f.primaryFrom
	case !p.Released || p.Epoch != f.epoch+1:
		f.primaryFrom = now + f.wait()
	}
	f.epoch = p.Epoch
}
