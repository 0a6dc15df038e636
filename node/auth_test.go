package node

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/gateway"
)

// agreedBefore is an agreed state that is so old; negative: nobody knows how old.
type agreedBefore struct {
	state *agreed.State
	age   time.Duration
}

func (a agreedBefore) State() *agreed.State             { return a.state }
func (a agreedBefore) AgreedAge() (time.Duration, bool) { return max(a.age, 0), a.age >= 0 }

// A node that is cut off accepts keys for access.stale_for. After that it can't know: the
// answer is 503, and 401 only for what stays wrong whatever the cluster has agreed on since.
func TestKeysOfANodeThatIsCutOff(t *testing.T) {
	now := time.Now()
	good, secret := agreed.NewAPIKey("t", "", nil, time.Time{}, now)
	revoked, revokedSecret := agreed.NewAPIKey("t", "", nil, time.Time{}, now)
	revoked.RevokedAt = now.Add(-time.Hour)
	const minute = time.Minute
	for _, tc := range []struct {
		token     string
		staleFor  time.Duration
		age       time.Duration
		anonymous bool
		want      error
	}{
		{secret, 0, 0, false, nil},
		{secret, 0, 1000 * time.Hour, false, nil}, // without a limit
		{secret, 0, -1, false, nil},
		{secret, minute, 0, false, nil},
		{secret, minute, minute, false, nil},
		{secret, minute, minute + 1, false, gateway.ErrKeysStale},
		{secret, minute, -1, false, gateway.ErrKeysStale},
		{"unknown", minute, minute, false, agreed.ErrKeyUnknown},
		{"unknown", minute, minute + 1, false, gateway.ErrKeysStale}, // it may be a new key
		{revokedSecret, minute, minute + 1, false, agreed.ErrKeyRevoked},
		{"", minute, minute + 1, false, agreed.ErrKeyMissing},
		{"", minute, minute + 1, true, nil},
		{secret, minute, minute + 1, true, gateway.ErrKeysStale},
	} {
		t.Run(fmt.Sprintf("%.8s, stale_for %s, age %s, anonymous %v", tc.token, tc.staleFor, tc.age, tc.anonymous), func(t *testing.T) {
			s := &agreed.State{
				Parsed:  &config.Config{Access: config.Access{Anonymous: tc.anonymous, StaleFor: config.Duration(tc.staleFor)}},
				APIKeys: map[string]agreed.APIKey{good.ID: good, revoked.ID: revoked},
			}
			who, err := keyCheck{cluster: agreedBefore{s, tc.age}}.Authenticate(tc.token, true)
			if !errors.Is(err, tc.want) || tc.want == nil && err != nil {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if err == nil && tc.token == secret && who.Tenant != "t" {
				t.Errorf("the key's tenant is %q", who.Tenant)
			}
		})
	}
}

// Before the first key local clients need none. That the last key was cleaned up must not
// open the node again.
func TestNoKeyIsNeededOnlyBeforeTheFirst(t *testing.T) {
	for _, tc := range []struct {
		token      string
		had, local bool
		want       error
	}{
		{"any", false, true, nil},
		{"", false, true, nil},
		{"any", false, false, agreed.ErrKeyUnknown},
		{"any", true, true, agreed.ErrKeyUnknown},
		{"", true, true, agreed.ErrKeyMissing},
	} {
		s := &agreed.State{Parsed: &config.Config{}, HadKeys: tc.had}
		if _, err := (keyCheck{cluster: agreedBefore{s, 0}}).Authenticate(tc.token, tc.local); !errors.Is(err, tc.want) || tc.want == nil && err != nil {
			t.Errorf("key %q, had keys %v, local %v: %v, want %v", tc.token, tc.had, tc.local, err, tc.want)
		}
	}
}
