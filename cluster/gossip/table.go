package gossip

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/dsnode/dsnode/cluster/config"
)

const (
	gossipMembersMax = 1024
	// gossipClaimLife is how long a restarted node is believed under its new
	// address before memberlist takes it in: it repeats itself every few seconds.
	gossipClaimLife = 15 * time.Second
)

// table is what memberlist's callbacks say, put together. They come under
// memberlist's lock, so they only change the table and wake Run; what changed is
// found by comparing, and nothing can overflow or be lost.
type table struct {
	self    string
	metrics *metrics
	wake    chan struct{}
	stir    chan struct{} // somebody was lost, or this node's name is in dispute

	mu           sync.Mutex // guards what follows
	entries      map[string]*entry
	published    map[string]Member
	selfConflict time.Time // when another address was last heard for this node's own name
}

type entry struct {
	member     Member // as last taken in by memberlist, state and since included
	addr       netip.AddrPort
	leaving    bool // it announced that it would go
	udpBlocked bool

	// A node that comes back under its name with other ports is not taken in by
	// memberlist before its old self is dead for DeadNodeReclaimTime. It is
	// heard meanwhile, and its word is authenticated by the key.
	claim      Member
	claimAddr  netip.AddrPort
	claimSince time.Time
	claimAt    time.Time
}

func newTable(self string, metrics *metrics) *table {
	return &table{
		self: self, metrics: metrics,
		wake:    make(chan struct{}, 1),
		stir:    make(chan struct{}, 1),
		entries: map[string]*entry{}, published: map[string]Member{},
	}
}

// view is the member as it stands at a time: the claim while it lives, else
// what memberlist holds.
func (e *entry) view(now time.Time) Member {
	if e.claimed(now) {
		return e.claim
	}
	return e.member
}

func (e *entry) claimed(now time.Time) bool {
	return e.claim.StartedAt.After(e.member.StartedAt) && now.Sub(e.claimAt) < gossipClaimLife
}

func (e *entry) set(state MemberState, now time.Time) {
	if e.member.State != state {
		e.member.State, e.member.Since = state, now
	}
}

func (t *table) signal() { poke(t.wake) }

// poke wakes a loop that looks at everything when it wakes.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// NotifyAlive refuses, before memberlist takes it in, a member that this node
// could not tell anybody about.
func (t *table) NotifyAlive(n *memberlist.Node) error {
	if err := config.CheckIdentityPart("node", n.Name); err != nil {
		return err
	}
	if _, _, err := decodeMeta(n.Name, n.Meta); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[n.Name]
	if !ok && len(t.entries) >= gossipMembersMax {
		return fmt.Errorf("%d members are known, more are not taken in", len(t.entries))
	}
	if ok && e.member.State == MemberSuspect && e.addr == nodeAddr(n) {
		// A refutation, or somebody who still believes in it. If it is neither,
		// the next probe says so.
		e.set(MemberAlive, time.Now())
		t.signal()
	}
	return nil
}

// NotifyJoin hears of a member that is new, or back from the dead.
func (t *table) NotifyJoin(n *memberlist.Node) { t.take(n) }

// NotifyUpdate hears of a member that says something new of itself.
func (t *table) NotifyUpdate(n *memberlist.Node) { t.take(n) }

