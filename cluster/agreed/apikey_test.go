package agreed

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// atLevel is a cluster at a feature level.
func atLevel(t testing.TB, level int) *State {
	return applied(t, founded(t), CmdFeatureRaise, FeatureRaise{Level: level})
}

func at(t testing.TB, s *State, after time.Duration, typ CommandType, data any) *State {
	t.Helper()
	next, err := Apply(s, command(t, typ, applyTime.Add(after), data))
	if err != nil {
		t.Fatalf("%s after %s: %v", typ, after, err)
	}
	return next
}

// Keys that ended long ago are removed, and stay refused. That none is left does not open
// the cluster to clients without a key.
func TestEndedKeysAreCleanedUp(t *testing.T) {
	s := atLevel(t, keyCleanupLevel)
	if !s.NoKeyYet() {
		t.Error("a new cluster had a key")
	}
	revoked, secret := NewAPIKey("t", "", nil, time.Time{}, applyTime)
	expired, expiredSecret := NewAPIKey("t", "", nil, applyTime.Add(time.Hour), applyTime)
	for _, k := range []APIKey{revoked, expired} {
		s = at(t, s, 0, CmdAPIKeyPut, k)
	}
	s = at(t, s, time.Hour, CmdAPIKeyRevoke, APIKeyRevoke{ID: revoked.ID})

	other := APIKey{ID: "other", Tenant: "t"}
	kept := at(t, s, time.Hour+endedKeyKept, CmdAPIKeyPut, other)
	if len(kept.APIKeys) != 3 {
		t.Errorf("%d keys when the ended ones are still kept, want 3", len(kept.APIKeys))
	}
	late := time.Hour + endedKeyKept + time.Second
	clean := at(t, kept, late, CmdAPIKeyRevoke, APIKeyRevoke{ID: other.ID})
	if len(clean.APIKeys) != 1 {
		t.Errorf("%d keys, want only the one that was revoked just now", len(clean.APIKeys))
	}
	for _, token := range []string{secret, expiredSecret} {
		if _, err := clean.Authenticate(token, applyTime.Add(late)); !errors.Is(err, ErrKeyUnknown) {
			t.Errorf("a key that was cleaned up: %v, want ErrKeyUnknown", err)
		}
	}
	clean.APIKeys = map[string]APIKey{}
	if clean.NoKeyYet() {
		t.Error("after the last key was cleaned up the cluster never had one")
	}
	if len(kept.APIKeys) != 3 || len(s.APIKeys) != 2 {
		t.Error("an earlier state was changed")
	}
}

// Below the level members of older versions apply the same entries, and keep all keys.
func TestKeysAreKeptBelowTheLevel(t *testing.T) {
	s := atLevel(t, keyCleanupLevel-1)
	s = at(t, s, 0, CmdAPIKeyPut, APIKey{ID: "1", Tenant: "t"})
	s = at(t, s, 0, CmdAPIKeyRevoke, APIKeyRevoke{ID: "1"})
	s = at(t, s, 10*endedKeyKept, CmdAPIKeyPut, APIKey{ID: "2", Tenant: "t"})
	if len(s.APIKeys) != 2 || s.HadKeys {
		t.Errorf("%d keys, HadKeys %v; want 2 and false as an older version has it", len(s.APIKeys), s.HadKeys)
	}
	s = at(t, s, 0, CmdFeatureRaise, FeatureRaise{Level: keyCleanupLevel})
	if !s.HadKeys {
		t.Error("the level was raised with keys, and HadKeys is false")
	}
}

// When there are as many keys as there may be, the one that ended first makes room.
func TestEndedKeysTakeNoRoom(t *testing.T) {
	s := atLevel(t, keyCleanupLevel)
	s.APIKeys = map[string]APIKey{}
	for i := range maxAPIKeys {
		id := fmt.Sprint(i)
		s.APIKeys[id] = APIKey{ID: id, Tenant: "t"}
	}
	if _, err := Apply(s, command(t, CmdAPIKeyPut, applyTime, APIKey{ID: "new"})); !errors.Is(err, ErrStateFull) {
		t.Errorf("one more key: %v, want ErrStateFull", err)
	}
	s.APIKeys["3"] = APIKey{ID: "3", RevokedAt: applyTime.Add(2 * time.Second)}
	s.APIKeys["4"] = APIKey{ID: "4", ExpiresAt: applyTime.Add(time.Second)}
	s.APIKeys["5"] = APIKey{ID: "5", RevokedAt: applyTime.Add(time.Second)}
	for i, gone := range []string{"4", "5", "3"} {
		id := fmt.Sprint("new-", i)
		s = at(t, s, time.Hour, CmdAPIKeyPut, APIKey{ID: id, Tenant: "t"})
		_, has := s.APIKeys[id]
		if _, left := s.APIKeys[gone]; left || !has || len(s.APIKeys) != maxAPIKeys {
			t.Errorf("step %d: key %s is left: %v, the new one is there: %v, %d keys", i, gone, left, has, len(s.APIKeys))
		}
	}
}

// A late or forged command can't make a revoked key valid again.
func TestNoCommandEndsARevocation(t *testing.T) {
	k, secret := NewAPIKey("t", "", nil, time.Time{}, applyTime)
	s := at(t, atLevel(t, keyCleanupLevel), 0, CmdAPIKeyPut, k)
	s = at(t, s, 0, CmdAPIKeyRevoke, APIKeyRevoke{ID: k.ID})
	s = at(t, s, time.Second, CmdAPIKeyPut, k)
	if _, err := s.Authenticate(secret, applyTime); !errors.Is(err, ErrKeyRevoked) {
		t.Errorf("after it was put again: %v, want ErrKeyRevoked", err)
	}
}
