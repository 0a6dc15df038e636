package serving

import (
	"errors"
	"testing"

	"github.com/dsnode/dsnode/node/upstream"
)

// TestConsequences: after every result that lets another server be asked, there is an
// error for the client if none is left.
func TestConsequences(t *testing.T) {
	for r := range upstream.Results {
		c := consequences[r]
		if c.next && c.err == nil {
			t.Errorf("%s has no error", r)
		}
		if r == upstream.Cancelled || r == upstream.OK || r == upstream.ClientError {
			continue
		}
		a := &attempt{permit: upstream.Permit{Upstream: "up"}}
		o := failed(r, errors.New("cause"))
		for _, o.sent = range []bool{false, true} {
			if err := a.finalError(&o); !errors.Is(err, ErrUpstreamFailed) && (c.err == nil || !errors.Is(err, c.err)) {
				t.Errorf("%s, sent %v: %v", r, o.sent, err)
			}
		}
	}
}
