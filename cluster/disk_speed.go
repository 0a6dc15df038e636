package cluster

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// A disk that hangs is the watchdog's subject. A disk that works, but slowly, is this
// file's: raft's leader commits no entry before its own disk has it, so a leader with a
// slow disk lets every lease run out, while a follower with one delays nobody. Every node
// measures its own writes, whether it leads or not, and reports them to its peers.

// DiskSpeed is how fast a node's disk writes raft's entries.
type DiskSpeed struct {
	Known bool
	Write time.Duration // mean of the newest writes
	// SlowFor is for how long the disk has been too slow for a leader; 0: it is not.
	SlowFor time.Duration
}

// SlowWrite is how long a write may take on a leader's disk: a fifth of a lease (240 ms).
// An entry waits for the write before its own, and its lease must last until the write
// after it has ended and a ping has carried the news: 3 writes, a tick and 1.5 round trips
// are then 1.06 s at a round trip of 60 ms, which is less than a lease.
func SlowWrite(t config.Timing) time.Duration { return t.Lease / 5 }

// slowAfter is for how long writes must have been slow before the disk is: as long as a
// dead leader's site is given. A disk that hangs for two seconds once is not slow.
func slowAfter(t config.Timing) time.Duration { return t.Patience }

// slowWithin is the time in which slow writes must take slowAfter (2.5 s of 4 s), so that a
// disk on which slow and fast writes alternate is found too.
func slowWithin(t config.Timing) time.Duration { return t.Patience * 8 / 5 }

// fastWithin is the time (20 s) of which slow writes may take a tenth when a slow disk
// counts as fast again. It is much longer than slowWithin, so that leadership doesn't
// follow each change of a disk that is fast for moments only.
func fastWithin(t config.Timing) time.Duration { return t.Patience * 8 }

// span is a write, or the part of one that lasted so far.
type span struct{ from, to time.Duration }

// judgeDisk says whether a disk is slow now, from the times of its slow writes and whether
// it was slow at the judgement before. It is pure.
func judgeDisk(was bool, slow []span, now time.Duration, t config.Timing) bool {
	if was {
		return within(slow, now-fastWithin(t)) > fastWithin(t)/10
	}
	return within(slow, now-slowWithin(t)) >= slowAfter(t)
}

// within sums the parts of spans after a time. The spans don't overlap.
func within(spans []span, from time.Duration) time.Duration {
	sum := time.Duration(0)
	for _, s := range spans {
		sum += max(0, s.to-max(s.from, from))
	}
	return sum
}

// diskMeter measures this node's writes.
type diskMeter struct {
	boottime func() time.Duration
	timing   func() config.Timing

	mu      sync.Mutex // guards the fields below
	writing int        // writes in progress
	began   time.Duration
	ended   time.Duration   // of the newest write
	slow    []span          // slow writes of the last fastWithin, without one in progress
	recent  []time.Duration // of the newest writes
	judged  time.Duration
	since   time.Duration // since when the disk is slow; 0: it is not
}

// recentWrites is of how many writes DiskSpeed.Write is the mean: two seconds of ticks.
const recentWrites = 8

// stale is after how long without a write the speed is unknown. The watchdog writes each
// second.
const stale = 5 * time.Second

func newDiskMeter(timing func() config.Timing, boottime func() time.Duration) *diskMeter {
	return &diskMeter{timing: timing, boottime: boottime}
}

// measure runs a write. Writes at the same time are measured as one, because they wait
// for the same disk.
func (m *diskMeter) measure(write func() error) error {
	m.mu.Lock()
	if m.writing++; m.writing == 1 {
		m.began = m.boottime()
	}
	m.mu.Unlock()
	err := write()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.writing--; m.writing == 0 {
		m.ended = m.boottime()
		m.recent = append(m.recent, m.ended-m.began)
		m.recent = m.recent[max(0, len(m.recent)-recentWrites):]
		if s := (span{m.began, m.ended}); m.isSlow(s) {
			m.slow = append(m.slow, s)
		}
	}
	return err
}

func (m *diskMeter) isSlow(s span) bool { return s.to-s.from > SlowWrite(m.timing()) }

