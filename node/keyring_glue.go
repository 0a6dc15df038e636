package node

import (
	"context"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/datakeys"
)

// askedWithin is how long a question about keys waits for the other nodes.
const askedWithin = 2 * time.Second

// Keyring lists the data keys, with what every node carries of them.
func (n *Node) Keyring(ctx context.Context) (admin.Keyring, error) {
	s := n.cluster.State()
	if s.ClusterID == "" {
		return admin.Keyring{}, n.notMember()
	}
	return describeKeyring(s, n.keys.Ask(ctx, s, askedWithin)), nil
}

// RotateKeyring makes a new sealing key, or gives the one that waits to be
// confirmed already.
func (n *Node) RotateKeyring(ctx context.Context, by string) (admin.DataKey, error) {
	if n.cluster.State().ClusterID == "" {
		return admin.DataKey{}, n.notMember()
	}
	k, err := n.keys.Rotate(ctx, by)
	if err != nil {
		return admin.DataKey{}, err
	}
	return describeKey(n.cluster.State(), k, nil), nil
}

// RewrapKeyring wraps all data keys with the operator key that every node has by
// now.
func (n *Node) RewrapKeyring(ctx context.Context, by string) (admin.Keyring, error) {
	if n.cluster.State().ClusterID == "" {
		return admin.Keyring{}, n.notMember()
	}
	if err := n.keys.Rewrap(ctx, by); err != nil {
		return admin.Keyring{}, err
	}
	return n.Keyring(ctx)
}

// describeKeyring puts the agreed keys into an operator's terms.
func describeKeyring(s *agreed.State, all map[string]datakeys.Carried) admin.Keyring {
	r := admin.Keyring{Keys: []admin.DataKey{}, Nodes: []admin.KeyringNode{}}
	if op := s.OperatorKey(); op != "" {
		r.OperatorKey = &op
	}
	for _, k := range s.DataKeys {
		r.Keys = append(r.Keys, describeKey(s, k, all))
	}
	for _, name := range sortedNames(s.Nodes) {
		m := s.Nodes[name]
		r.Nodes = append(r.Nodes, admin.KeyringNode{
			Name: name, Site: m.Site, OperatorKey: nonEmpty(m.OperatorKey), OperatorKeyPrevious: nonEmpty(m.OperatorKeyPrevious),
		})
	}
	return r
}

func describeKey(s *agreed.State, k agreed.DataKey, all map[string]datakeys.Carried) admin.DataKey {
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
		d.Records = datakeys.RecordsSealedWith(all, k.ID)
	}
	return d
}

func nonEmpty(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}
