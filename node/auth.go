package node

import (
	"errors"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/serving"
)

// agreement is what keyCheck needs of *cluster.Cluster.
type agreement interface {
	State() *agreed.State
	AgreedAge() (age time.Duration, known bool)
}

// keyCheck checks clients' keys against the local copy of the agreed state. Without a
// quorum, valid keys stay valid for as long as access.stale_for says.
type keyCheck struct {
	cluster agreement
	host    *host.Host
}

// Authenticate implements gateway.Auth.
func (k keyCheck) Authenticate(token string, local bool) (serving.Principal, error) {
	s := k.cluster.State()
	if s.Parsed == nil {
		return serving.Principal{}, gateway.ErrKeyUnknowable
	}
	// OpenAI's client libraries always send a key. Before the first key is created, any is accepted.
	anonymous := s.Parsed.Access.Anonymous || (s.NoKeyYet() && local)
	if anonymous && (token == "" || s.NoKeyYet()) {
		return serving.Principal{}, nil
	}
	key, err := s.Authenticate(token, k.host.Now())
	// A key that is missing, revoked or expired stays so. Any other one may have been
	// revoked, or created, since this node last heard of it.
	if err == nil || errors.Is(err, agreed.ErrKeyUnknown) {
		if s.Parsed.Access.StaleFor > 0 {
			if age, known := k.cluster.AgreedAge(); s.Parsed.Access.Stale(age, known) {
				return serving.Principal{}, gateway.ErrKeysStale
			}
		}
	}
	if err != nil {
		return serving.Principal{}, err
	}
	return serving.Principal{KeyID: key.ID, Tenant: key.Tenant, Models: key.Models}, nil
}