// judge is called each tick. changed reports whether the disk became slow, or fast again.
func (m *diskMeter) judge() (slow, changed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now, t := m.boottime(), m.timing()
	if m.judged != 0 && now-m.judged > slowAfter(t) {
		// This process did not run, so that its writes seem to have lasted for that time.
		m.slow, m.recent, m.began = nil, nil, now
	}
	m.judged = now
	m.slow = slices.DeleteFunc(m.slow, func(s span) bool { return s.to < now-fastWithin(t) })
	spans := m.slow
	if s := (span{m.began, now}); m.writing > 0 && m.isSlow(s) {
		spans = append(slices.Clip(spans), s)
	}
	was := m.since != 0
	slow = judgeDisk(was, spans, now, t)
	switch {
	case slow && !was:
		m.since = now
		for _, s := range spans {
			if s.to > now-slowWithin(t) {
				m.since = s.from
				break
			}
		}
	case !slow:
		m.since = 0
	}
	return slow, slow != was
}

// speed is the newest judgement.
func (m *diskMeter) speed() DiskSpeed {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.boottime()
	var s DiskSpeed
	if m.since != 0 {
		s.SlowFor = max(1, now-m.since)
	}
	n := len(m.recent)
	if n > 0 && now-m.ended < stale {
		s.Known = true
		for _, took := range m.recent {
			s.Write += took / time.Duration(n)
		}
	}
	if m.writing > 0 {
		if took := now - m.began; took > s.Write && (s.Known || m.isSlow(span{m.began, now})) {
			s.Known, s.Write = true, took // it takes at least that long
		}
	}
	return s
}

// DiskSpeed is that of this node's own disk.
func (c *Cluster) DiskSpeed() DiskSpeed { return c.disk.speed() }

// clearlyFaster reports whether a leader whose disk is slow should hand over to a voter.
// If both disks are slow, as when all sites write a lot, it should only if that voter's
// writes take a quarter of the time. A voter of an earlier version reports nothing; it
// keeps what that version does, so it may lead.
func clearlyFaster(voter, leader DiskSpeed) bool {
	return voter.SlowFor == 0 || (voter.Known && leader.Known && voter.Write < leader.Write/4)
}

// fasterVoter is the voter that should lead instead of this node while this node's disk is
// slow; empty: there is none. The clearly faster voters must be a quorum. Otherwise another
// leader's entries would wait for this disk too, or for one that is as slow. The others
// vote only for a node whose log is as long as theirs.
func (c *Cluster) fasterVoter() string {
	own := c.disk.speed()
	heard, voters := c.heardVoters(c.Timing().Lease)
	faster := slices.DeleteFunc(heard, func(p PeerView) bool { return !clearlyFaster(p.Disk, own) })
	if len(faster) < voters/2+1 {
		return ""
	}
	return slices.MinFunc(faster, func(a, b PeerView) int {
		return cmp.Or(cmp.Compare(b.LastLogIndex, a.LastLogIndex), c.bySuccession(a, b))
	}).Name
}

// standBackFor is for how long without a leader a node with a slow disk leaves the
// elections to others: two of them fit in. Afterwards it stands itself, because its log
// may be the only one that is complete.
func standBackFor(t config.Timing) time.Duration { return 2 * t.Patience }

// standsBack reports whether this node should not become raft's leader now.
func (c *Cluster) standsBack() bool {
	r := c.raft.Load()
	return r != nil && c.disk.speed().SlowFor != 0 && time.Since(r.LastContact()) < standBackFor(c.Timing()) && c.fasterVoter() != ""
}

// judgeDisk judges this node's disk each tick, until ctx ends.
func (c *Cluster) judgeDisk(ctx context.Context) error {
	return c.eachTick(ctx, func() {
		slow, changed := c.disk.judge()
		switch {
		case slow && changed:
			s := c.disk.speed()
			c.log.Error("disk slow: too slow for raft's leader", "write", s.Write.Round(time.Millisecond), "limit", SlowWrite(c.Timing()))
		case changed:
			c.log.Warn("disk fast enough for raft's leader again", "write", c.disk.speed().Write.Round(time.Millisecond))
		}
	})
}

