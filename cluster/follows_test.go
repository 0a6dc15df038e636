package cluster

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
)

// The disk of a voter hangs. However often it is asked to take over the leadership, the
// leader goes on: it loses no lease, refuses no change and does not end. When the disk works
// again, the voter takes over.
func TestLeadershipIsNotTransferredToAVoterWhoseDiskHangs(t *testing.T) {
	a, b, c := threeMembers(t)
	var leader, target *member
	eventually(t, "one of them leads", 20*time.Second, func() bool {
		for _, m := range []*member{a, b, c} {
			if _, leads := m.Leading(); leads {
				leader = m
			}
		}
		return leader != nil
	}, a, b, c)
	for _, m := range []*member{a, b, c} {
		if m != leader {
			target = m
		}
	}
	began, _ := leader.Leading()
	target.logs.disk.Lock()
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			target.logs.disk.Unlock()
		}
	}
	defer resume()
	for try := range 3 {
		asked := []*member{leader, a, c}[try]
		if err := asked.TransferLeadership(deadline(t, 15*time.Second), target.name); !errors.Is(err, ErrNotFollowing) {
			t.Errorf("try %d at %s: %v, want ErrNotFollowing", try, asked.name, err)
		}
		if now, leads := leader.Leading(); !leads || now != began {
			t.Fatalf("try %d: the leadership %+v is %+v now", try, began, now)
		}
		if _, err := leader.Propose(deadline(t, time.Second), agreed.CmdTick, nil); err != nil {
			t.Fatalf("try %d: the leader refuses a change: %v", try, err)
		}
	}
	eventually(t, "the voter is seen to be stuck", 5*time.Second, func() bool {
		return leader.Peers()[target.name].Stuck > leader.stuckAfter()
	}, leader)
	if to := leader.successor(); to == target.name || to == "" {
		t.Errorf("the leader would hand over to %q when it stops", to)
	}
	resume()
	eventually(t, "the voter takes over", 20*time.Second, func() bool {
		return leader.TransferLeadership(deadline(t, 10*time.Second), target.name) == nil
	}, a, b, c)
}

func TestAwaitApplied(t *testing.T) {
	a, b, c := threeMembers(t)
	index, err := c.Propose(deadline(t, 15*time.Second), agreed.CmdTick, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{a.name, b.name, c.name} {
		if err := b.AwaitApplied(deadline(t, 10*time.Second), node, index); err != nil {
			t.Errorf("%s: %v", node, err)
		}
	}
	if err := b.AwaitApplied(deadline(t, 100*time.Millisecond), a.name, index+1_000_000); !errors.Is(err, ErrNotFollowing) || !strings.Contains(err.Error(), a.name) {
		t.Errorf("an entry that does not exist: %v", err)
	}
}

// A node that does not tell whether it acts counts as acting when it has the promotion.
func TestAwaitActing(t *testing.T) {
	a, b, _ := threeMembers(t)
	short := func() error { return b.AwaitActing(deadline(t, 100*time.Millisecond), a.name, 3, 0) }
	if err := short(); !errors.Is(err, ErrNotFollowing) {
		t.Errorf("a node that acts in no epoch: %v", err)
	}
	for _, c := range []struct {
		acting *uint64
		want   bool
	}{{nil, true}, {new(uint64(2)), false}, {new(uint64(3)), true}} {
		got := &clusterpb.PingResponse{Acting: c.acting, Health: &clusterpb.Health{AppliedIndex: 7}}
		if ok, _ := acts(got, 3, 7); ok != c.want {
			t.Errorf("acting %v: %t", c.acting, ok)
		}
		if ok, _ := acts(got, 3, 8); ok != (c.want && c.acting != nil) {
			t.Errorf("acting %v without the promotion: %t", c.acting, ok)
		}
	}
}

func TestJournalGrowth(t *testing.T) {
	table := peerTable{answers: map[string]answer{}}
	for i, step := range []struct {
		journal string
		end     uint64
		want    uint64
	}{
		{"", 0, 0}, {"b-1/x", 10, 0}, {"b-1/x", 14, 4}, {"b-1/x", 15, 4}, {"b-1/x", 25, 10}, {"b-1/y", 3, 10}, {"b-1/y", 2, 10}, {"", 0, 10},
	} {
		table.put("b-1", answer{sent: time.Duration(i) * time.Second, got: &clusterpb.PingResponse{
			Health: &clusterpb.Health{Journal: step.journal, JournalEnd: step.end},
		}}, time.Minute)
		a, _ := table.get("b-1")
		var v PeerView
		v.fill(a, time.Minute)
		if v.Journal != step.journal || v.JournalEnd != step.end || v.JournalGrowth != step.want {
			t.Errorf("answer %d: %q %d grew by %d, want %d", i, v.Journal, v.JournalEnd, v.JournalGrowth, step.want)
		}
	}
	for range growthPings {
		table.put("b-1", answer{got: &clusterpb.PingResponse{Health: &clusterpb.Health{}}}, time.Minute)
	}
	a, _ := table.get("b-1")
	var v PeerView
	if v.fill(a, time.Minute); v.JournalGrowth != 0 {
		t.Errorf("growth %d is still remembered", v.JournalGrowth)
	}
}

// A follower can tell a refusal of the agreed state from a lost call, also when the refusal
// has no name of its own.
func TestARefusalWithoutANameReachesAFollower(t *testing.T) {
	a, b, c := threeMembers(t)
	for _, m := range []*member{a, b, c} {
		_, err := m.Propose(deadline(t, 15*time.Second), agreed.CmdStreamOpen, agreed.StreamOpen{Origin: m.name, Incarnation: "?"})
		if !errors.Is(err, ErrRefused) || errors.Is(err, ErrLeadershipMoved) || !strings.Contains(err.Error(), "not 32 hex digits") {
			t.Errorf("at %s: %v", m.name, err)
		}
	}
}
