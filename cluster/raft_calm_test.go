package cluster

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/config"
)

// One follower's answers to entries, and whether a heartbeat that raft sends at
// some moment waits for the next one.
func TestHeartbeatsShareAnswersInCalmWeatherOnly(t *testing.T) {
	timing := config.TimingFrom(0)
	tick := timing.Tick
	const follower = raft.ServerID("b-1")
	for name, tt := range map[string]struct {
		answers []time.Duration // the time between each and the one before
		term    uint64          // of the heartbeat; the answers are of 3
		after   time.Duration   // the newest answer: when the heartbeat is sent
		next    time.Duration   // after the newest answer: when the next comes; 0: never
		want    bool
		took    time.Duration
	}{
		"calm":                       {many(20, tick), 3, tick / 2, tick, true, tick / 2},
		"calm, and the next is late": {many(20, tick), 3, tick / 2, 2 * tick, false, tick*5/4 - tick/2},
		"calm, and none comes":       {many(20, tick), 3, tick / 2, 0, false, tick*5/4 - tick/2},
		"it is late already":         {many(20, tick), 3, 2 * tick, 0, false, 0},
		"no answer yet":              {nil, 3, 0, tick, false, 0},
		"just begun":                 {many(calmAfter-1, tick), 3, tick / 2, tick, false, 0},
		"one was late lately":        {append(many(20, tick), append(many(1, 2*tick), many(calmAfter-1, tick)...)...), 3, tick / 2, tick, false, 0},
		"one was late long ago":      {append(many(20, tick), append(many(1, 2*tick), many(calmAfter, tick)...)...), 3, tick / 2, tick, true, tick / 2},
		"answers of an older term":   {many(20, tick), 4, tick / 2, tick, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				h := newHeartbeats(timing)
				h.now = func() time.Duration { return time.Since(begun) + time.Hour }
				for _, pause := range tt.answers {
					time.Sleep(pause)
					h.answered(follower, 3)
				}
				if tt.next > 0 {
					time.AfterFunc(tt.next, func() { h.answered(follower, 3) })
				}
				time.Sleep(tt.after)
				asked := time.Now()
				if got := h.await(follower, tt.term, nil); got != tt.want {
					t.Errorf("shares an answer: %v, want %v", got, tt.want)
				}
				if took := time.Since(asked); took != tt.took {
					t.Errorf("waited %v, want %v", took, tt.took)
				}
				// After a late answer nobody waits for the next.
				if again := time.Now(); !tt.want && h.await(follower, tt.term, nil) || !tt.want && time.Since(again) != 0 {
					t.Error("the heartbeat after one that was not shared waited again")
				}
				time.Sleep(2 * tick) // what is under way ends
			})
		})
	}
}

func TestHeartbeatThatWaitsEndsWithTheTransport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		h := newHeartbeats(config.TimingFrom(0))
		h.now = func() time.Duration { return time.Since(begun) + time.Hour }
		for range 20 {
			time.Sleep(h.onTime / 2)
			h.answered("b-1", 3)
		}
		closed := make(chan struct{})
		close(closed)
		if before := time.Now(); h.await("b-1", 3, closed) || time.Since(before) != 0 {
			t.Error("it waited although the transport is closed")
		}
	})
}

