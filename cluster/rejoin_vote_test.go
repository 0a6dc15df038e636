package cluster

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// A voter that comes back with an empty disk has lost its vote before it is let
// in, learns all there is, and can become a voter again.
func TestVoterWithAnEmptyDiskLosesItsVote(t *testing.T) {
	a, b, c := threeMembers(t)
	leader := func() *member {
		for _, m := range []*member{a, b} {
			if m.Raft().Leads {
				return m
			}
		}
		return nil
	}
	c.halt(t)
	eventually(t, "one of the others leads", 20*time.Second, func() bool { return leader() != nil })
	c.dir, c.logs, c.snaps = t.TempDir(), raft.NewInmemCommitTrackingStore(), raft.NewInmemSnapshotStore()
	c.start(t, a.opts.RPC, b.opts.RPC)
	eventually(t, "c-1 is let in", 20*time.Second, func() bool { return c.State().ClusterID != "" }, a, b)
	if c.member.Load().VoteFrom == 0 {
		t.Error("c-1 does not know which entry let it in")
	}
	eventually(t, "c-1 has the entry that let it in", 20*time.Second, func() bool {
		return c.raft.Load().LastIndex() >= c.member.Load().VoteFrom
	})
	for _, server := range c.Raft().Servers {
		if server.Name == "c-1" && server.Voter {
			t.Error("c-1 still votes")
		}
	}
	eventually(t, "c-1 votes again", 20*time.Second, func() bool {
		l := leader()
		return l != nil && l.ChangeServer("c-1", MakeVoter) == nil
	})
	eventually(t, "c-1 holds a lease", 20*time.Second, func() bool { return settled(c) }, c)
}

func TestNoVoteBeforeTheEntryThatLetItIn(t *testing.T) {
	votes := []any{&raft.RequestVoteRequest{}, &raft.RequestPreVoteRequest{}}
	store := raft.NewInmemStore()
	for i := range uint64(10) {
		if err := store.StoreLog(&raft.Log{Index: i + 1, Term: 1, Type: raft.LogNoop}); err != nil {
			t.Fatal(err)
		}
	}
	_, transport := raft.NewInmemTransport("x")
	conf := raft.DefaultConfig()
	conf.LocalID, conf.Logger = "x", newRaftLogger(slog.New(slog.DiscardHandler))
	r, err := raft.NewRaft(conf, &raft.MockFSM{}, store, store, raft.NewInmemSnapshotStore(), transport)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Shutdown().Error(); err != nil && !errors.Is(err, raft.ErrRaftShutdown) {
			t.Error(err)
		}
	}()
	for _, tt := range []struct {
		from    uint64
		running bool
		refuses bool
	}{{11, true, true}, {10, true, false}, {0, true, false}, {0, false, true}} {
		v := &voterTransport{from: tt.from, running: func() *raft.Raft {
			if !tt.running {
				return nil
			}
			return r
		}}
		for _, vote := range votes {
			if got := v.refuses(raft.RPC{Command: vote}); got != tt.refuses {
				t.Errorf("let in by entry %d of 10, running %t: %T refused %t", tt.from, tt.running, vote, got)
			}
		}
		if v.refuses(raft.RPC{Command: &raft.AppendEntriesRequest{}}) {
			t.Error("entries are refused")
		}
	}
}
