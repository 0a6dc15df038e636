package operate

import (
	"context"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/datakeys"
)

// recordsTimeout bounds the wait for the other nodes' counts of records.
const recordsTimeout = 2 * time.Second

// Keyring lists the data keys, with the number of records that are sealed with each.
func (o *Operator) Keyring(ctx context.Context) (admin.Keyring, error) {
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return admin.Keyring{}, o.notMember()
	}
	return describeKeyring(s, o.Keys.Records(ctx, s, recordsTimeout)), nil
}

// RotateKeyring makes a new sealing key. While one is pending, it returns that one instead.
func (o *Operator) RotateKeyring(ctx context.Context, by string) (admin.DataKey, error) {
	if o.Cluster.State().ClusterID == "" {
		return admin.DataKey{}, o.notMember()
	}
	k, err := o.Keys.Rotate(ctx, by)
	if err != nil {
		return admin.DataKey{}, err
	}
	return describeKey(o.Cluster.State(), k, nil), nil
}

// RewrapKeyring wraps all data keys with this node's operator key. Every node must have
// that key already.
func (o *Operator) RewrapKeyring(ctx context.Context, by string) (admin.Keyring, error) {
	if o.Cluster.State().ClusterID == "" {
		return admin.Keyring{}, o.notMember()
	}
	if err := o.Keys.Rewrap(ctx, by); err != nil {
		return admin.Keyring{}, err
	}
	return o.Keyring(ctx)
}

func describeKeyring(s *agreed.State, records datakeys.Records) admin.Keyring {
	r := admin.Keyring{Keys: []admin.DataKey{}, Nodes: []admin.KeyringNode{}}
	if op := s.OperatorKey(); op != "" {
		r.OperatorKey = &op
	}
	for _, k := range s.DataKeys {
		r.Keys = append(r.Keys, describeKey(s, k, records))
	}
	for _, name := range sortedNames(s.Nodes) {
		m := s.Nodes[name]
		r.Nodes = append(r.Nodes, admin.KeyringNode{
			Name: name, Site: m.Site, OperatorKey: nonEmpty(m.OperatorKey), OperatorKeyPrevious: nonEmpty(m.OperatorKeyPrevious),
		})
	}
	return r
}

func describeKey(s *agreed.State, k agreed.DataKey, records datakeys.Records) admin.DataKey {
	d := admin.DataKey{
		ID: k.ID, Kind: string(k.Kind), State: string(k.State()), CreatedAt: k.CreatedAt, CreatedBy: k.CreatedBy,
		Confirmed: sortedNames(k.Confirmed), Missing: s.Unconfirmed(k),
	}
	if d.Confirmed == nil {
		d.Confirmed = []string{}
	}
	if d.Missing == nil {
		d.Missing = []string{}
	}
	if !k.ActiveAt.IsZero() {
		d.ActiveAt = &k.ActiveAt
	}
	if !k.RetiredAt.IsZero() {
		d.RetiredAt = &k.RetiredAt
	}
	if k.Kind == agreed.DataKeySeal {
		d.Records = records.SealedWith(k.ID)
	}
	return d
}

func nonEmpty(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}