// eachTick calls f each tick until ctx ends.
func (c *Cluster) eachTick(ctx context.Context, f func()) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		f()
		timer.Reset(clock.UntilTick(c.opts.Host.Boottime(), c.Timing().Tick))
	}
}

// leaveSlowDisk hands the leadership over while this node leads on a slow disk and another
// voter is clearly faster, until ctx ends.
func (c *Cluster) leaveSlowDisk(ctx context.Context) error {
	return c.eachTick(ctx, func() {
		r := c.raft.Load()
		term := r.CurrentTerm()
		if r.State() != raft.Leader || c.disk.speed().SlowFor == 0 || c.peers.followOther(c.opts.Name, term) {
			return // or raft here has not learned of the other leader yet
		}
		to := c.fasterVoter()
		if to == "" || !c.transferring.CompareAndSwap(false, true) {
			return
		}
		defer c.transferring.Store(false)
		c.log.Warn("handing over raft's leadership: the disk is slow", "to", to, "write", c.disk.speed().Write.Round(time.Millisecond))
		err := c.cede(ctx, to, term)
		if err == nil || ctx.Err() != nil {
			return
		}
		c.log.Warn("raft's leadership was not handed over: raft's transport is blocked so that another node becomes leader", "to", to, "err", err)
		c.deposeSelf(ctx, term)
	})
}

// cede makes a voter the leader with raft's own message for that. A transfer by raft sends
// the same, but its main loop, which waits for the disk, begins it. The other voters accept
// the candidate although they hear a leader. Its election is an ordinary one otherwise, so
// the same holds as after any: leases of this node's ticks end before the new leader
// changes anything.
func (c *Cluster) cede(ctx context.Context, to string, term uint64) error {
	t := c.transport.Load()
	self := raft.ServerID(c.opts.Name)
	header := raft.RPCHeader{
		ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(self), Addr: t.EncodePeer(self, raft.ServerAddress(self)),
	}
	err := t.TimeoutNow(raft.ServerID(to), raft.ServerAddress(to), &raft.TimeoutNowRequest{RPCHeader: header}, &raft.TimeoutNowResponse{})
	if err != nil {
		return fmt.Errorf("ask %s to lead: %w", to, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*c.Timing().Heartbeat)
	defer cancel()
	return c.awaitOtherLeader(ctx, term)
}

// awaitOtherLeader waits until a peer knows a leader of a later term. This node itself may
// learn of it much later, because its raft writes the term to the disk first.
func (c *Cluster) awaitOtherLeader(ctx context.Context, after uint64) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !c.peers.followOther(c.opts.Name, after) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("no other leader is known: %w", ctx.Err())
		case <-tick.C:
		}
	}
	return nil
}

// deposeSelf blocks raft's transport until a peer knows another leader, or until an
// election without this node has had its time.
func (c *Cluster) deposeSelf(ctx context.Context, term uint64) {
	c.layer.deposed.Store(true)
	defer c.layer.deposed.Store(false)
	c.mesh.CloseKind(mesh.KindRaft)
	ctx, cancel := context.WithTimeout(ctx, standBackFor(c.Timing()))
	defer cancel()
	if err := c.awaitOtherLeader(ctx, term); err != nil {
		c.log.Warn("raft's transport is unblocked", "err", err)
	}
}

// timedLog measures the writes of raft's log.
type timedLog struct {
	raft.CommitTrackingLogStore
	disk *diskMeter
}

// newTimedLog measures nothing if logs is not as the node's own store is.
func newTimedLog(logs raft.LogStore, disk *diskMeter) raft.LogStore {
	if tracking, ok := logs.(raft.CommitTrackingLogStore); ok {
		return &timedLog{CommitTrackingLogStore: tracking, disk: disk}
	}
	return logs
}

// StoreLogs implements raft.LogStore.
func (l *timedLog) StoreLogs(logs []*raft.Log) error {
	return l.disk.measure(func() error { return l.CommitTrackingLogStore.StoreLogs(logs) })
}

// StoreLog implements raft.LogStore.
func (l *timedLog) StoreLog(log *raft.Log) error {
	return l.disk.measure(func() error { return l.CommitTrackingLogStore.StoreLog(log) })
}
