package cluster

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// A voter that rejoins with an empty disk is a non-voter until it has caught up, and can
// then become a voter again.
func TestVoterWithAnEmptyDiskIsDemoted(t *testing.T) {
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
	eventually(t, "a-1 or b-1 leads", 20*time.Second, func() bool { return leader() != nil })
	c.dir, c.logs, c.snaps = t.TempDir(), newDiskStore(), raft.NewInmemSnapshotStore()
	c.start(t, a.opts.RPC, b.opts.RPC)
	eventually(t, "c-1 is admitted", 20*time.Second, func() bool { return c.State().ClusterID != "" }, a, b)
	if c.member.Load().VoteFrom == 0 {
		t.Error("c-1 does not know which entry admitted it")
	}
	eventually(t, "c-1 has the entry that admitted it", 20*time.Second, func() bool {
		return c.raft.Load().LastIndex() >= c.member.Load().VoteFrom
	})
	for _, server := range c.Raft().Servers {
		if server.Name == "c-1" && server.Voter {
			t.Error("c-1 is still a voter")
		}
	}
	eventually(t, "c-1 is a voter again", 20*time.Second, func() bool {
		l := leader()
		return l != nil && l.ChangeServer("c-1", MakeVoter) == nil
	})
	eventually(t, "c-1 holds a lease", 20*time.Second, func() bool { return settled(c) }, c)
}

// Without raft's stores, but with its member file, a voter is demoted and votes for nobody
// until it is admitted again; the founder too, which no entry has admitted.
func TestVoterWithoutItsRaftStoreIsDemoted(t *testing.T) {
	a, b, c := threeMembers(t)
	all := []*member{a, b, c}
	leader := func() *member {
		for _, m := range all {
			if m.stop != nil && m.Raft().Leads {
				return m
			}
		}
		return nil
	}
	for _, lost := range []*member{c, a} {
		before := lost.member.Load().VoteFrom
		lost.halt(t)
		eventually(t, "another node leads", 20*time.Second, func() bool { return leader() != nil }, all...)
		lost.logs, lost.snaps = newDiskStore(), raft.NewInmemSnapshotStore()
		lost.start(t)
		eventually(t, lost.name+" is admitted again", 20*time.Second, func() bool {
			m := lost.member.Load()
			return !m.StoreLost && m.VoteFrom > before && lost.raft.Load().LastIndex() >= m.VoteFrom
		}, all...)
		demoted := false
		for _, server := range lost.Raft().Servers {
			demoted = demoted || server.Name == lost.name && !server.Voter
		}
		if !demoted {
			t.Errorf("%s is still a voter: %v", lost.name, lost.Raft().Servers)
		}
		kept, err := readMemberFile(lost.dir)
		if err != nil || kept.StoreLost || kept.VoteFrom != lost.member.Load().VoteFrom {
			t.Errorf("%s has on disk %+v, %v", lost.name, kept, err)
		}
		eventually(t, lost.name+" is a voter again", 20*time.Second, func() bool {
			l := leader()
			return l != nil && l.ChangeServer(lost.name, MakeVoter) == nil
		})
		eventually(t, lost.name+" holds a lease", 20*time.Second, func() bool { return settled(lost) }, lost)
	}
}

// The log of a founder begins with a configuration in which it is the only voter. Until it
// has the entry that admitted it again, it does not elect itself.
func TestNoElectionBeforeTheAdmittingEntry(t *testing.T) {
	m := newMember(t, newTestCA(t, "test"), "a", "a-1").start(t)
	if err := m.Bootstrap(deadline(t, 10*time.Second), []byte(testSites), "test"); err != nil {
		t.Fatal(err)
	}
	m.halt(t)
	kept, err := readMemberFile(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	kept.VoteFrom = 1000
	if err := writeMemberFile(m.dir, kept); err != nil {
		t.Fatal(err)
	}
	m.start(t)
	eventually(t, "raft runs", 10*time.Second, func() bool { return m.raft.Load() != nil })
	if conf := m.raft.Load().ReloadableConfig(); conf.HeartbeatTimeout < time.Minute || conf.ElectionTimeout < time.Minute {
		t.Errorf("it may elect itself after %s", conf.HeartbeatTimeout)
	}
	if !m.votes.refuses(raft.RPC{Command: &raft.TimeoutNowRequest{}}) {
		t.Error("it accepts leadership from another node")
	}
	m.votes.from.Store(1) // as if the log had the entry
	eventually(t, "it leads", 20*time.Second, func() bool { return m.Raft().Leads })
	if conf := m.raft.Load().ReloadableConfig(); conf.HeartbeatTimeout != m.Timing().Heartbeat || conf.ElectionTimeout != m.Timing().Heartbeat {
		t.Errorf("its timeouts are %s and %s", conf.HeartbeatTimeout, conf.ElectionTimeout)
	}
}

func TestNoVoteBeforeTheAdmittingEntry(t *testing.T) {
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
	}{{11, true, true}, {never, true, true}, {10, true, false}, {0, true, false}, {0, false, true}} {
		v := &voterTransport{yields: func() bool { return false }, running: func() *raft.Raft {
			if !tt.running {
				return nil
			}
			return r
		}}
		v.from.Store(tt.from)
		if tt.refuses {
			// Such a node must not lead either. Without its own transport a request that
			// is sent would panic.
			if err := v.RequestVote("y", "y", nil, nil); !errors.Is(err, errNoVoteYet) {
				t.Errorf("admitted by entry %d: asked for votes: %v", tt.from, err)
			}
			if err := v.RequestPreVote("y", "y", nil, nil); !errors.Is(err, errNoVoteYet) {
				t.Errorf("admitted by entry %d: asked for pre-votes: %v", tt.from, err)
			}
		}
		for _, vote := range votes {
			if got := v.refuses(raft.RPC{Command: vote}); got != tt.refuses {
				t.Errorf("admitted by entry %d, the log has 10, running %t: %T refused: %t", tt.from, tt.running, vote, got)
			}
		}
		if v.refuses(raft.RPC{Command: &raft.AppendEntriesRequest{}}) {
			t.Error("AppendEntries was refused")
		}
	}
}
