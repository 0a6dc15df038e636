package config

import (
	"fmt"
	"time"
)

// DefaultHeartbeat is for round trips of up to 60 ms. Measured at 30 ms: an
// election took 1.8 s (p50), at most 3.0 s, and no leader was lost in 5 minutes
// of 2 % packet loss, 200 ms jitter and a node stopped for 300 ms of each second.
const DefaultHeartbeat = 800 * time.Millisecond

// Timing has all the times of failure detection. They are derived from one
// setting, so that they are consistent on every node.
type Timing struct {
	// Heartbeat is raft's heartbeat, election and leader-lease timeout. With half
	// of it as leader lease, a leader short of CPU would step down.
	Heartbeat time.Duration
	// Tick is how often the leader commits an entry and how often every node
	// pings every other.
	Tick time.Duration
	// Lease (L in DESIGN.md) is how long a node that knows of a committed tick may
	// act in a role, counted from before that tick was proposed.
	Lease time.Duration
	// NewLeaderWait is 1.1 L: a new leader promotes no site earlier than this after
	// its first commit, so that every older lease has ended.
	NewLeaderWait time.Duration
	// Patience is how long a site must be silent to count as down.
	Patience time.Duration
	// Transport bounds one raft RPC. With raft's default of 10 s, heartbeats would
	// wait that long on a dead connection.
	Transport time.Duration
	// NoLease is after how long without a lease a primary is replaced, even if
	// other nodes hear it.
	NoLease time.Duration
}

// TimingFrom derives all times from the heartbeat; zero means the default.
func TimingFrom(heartbeat time.Duration) Timing {
	if heartbeat == 0 {
		heartbeat = DefaultHeartbeat
	}
	return Timing{
		Heartbeat:     heartbeat,
		Tick:          heartbeat * 5 / 16,  // 250 ms
		Lease:         heartbeat * 3 / 2,   // 1.2 s
		NewLeaderWait: heartbeat * 33 / 20, // 1.32 s
		Patience:      heartbeat * 25 / 8,  // 2.5 s
		Transport:     heartbeat * 5 / 2,   // 2 s
		NoLease:       max(30*time.Second, heartbeat*20),
	}
}

// Check returns an error if the times contradict each other.
func (t Timing) Check() error {
	for _, rule := range []struct {
		less, more         time.Duration
		lessName, moreName string
	}{
		{3 * t.Tick, t.Lease, "three ticks", "the lease"},
		{t.Heartbeat, t.Lease, "the heartbeat", "the lease"},
		{t.Lease * 11 / 10, t.NewLeaderWait + 1, "1.1 leases", "the wait of a new leader"},
		{t.Lease, t.Patience, "the lease", "the patience"},
		{t.Heartbeat, t.Transport, "the heartbeat", "the transport timeout"},
		{t.Patience, t.NoLease, "the patience", "the time without a lease"},
	} {
		if rule.less >= rule.more {
			return fmt.Errorf("timing.heartbeat %s: %s (%s) must be shorter than %s (%s)",
				t.Heartbeat, rule.lessName, rule.less, rule.moreName, rule.more)
		}
	}
	return nil
}
