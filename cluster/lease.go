package cluster

import (
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
)

// lease is this node's knowledge that a quorum was alive a moment ago. It is
// not granted to anybody in particular: whoever knows of a recently committed
// tick knows that no other leader can have promoted anybody yet, because a new
// leader waits 1.1 L after its own first commit.
//
// It carries the highest epoch known along its way. So a node of the old primary
// that still gets a lease, through whatever chain of peers, from a tick after a
// promotion learns of the promotion with it; and leases from ticks before the
// promotion have ended 1.1 L after it, which is how long the new primary waits
// before it acts. That is the whole proof that two sites never act at once.
//
// The ownership of job streams is fenced in the same way, by the index of its
// newest change (State.Ownership): who holds a lease from after a change knows
// that there was one, and an adopter waits 1.1 L before it starts anything.
//
// All times are Boottime. Every step errs to the short side: a tick counts from
// before it was proposed, an answer from before it was asked for.
type lease struct {
	mu     sync.Mutex // guards what follows
	length time.Duration
	until  time.Duration
	since  time.Duration // start of the unbroken run up to now
	held   bool          // ever held since the process started
	heard  fences        // the highest heard of
	news   chan struct{} // closes when a lease begins or higher fences are heard of; nil: nobody waits
}

// fences are the counters that travel with a lease; they only rise.
type fences struct {
	epoch     uint64 // Primary.Epoch
	ownership uint64 // State.Ownership
}

func (f fences) merge(o fences) fences {
	return fences{max(f.epoch, o.epoch), max(f.ownership, o.ownership)}
}

func fencesOf(s *agreed.State) fences { return fences{epoch: s.Primary.Epoch, ownership: s.Ownership} }

// setLength sets L, before the first use.
func (l *lease) setLength(length time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.length = length
}

// committed extends the lease on the leader: a tick proposed at `proposed` is
// committed, while the agreed counters were at least known.
func (l *lease) committed(proposed time.Duration, known fences) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.extend(proposed+l.length, known)
}

// relayed extends the lease by a peer's answer to a ping sent at `sent`, saying
// that the peer's own lease is good for `left` more.
func (l *lease) relayed(sent, left time.Duration, known fences) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A peer that claims more than a whole lease is wrong or hostile.
	if left > l.length {
		left = 0
	}
	l.extend(sent+left, known)
}

func (l *lease) extend(until time.Duration, known fences) {
	now := clock.Boottime()
	if heard := l.heard.merge(known); heard != l.heard {
		l.heard = heard
		l.tell()
	}
	if until <= l.until || until <= now {
		return
	}
	if l.until < now {
		l.since = now
		l.tell()
	}
	l.until = until
	l.held = true
}

// tell assumes the lock.
func (l *lease) tell() {
	if l.news != nil {
		close(l.news)
		l.news = nil
	}
}

// changed gives a channel that closes when a lease begins, or when higher
// fences are heard of. That a lease goes on is no news, and that it ends is known
// from left beforehand.
func (l *lease) changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.news == nil {
		l.news = make(chan struct{})
	}
	return l.news
}

// left is how long the lease is still good (zero or less: none), and the
// highest counters heard of.
func (l *lease) left() (time.Duration, fences) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.until - clock.Boottime(), l.heard
}

// everHeld reports whether there was a lease since the process started; a node
// for which there was none is cold.
func (l *lease) everHeld() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

// quorum tells since when (Boottime) there is a lease, or there is none.
func (l *lease) quorum() (ok bool, since time.Duration) {
	now := clock.Boottime()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.until > now {
		return true, l.since
	}
	return false, l.until
}
