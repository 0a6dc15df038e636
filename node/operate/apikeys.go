package operate

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
)

// CreateAPIKey makes a client's key. Only the answer contains its secret: the agreed state
// has a hash.
func (o *Operator) CreateAPIKey(ctx context.Context, r admin.APIKeyRequest) (admin.APIKeyCreated, error) {
	s := o.Cluster.State()
	if s.Parsed == nil {
		return admin.APIKeyCreated{}, o.notMember()
	}
	for _, m := range r.Models {
		if _, known := s.Parsed.Models[m]; !known {
			return admin.APIKeyCreated{}, fmt.Errorf("%w: model %q is not in the configuration", admin.ErrInvalidRequest, m)
		}
	}
	expires := time.Time{}
	if r.ExpiresAt != nil {
		expires = *r.ExpiresAt
	}
	key, secret := agreed.NewAPIKey(r.Tenant, r.Note, r.Models, expires, o.Host.Now())
	if _, err := o.Cluster.Propose(ctx, agreed.CmdAPIKeyPut, key); err != nil {
		return admin.APIKeyCreated{}, err
	}
	return admin.APIKeyCreated{APIKeyInfo: keyInfo(key), Secret: secret}, nil
}

func keyInfo(k agreed.APIKey) admin.APIKeyInfo {
	info := admin.APIKeyInfo{ID: k.ID, Tenant: k.Tenant, Note: k.Note, Models: k.Models, CreatedAt: k.CreatedAt}
	if info.Models == nil {
		info.Models = []string{}
	}
	if !k.ExpiresAt.IsZero() {
		info.ExpiresAt = &k.ExpiresAt
	}
	if !k.RevokedAt.IsZero() {
		info.RevokedAt = &k.RevokedAt
	}
	return info
}

// APIKeys lists all keys, oldest first.
func (o *Operator) APIKeys(context.Context) ([]admin.APIKeyInfo, error) {
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return nil, o.notMember()
	}
	keys := make([]admin.APIKeyInfo, 0, len(s.APIKeys))
	for _, k := range s.APIKeys {
		keys = append(keys, keyInfo(k))
	}
	slices.SortFunc(keys, func(a, b admin.APIKeyInfo) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return keys, nil
}

// RevokeAPIKey makes a key invalid, on each node as soon as it has applied the change.
func (o *Operator) RevokeAPIKey(ctx context.Context, id string) error {
	_, err := o.Cluster.Propose(ctx, agreed.CmdAPIKeyRevoke, agreed.APIKeyRevoke{ID: id})
	return err
}
