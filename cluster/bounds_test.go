package cluster

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// Neither the leader nor a follower can commit a value without a bound, at any feature
// level: 100 keys with a note of 960 KB made all snapshots fail.
func TestProposalsOverABoundAreRefused(t *testing.T) {
	a, b, c := threeMembersAt(t, 2)
	size := a.StateBytes()
	for _, m := range []*member{a, b, c} {
		key, _ := agreed.NewAPIKey("t", strings.Repeat("n", 960<<10), nil, time.Time{}, time.Now())
		var err error
		eventually(t, m.name+" knows a leader that answers", 20*time.Second, func() bool {
			_, err = m.Propose(deadline(t, 15*time.Second), agreed.CmdAPIKeyPut, key)
			return !errors.Is(err, ErrNoQuorum) && !errors.Is(err, ErrLeadershipMoved)
		}, a, b, c)
		if !errors.Is(err, agreed.ErrOverBound) || !strings.Contains(err.Error(), "APIKey.Note has 983040 bytes, at most 1024 are allowed") {
			t.Errorf("at %s: %v, want ErrOverBound and which value", m.name, err)
		}
		if n := len(m.State().APIKeys); n != 0 {
			t.Errorf("%s has %d keys", m.name, n)
		}
	}
	if level := a.State().FeatureLevel; level != 2 {
		t.Errorf("feature level %d: this test is about members that are held at 2", level)
	}
	key, _ := agreed.NewAPIKey("t", "short", nil, time.Time{}, time.Now())
	eventually(t, "a usual key is accepted", 20*time.Second, func() bool {
		_, err := b.Propose(deadline(t, 15*time.Second), agreed.CmdAPIKeyPut, key)
		return err == nil
	}, a, b, c)
	if now := b.StateBytes(); now <= size || now > size+1<<10 {
		t.Errorf("the state has %d bytes after a key, %d before", now, size)
	}
}