func (t *table) take(n *memberlist.Node) {
	m, leaving, err := decodeMeta(n.Name, n.Meta)
	if err != nil {
		return // NotifyAlive has refused it
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[n.Name]
	if !ok {
		e = &entry{}
		t.entries[n.Name] = e
	}
	m.State, m.Since = e.member.State, e.member.Since
	e.member, e.addr, e.leaving = m, nodeAddr(n), leaving
	e.set(MemberAlive, now)
	t.signal()
}

// NotifyLeave hears that a member is dead or gone; the event doesn't tell
// which, but who goes has said so before.
func (t *table) NotifyLeave(n *memberlist.Node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[n.Name]
	if !ok {
		return
	}
	state := MemberDead
	if e.leaving {
		state = MemberLeft
	}
	e.set(state, time.Now())
	e.udpBlocked = false
	t.signal()
	poke(t.stir)
}

// NotifyConflict hears a name under another address than memberlist holds.
func (t *table) NotifyConflict(_, other *memberlist.Node) {
	t.metrics.conflicts.Inc()
	now := time.Now()
	m, leaving, err := decodeMeta(other.Name, other.Meta)
	t.mu.Lock()
	defer t.mu.Unlock()
	if other.Name == t.self {
		t.selfConflict = now
		poke(t.stir)
		return
	}
	e, ok := t.entries[other.Name]
	if err != nil || !ok || leaving || !m.StartedAt.After(e.member.StartedAt) {
		return // the old self, still told by somebody
	}
	if !e.claimed(now) {
		e.claimSince = now
	}
	m.State, m.Since = MemberAlive, e.claimSince
	e.claim, e.claimAddr, e.claimAt = m, nodeAddr(other), now
	t.signal()
}

// AckPayload adds nothing to answers to probes.
func (t *table) AckPayload() []byte { return nil }

// NotifyPingComplete hears of a probe that was answered over UDP.
func (t *table) NotifyPingComplete(n *memberlist.Node, _ time.Duration, _ []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[n.Name]
	if !ok {
		return
	}
	e.udpBlocked = false
	if e.member.State == MemberSuspect {
		e.set(MemberAlive, time.Now())
		t.signal()
	}
}

// suspect marks a member whose probe by this node went unanswered.
func (t *table) suspect(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.entries[name]; ok && e.member.State == MemberAlive {
		e.set(MemberSuspect, time.Now())
		t.signal()
	}
}

// udpIsBlocked marks a member that answers probes over TCP only.
func (t *table) udpIsBlocked(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.entries[name]; ok {
		e.udpBlocked = true
		t.signal()
	}
}

// changes is what differs from the last call, ordered by name. It also forgets
// who has been dead for as long as memberlist remembers the dead.
func (t *table) changes(now time.Time) []Member {
	t.mu.Lock()
	defer t.mu.Unlock()
	var changed []Member
	counts := map[MemberState]int{}
	blocked := 0
	for name, e := range t.entries {
		m := e.view(now)
		if m.gone() && now.Sub(m.Since) > deadMemory {
			delete(t.entries, name)
			delete(t.published, name)
			continue
		}
		counts[m.State]++
		if e.udpBlocked {
			blocked++
		}
		if old, ok := t.published[name]; !ok || !old.equal(m) {
			t.published[name] = m
			changed = append(changed, m)
		}
	}
	for _, state := range []MemberState{MemberAlive, MemberSuspect, MemberDead, MemberLeft} {
		t.metrics.members.WithLabelValues(string(state)).Set(float64(counts[state]))
	}
	t.metrics.udpBlocked.Set(float64(blocked))
	slices.SortFunc(changed, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return changed
}

func (t *table) snapshot(now time.Time) []Member {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]Member, 0, len(t.entries))
	for _, e := range t.entries {
		all = append(all, e.view(now))
	}
	slices.SortFunc(all, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// sitesAt are the sites of the members at an address, or, with anyPort, at its IP.
func (t *table) sitesAt(a netip.AddrPort, anyPort bool) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var sites []string
	is := func(b netip.AddrPort) bool { return b == a || anyPort && b.Addr() == a.Addr() }
	for _, e := range t.entries {
		if is(e.addr) {
			sites = append(sites, e.member.Site)
		}
		if e.claimAddr.IsValid() && is(e.claimAddr) {
			sites = append(sites, e.claim.Site)
		}
	}
	return sites
}

// meeting is what there is to know before meeting others.
type meeting struct {
	lost     []netip.AddrPort // members that memberlist has given up
	live     map[netip.AddrPort]bool
	newly    bool // some of them only a short while ago
	alone    bool
	conflict bool // this node's own name is known elsewhere under another address
}

func (t *table) meeting(now time.Time, recent time.Duration) meeting {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := meeting{
		live: map[netip.AddrPort]bool{}, alone: true,
		conflict: !t.selfConflict.IsZero() && now.Sub(t.selfConflict) < gossipClaimLife,
	}
	for name, e := range t.entries {
		switch {
		case name == t.self:
		case !e.member.gone():
			v.alone = false
			v.live[e.addr] = true
		case e.member.State == MemberDead:
			v.lost = append(v.lost, e.addr)
			v.newly = v.newly || now.Sub(e.member.Since) < recent
		}
		if e.claimed(now) && !e.member.gone() {
			v.live[e.claimAddr] = true
		}
	}
	return v
}

func nodeAddr(n *memberlist.Node) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(n.Addr) // an invalid one is equal to no other
	return netip.AddrPortFrom(ip.Unmap(), n.Port)
}

func (m Member) gone() bool { return m.State == MemberDead || m.State == MemberLeft }

func (m Member) equal(o Member) bool {
	if !m.StartedAt.Equal(o.StartedAt) || !m.Since.Equal(o.Since) {
		return false
	}
	m.StartedAt, m.Since = o.StartedAt, o.Since
	return m == o
}
