package gossip

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/storage/notify"
)

const (
	maxMembers = 1024
	// claimLifetime is how long an entry's claim is valid after it was last heard. A
	// restarted node repeats it every few seconds until memberlist accepts it.
	claimLifetime = 15 * time.Second
)

// table holds the members as memberlist's callbacks report them. The callbacks run
// under memberlist's lock, so they only change the table and wake Run. Run finds
// the changes by comparing with what it has published, so there is no queue that
// could overflow.
type table struct {
	self     string
	removed  func(name string) bool // Options.Removed; may be nil
	metrics  *metrics
	wakeRun  chan struct{}
	wakeJoin chan struct{} // a member was lost, or this node's name is in conflict

	mu           sync.Mutex // guards what follows
	entries      map[string]*entry
	published    map[string]Member // as last returned by changes
	selfConflict time.Time         // when this node's name was last heard with another address
}

type entry struct {
	member     Member // as memberlist last accepted it, with State and Since
	addr       netip.AddrPort
	leaving    bool // it announced that it leaves
	udpBlocked bool
	udpAt      time.Time // when it last answered a UDP packet of this node

	// A node that restarts with other ports is not accepted by memberlist until its
	// old address has been dead for DeadNodeReclaimTime. Until then the claim is what
	// the restarted node announces, authenticated by the gossip key.
	claim      Member
	claimAddr  netip.AddrPort
	claimSince time.Time
	claimAt    time.Time
}

func newTable(self string, removed func(string) bool, metrics *metrics) *table {
	return &table{
		self: self, removed: removed, metrics: metrics,
		wakeRun:  make(chan struct{}, 1),
		wakeJoin: make(chan struct{}, 1),
		entries:  map[string]*entry{}, published: map[string]Member{},
	}
}

// current is the claim while that is valid, else the member as memberlist holds it.
func (e *entry) current(now time.Time) Member {
	if e.claimed(now) {
		return e.claim
	}
	return e.member
}

func (e *entry) claimed(now time.Time) bool {
	return e.claim.StartedAt.After(e.member.StartedAt) && now.Sub(e.claimAt) < claimLifetime
}

func (e *entry) set(state MemberState, now time.Time) {
	if e.member.State != state {
		e.member.State, e.member.Since = state, now
	}
}

var errRemoved = errors.New("it was removed from the cluster")

// NotifyAlive refuses a member with an invalid name, address or metadata, or one that was
// removed, before memberlist accepts it.
func (t *table) NotifyAlive(n *memberlist.Node) error {
	if err := config.CheckIdentityPart("node", n.Name); err != nil {
		return err
	}
	if _, _, err := decodeMeta(n.Name, n.Meta); err != nil {
		return err
	}
	if !nodeAddr(n).IsValid() {
		return errors.New("its address is invalid")
	}
	// memberlist needs this node in its list, so that one is never refused.
	if n.Name != t.self && t.removed != nil && t.removed(n.Name) {
		return errRemoved
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[n.Name]
	if !ok && len(t.entries) >= maxMembers {
		return fmt.Errorf("%d members are known, no more are accepted", len(t.entries))
	}
	if ok && e.member.State == MemberSuspect && e.addr == nodeAddr(n) {
		// The member refutes the suspicion, or another one still reports it as alive.
		// If it is dead all the same, the next probe fails again.
		e.set(MemberAlive, time.Now())
		notify.Wake(t.wakeRun)
	}
	return nil
}

// NotifyJoin is called for a member that is new, or alive again.
func (t *table) NotifyJoin(n *memberlist.Node) { t.update(n) }

// NotifyUpdate is called when a member has published new metadata.
func (t *table) NotifyUpdate(n *memberlist.Node) { t.update(n) }

func (t *table) update(n *memberlist.Node) {
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
	notify.Wake(t.wakeRun)
}

// NotifyLeave is called when a member is dead or has left. memberlist does not tell
// which of the two, but a member that leaves has announced it in its metadata.
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
	notify.Wake(t.wakeRun)
	notify.Wake(t.wakeJoin)
}