// A follower whose log goes another way refuses entry after entry, and takes none
// of them for a sign of its leader: it gets heartbeats all the while.
func TestHeartbeatsGoToAFollowerThatRefusesEntries(t *testing.T) {
	leader, follower := realTransport(t), realTransport(t)
	timing := config.TimingFrom(time.Hour) // no answer is late
	v := newVoterTransport(leader, newHeartbeats(timing), 0, func() *raft.Raft { return nil })
	var answered sync.WaitGroup
	defer answered.Wait()
	defer func() { _ = errors.Join(v.Close(), follower.Close()) }()
	heartbeats := make(chan struct{}, 1)
	follower.SetHeartbeatHandler(func(rpc raft.RPC) {
		heartbeats <- struct{}{}
		rpc.Respond(&raft.AppendEntriesResponse{Term: 3, Success: true}, nil)
	})
	const refusals = 2 * calmAfter
	done := make(chan struct{})
	defer close(done)
	answered.Go(func() {
		for {
			select {
			case rpc := <-follower.Consumer():
				rpc.Respond(&raft.AppendEntriesResponse{Term: 3, NoRetryBackoff: true}, nil)
			case <-done:
				return
			}
		}
	})
	header := raft.RPCHeader{Addr: []byte("a-1")}
	var resp raft.AppendEntriesResponse
	for range refusals {
		entries := raft.AppendEntriesRequest{RPCHeader: header, Term: 3, PrevLogEntry: 7, PrevLogTerm: 3, LeaderCommitIndex: 7}
		if err := v.AppendEntries("b-1", follower.LocalAddr(), &entries, &resp); err != nil {
			t.Fatal(err)
		}
	}
	sent := make(chan error, 1)
	answered.Go(func() {
		sent <- v.AppendEntries("b-1", follower.LocalAddr(), &raft.AppendEntriesRequest{RPCHeader: header, Term: 3}, &resp)
	})
	select {
	case <-heartbeats:
		if err := <-sent; err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the heartbeat was not sent")
	}
}

// Raft uses one request and one response for all heartbeats to a follower, and the
// follower believes the name in the request: an answer that is shared must lend it
// to nobody who writes into it.
func TestSharedAnswerLendsNoName(t *testing.T) {
	leader, follower := realTransport(t), realTransport(t)
	hearts := newHeartbeats(config.TimingFrom(time.Hour))
	var now atomic.Int64
	hearts.now = func() time.Duration { return time.Duration(now.Load()) }
	v := newVoterTransport(leader, hearts, 0, func() *raft.Raft { return nil })
	defer func() { _ = errors.Join(v.Close(), follower.Close()) }()
	var sent atomic.Int32
	follower.SetHeartbeatHandler(func(rpc raft.RPC) {
		sent.Add(1)
		rpc.Respond(&raft.AppendEntriesResponse{RPCHeader: raft.RPCHeader{ID: []byte("b-1"), Addr: []byte("b-1")}, Term: 3, Success: true}, nil)
	})
	for range calmAfter {
		hearts.answered("b-1", 3)
	}
	req := raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{ID: []byte("shanghai-a-1"), Addr: []byte("shanghai-a-1")}, Term: 3}
	var resp raft.AppendEntriesResponse
	shared := make(chan error, 1)
	go func() { shared <- v.AppendEntries("b-1", follower.LocalAddr(), &req, &resp) }()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for waiting := true; waiting; {
		select {
		case err := <-shared:
			if err != nil || !resp.Success || sent.Load() != 0 {
				t.Fatalf("%+v: %v; %d heartbeats were sent", resp, err, sent.Load())
			}
			waiting = false
		case <-tick.C:
			hearts.answered("b-1", 3)
		}
	}
	now.Store(int64(24 * time.Hour)) // the next answer is late
	if err := v.AppendEntries("b-1", follower.LocalAddr(), &req, &resp); err != nil || !resp.Success || sent.Load() != 1 {
		t.Fatalf("%+v: %v; %d heartbeats were sent", resp, err, sent.Load())
	}
	if string(req.ID) != "shanghai-a-1" || string(req.Addr) != "shanghai-a-1" {
		t.Errorf("the leader calls itself %s at %s", req.ID, req.Addr)
	}
}

func realTransport(t *testing.T) *raft.NetworkTransport {
	tcp, err := raft.NewTCPTransport("127.0.0.1:0", nil, 1, time.Second, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return tcp
}

func many(n int, d time.Duration) []time.Duration {
	all := make([]time.Duration, n)
	for i := range all {
		all[i] = d
	}
	return all
}
