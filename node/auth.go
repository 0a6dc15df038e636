package node

import (
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/serving"
)

// keyCheck judges clients' keys by the local copy of the agreed state: no
// quorum is needed, and losing it turns no valid key into a 401.
type keyCheck struct{ cluster *cluster.Cluster }

// Authenticate implements gateway.Auth.
func (k keyCheck) Authenticate(token string, local bool) (serving.Principal, error) {
	s := k.cluster.State()
	if s.Parsed == nil {
		return serving.Principal{}, gateway.ErrKeyUnknowable
	}
	// Clients of OpenAI's libraries must send some key; where none exists any
	// will do.
	free := s.Parsed.Access.Anonymous || (len(s.APIKeys) == 0 && local)
	if free && (token == "" || len(s.APIKeys) == 0) {
		return serving.Principal{}, nil
	}
	key, err := s.Authenticate(token, time.Now())
	if err != nil {
		return serving.Principal{}, err
	}
	return serving.Principal{KeyID: key.ID, Tenant: key.Tenant, Models: key.Models}, nil
}