// NotifyConflict is called when a name is heard with another address than the one
// that memberlist holds.
func (t *table) NotifyConflict(_, other *memberlist.Node) {
	t.metrics.conflicts.Inc()
	now := time.Now()
	m, leaving, err := decodeMeta(other.Name, other.Meta)
	t.mu.Lock()
	defer t.mu.Unlock()
	if other.Name == t.self {
		t.selfConflict = now
		notify.Wake(t.wakeJoin)
		return
	}
	e, ok := t.entries[other.Name]
	if err != nil || !ok || leaving || !m.StartedAt.After(e.member.StartedAt) {
		return // the node before its restart, still reported by another member
	}
	if !e.claimed(now) {
		e.claimSince = now
	}
	m.State, m.Since = MemberAlive, e.claimSince
	e.claim, e.claimAddr, e.claimAt = m, nodeAddr(other), now
	notify.Wake(t.wakeRun)
}

// AckPayload adds nothing to the answers to probes.
func (t *table) AckPayload() []byte { return nil }

// NotifyPingComplete is called when a probe was answered over UDP.
func (t *table) NotifyPingComplete(n *memberlist.Node, _ time.Duration, _ []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[n.Name]
	if !ok {
		return
	}
	e.answeredUDP(time.Now())
	if e.member.State == MemberSuspect {
		e.set(MemberAlive, time.Now())
		notify.Wake(t.wakeRun)
	}
}

// suspect marks a member that did not answer this node's probe.
func (t *table) suspect(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.entries[name]; ok && e.member.State == MemberAlive {
		e.set(MemberSuspect, time.Now())
		notify.Wake(t.wakeRun)
	}
}

// setUDPBlocked marks a member that answers probes over TCP only.
func (t *table) setUDPBlocked(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.entries[name]; ok {
		e.udpBlocked = true
		notify.Wake(t.wakeRun)
	}
}

// changes returns the members that differ from the last call, ordered by name. It
// also removes members that have been dead or have left for longer than deadMemory:
// memberlist no longer remembers them either.
func (t *table) changes(now time.Time) []Member {
	t.mu.Lock()
	defer t.mu.Unlock()
	var changed []Member
	counts := map[MemberState]int{}
	blocked := 0
	for name, e := range t.entries {
		m := e.current(now)
		if m.down() && now.Sub(m.Since) > deadMemory {
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
		all = append(all, e.current(now))
	}
	slices.SortFunc(all, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// sitesAt returns the sites of the members with that address, or, with anyPort, with
// that IP address.
func (t *table) sitesAt(a netip.AddrPort, anyPort bool) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var sites []string
	matches := func(b netip.AddrPort) bool { return b == a || anyPort && b.Addr() == a.Addr() }
	for _, e := range t.entries {
		if matches(e.addr) {
			sites = append(sites, e.member.Site)
		}
		if e.claimAddr.IsValid() && matches(e.claimAddr) {
			sites = append(sites, e.claim.Site)
		}
	}
	return sites
}

// isMember reports whether an IP address is that of another member.
func (t *table) isMember(a netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name, e := range t.entries {
		if name != t.self && (e.addr.Addr() == a || e.claimAddr.IsValid() && e.claimAddr.Addr() == a) {
			return true
		}
	}
	return false
}

// joinState is what joinLoop decides on.
type joinState struct {
	lost         []netip.AddrPort // of the dead members
	alive        map[netip.AddrPort]bool
	recentlyLost bool // a member died a short time ago
	alone        bool // no other member is alive
	conflict     bool // other members know this node's name with another address
}

func (t *table) joinState(now time.Time, recent time.Duration) joinState {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := joinState{
		alive: map[netip.AddrPort]bool{}, alone: true,
		conflict: !t.selfConflict.IsZero() && now.Sub(t.selfConflict) < claimLifetime,
	}
	for name, e := range t.entries {
		switch {
		case name == t.self:
		case !e.member.down():
			s.alone = false
			s.alive[e.addr] = true
		case e.member.State == MemberDead:
			s.lost = append(s.lost, e.addr)
			s.recentlyLost = s.recentlyLost || now.Sub(e.member.Since) < recent
		}
		if e.claimed(now) && !e.member.down() {
			s.alive[e.claimAddr] = true
		}
	}
	return s
}

func nodeAddr(n *memberlist.Node) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(n.Addr) // an invalid address equals no member's
	return netip.AddrPortFrom(ip.Unmap(), n.Port)
}

func (m Member) down() bool { return m.State == MemberDead || m.State == MemberLeft }

func (m Member) equal(o Member) bool {
	if !m.StartedAt.Equal(o.StartedAt) || !m.Since.Equal(o.Since) {
		return false
	}
	m.StartedAt, m.Since = o.StartedAt, o.Since
	return m == o
}
