package agreed

import (
	"cmp"
	"fmt"
	"maps"
	"time"
)

// keyCleanupLevel is the feature level from which on keys that have ended are cleaned up.
const keyCleanupLevel = 3

// endedKeyKept is how long a key is kept after it was revoked or has expired. Until then a
// client that uses it learns why it is refused, and dsnode apikey list shows its tenant and
// its end; later it is refused as unknown. It is more than twice the longest time for which
// something refers to a key, which is a job: 7 days until its start and 30 days after its end.
// And a clock of a proposer that is ahead by less than this removes no valid key.
const endedKeyKept = 90 * 24 * time.Hour

// NoKeyYet reports whether the cluster never had an API key. Only then local clients are
// served without one: a key that was cleaned up must not open the cluster again.
func (s *State) NoKeyYet() bool { return len(s.APIKeys) == 0 && !s.HadKeys }

// ended is when a key was revoked or has expired, by a time; false: it can be used.
func (k *APIKey) ended(at time.Time) (time.Time, bool) {
	switch {
	case !k.RevokedAt.IsZero():
		return k.RevokedAt, true
	case !k.ExpiresAt.IsZero() && at.After(k.ExpiresAt):
		return k.ExpiresAt, true
	}
	return time.Time{}, false
}

func (s *State) putKey(k APIKey, at time.Time) error {
	old, known := s.APIKeys[k.ID]
	if s.FeatureLevel < keyCleanupLevel {
		if !known && len(s.APIKeys) >= maxAPIKeys {
			return fmt.Errorf("%w: %d API keys", ErrStateFull, maxAPIKeys)
		}
		s.APIKeys = maps.Clone(s.APIKeys)
		s.APIKeys[k.ID] = k
		return nil
	}
	if !old.RevokedAt.IsZero() {
		k.RevokedAt = old.RevokedAt // no command ends a revocation
	}
	s.cleanKeys(at)
	if _, known := s.APIKeys[k.ID]; !known && len(s.APIKeys) >= maxAPIKeys {
		longest, found := s.longestEndedKey(at)
		if !found {
			return fmt.Errorf("%w: %d API keys that can be used", ErrStateFull, maxAPIKeys)
		}
		delete(s.APIKeys, longest)
	}
	s.APIKeys[k.ID], s.HadKeys = k, true
	return nil
}

func (s *State) revokeKey(d APIKeyRevoke, at time.Time) error {
	k, known := s.APIKeys[d.ID]
	if !known {
		return fmt.Errorf("%w: %s", ErrUnknownKey, d.ID)
	}
	if k.RevokedAt.IsZero() {
		k.RevokedAt = at
	}
	if s.FeatureLevel < keyCleanupLevel {
		return s.putKey(k, at)
	}
	s.cleanKeys(at)
	s.APIKeys[d.ID] = k
	// A version without bounds accepted it. Without it the state can become small again.
	if overBound(&k) != nil {
		delete(s.APIKeys, d.ID)
	}
	return nil
}

// cleanKeys makes a new map without the keys that ended long ago.
func (s *State) cleanKeys(at time.Time) {
	s.APIKeys = maps.Clone(s.APIKeys)
	maps.DeleteFunc(s.APIKeys, func(_ string, k APIKey) bool {
		end, ended := k.ended(at)
		return ended && at.Sub(end) > endedKeyKept
	})
}

// longestEndedKey is the id of the key that ended first; false: all can be used.
func (s *State) longestEndedKey(at time.Time) (id string, found bool) {
	var first time.Time
	for other, k := range s.APIKeys {
		end, ended := k.ended(at)
		if ended && (!found || cmp.Or(end.Compare(first), cmp.Compare(other, id)) < 0) {
			id, first, found = other, end, true
		}
	}
	return id, found
}
