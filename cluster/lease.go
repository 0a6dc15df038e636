package cluster

import (
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/storage/notify"
)

// lease is the time for which this node knows that no new leader can have promoted a
// site: a new leader waits 1.1 L after its first commit, and a recently committed tick
// shows that a quorum still followed the old leader. No node is the grantee of a lease:
// every node that learns of the tick, from any peer, holds one.
//
// A lease carries the highest epoch known to all nodes that passed it on. So a node of
// the old primary that gets a lease from a tick after a promotion learns of the promotion
// with it, through any chain of peers. Leases from ticks before the promotion end within
// L of it, and the new primary waits 1.1 L before it acts. So two sites never act as primary
// at the same time.
//
// The ownership of job streams is fenced in the same way, by the index of its newest
// change (State.Ownership): a node with a lease from a tick after a change knows of the
// change, and a new owner waits 1.1 L before it starts a job.
//
// All times are Boottime. Every step makes the lease rather too short: a tick counts from
// before it was proposed, a ping's answer from before the ping was sent.
type lease struct {
	host *host.Host

	mu     sync.Mutex // guards the fields below
	length time.Duration
	until  time.Duration
	since  time.Duration // start of the uninterrupted lease
	held   bool          // whether there was a lease since the process started
	ended  bool          // there will be no lease any more
	heard  fences        // the highest learned of
	// changed is sent when a lease begins or higher fences are learned of. It is not sent
	// when a lease is extended, nor when it ends: left returns that time beforehand.
	changed notify.Broadcast
}

// fences are the counters that a lease carries; they only rise.
type fences struct {
	epoch     uint64 // Primary.Epoch
	ownership uint64 // State.Ownership
}

func (f fences) merge(o fences) fences {
	return fences{max(f.epoch, o.epoch), max(f.ownership, o.ownership)}
}

func fencesOf(s *agreed.State) fences { return fences{epoch: s.Primary.Epoch, ownership: s.Ownership} }

// setLength sets L. It is called before the first use.
func (l *lease) setLength(length time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.length = length
}

// committed extends the leader's lease after the commit of a tick that was proposed at
// the time proposed. known are the counters of the agreed state after the commit.
func (l *lease) committed(proposed time.Duration, known fences) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.extend(proposed+l.length, known)
}

// relayed extends the lease after a peer's answer to a ping that was sent at the time
// sent. left is what remained of the peer's own lease, known are the counters in its
// answer.
func (l *lease) relayed(sent, left time.Duration, known fences) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A peer that claims more than the length of a lease is faulty or malicious.
	if left > l.length {
		left = 0
	}
	l.extend(sent+left, known)
}

func (l *lease) extend(until time.Duration, known fences) {
	now := l.host.Boottime()
	if heard := l.heard.merge(known); heard != l.heard {
		l.heard = heard
		l.changed.Send()
	}
	if l.ended || until <= l.until || until <= now {
		return
	}
	if l.until < now {
		l.since = now
		l.changed.Send()
	}
	l.until = until
	l.held = true
}

// end ends the lease for good: this node was removed.
func (l *lease) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := l.host.Boottime(); l.until > now {
		l.until = now
	}
	l.ended = true
	l.changed.Send()
}

// left is how long the lease lasts (zero or less: there is none), and the highest
// counters learned of.
func (l *lease) left() (time.Duration, fences) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.until - l.host.Boottime(), l.heard
}

// everHeld reports whether there was a lease since the process started. A node without
// one is cold.
func (l *lease) everHeld() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

// quorum reports whether there is a lease, and since when (Boottime) there is one or
// none.
func (l *lease) quorum() (ok bool, since time.Duration) {
	now := l.host.Boottime()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.until > now {
		return true, l.since
	}
	return false, l.until
}
