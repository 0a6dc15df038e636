package node

import (
	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/serving"
)

// keyCheck checks clients' keys against the local copy of the agreed state. Without a
// quorum, valid keys stay valid.
type keyCheck struct {
	cluster *cluster.Cluster
	host    *host.Host
}

// Authenticate implements gateway.Auth.
func (k keyCheck) Authenticate(token string, local bool) (serving.Principal, error) {
	s := k.cluster.State()
	if s.Parsed == nil {
		return serving.Principal{}, gateway.ErrKeyUnknowable
	}
	// OpenAI's client libraries always send a key. While no key exists, any is accepted.
	anonymous := s.Parsed.Access.Anonymous || (len(s.APIKeys) == 0 && local)
	if anonymous && (token == "" || len(s.APIKeys) == 0) {
		return serving.Principal{}, nil
	}
	key, err := s.Authenticate(token, k.host.Now())
	if err != nil {
		return serving.Principal{}, err
	}
	return serving.Principal{KeyID: key.ID, Tenant: key.Tenant, Models: key.Models}, nil
}
