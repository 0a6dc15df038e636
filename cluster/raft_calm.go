package cluster

import (
	"maps"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
)

// Raft's leader sends each follower a heartbeat every tenth of the heartbeat
// timeout, whatever else it sends. Here a tick goes to each of them four times a
// second anyway, and an answer to it proves all that an answer to a heartbeat
// does, at both ends. So in calm weather a heartbeat waits for the next answer
// to an entry and shares it; an idle cluster has a third of the messages less.
//
// Calm means that answers have come on time for a while. One that is late is not
// waited for, and from then on heartbeats go as raft sends them, because it takes
// several lost in a row, not one, to depose a leader that lives.

// calmAfter is how many answers in a row must have been on time: three seconds
// of ticks.
const calmAfter = 12

// heartbeats lets raft's heartbeats share the answers to entries.
type heartbeats struct {
	// onTime is how long after an answer the next one has to come.
	onTime time.Duration
	now    func() time.Duration

	mu    sync.Mutex // guards peers
	peers map[raft.ServerID]*answers
}

// answers of one follower to entries.
type answers struct {
	term  uint64
	last  time.Duration // when the newest came
	row   int           // how many have come on time
	again chan struct{} // closes when the next one comes
}

func newHeartbeats(t config.Timing) *heartbeats {
	// The next tick is proposed a tick after the one before, and then takes about
	// as long.
	return &heartbeats{onTime: t.Tick + t.Tick/4, now: clock.Boottime, peers: map[raft.ServerID]*answers{}}
}

// isHeartbeat tells as raft's own transport does.
func isHeartbeat(r *raft.AppendEntriesRequest) bool {
	return r.Term != 0 && len(r.Addr) > 0 && r.PrevLogEntry == 0 && r.PrevLogTerm == 0 &&
		len(r.Entries) == 0 && r.LeaderCommitIndex == 0
}

// answered takes in that a follower took what was sent to it in a term.
func (h *heartbeats) answered(from raft.ServerID, term uint64) {
	now := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	a := h.peers[from]
	if a == nil || a.term != term {
		maps.DeleteFunc(h.peers, func(_ raft.ServerID, old *answers) bool { return old.term < term })
		a = &answers{term: term, again: make(chan struct{})}
		h.peers[from] = a
	}
	if a.row = min(a.row+1, calmAfter); now-a.last > h.onTime {
		a.row = 0
	}
	a.last = now
	close(a.again)
	a.again = make(chan struct{})
}

// await blocks while an answer is due, and reports whether it came.
func (h *heartbeats) await(from raft.ServerID, term uint64, closed <-chan struct{}) bool {
	h.mu.Lock()
	a := h.peers[from]
	if a == nil || a.term != term || a.row < calmAfter {
		h.mu.Unlock()
		return false
	}
	again, left := a.again, a.last+h.onTime-h.now()
	h.mu.Unlock()
	if left > 0 {
		late := time.NewTimer(left)
		defer late.Stop()
		select {
		case <-again:
			return true
		case <-closed:
			return false
		case <-late.C:
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	a.row = 0
	return false
}

// AppendEntries sends entries, or a heartbeat.
func (v *voterTransport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	heartbeat := isHeartbeat(args)
	if heartbeat && v.hearts.await(id, args.Term, v.closed) {
		// Without a header: raft decodes the next answer into the same resp, and so
		// into any bytes that this one lent it, as those of its own name.
		*resp = raft.AppendEntriesResponse{Term: args.Term, Success: true}
		return nil
	}
	err := v.NetworkTransport.AppendEntries(id, target, args, resp)
	// One that refuses entries, since its log goes another way, does not take them
	// for a word of its leader: it has to get the heartbeats.
	if err == nil && !heartbeat && resp.Success {
		v.hearts.answered(id, args.Term)
	}
	return err
}
