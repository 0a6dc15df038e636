package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/storage/keyring"
)

// This file is what operators have to do with keys: admin.Keyrings, and the
// operator key at start.

// loadOperatorKeys reads the one or two keys that node.yaml names.
func loadOperatorKeys(c *Config) (operatorKeys, error) {
	var o operatorKeys
	var err error
	if o.current, err = keyring.LoadOperatorKey(keyring.KeyRef(c.OperatorKey)); err != nil {
		return o, err
	}
	if !c.OperatorKeyPrevious.IsZero() {
		if o.previous, err = keyring.LoadOperatorKey(keyring.KeyRef(c.OperatorKeyPrevious)); err != nil {
			return o, fmt.Errorf("operator_key_previous: %w", err)
		}
	}
	return o, nil
}

// openNodeKey opens node.key, and wraps it with the present operator key when
// only the one before it opens it.
func (o operatorKeys) openNodeKey(dir string, log *slog.Logger) (keyring.Sealer, error) {
	sealer, err := keyring.OpenNodeKey(dir, o.current)
	if !errors.Is(err, keyring.ErrWrongOperatorKey) || o.previous == (keyring.OperatorKey{}) {
		return sealer, err
	}
	if err := keyring.RewrapNodeKey(dir, o.previous, o.current); err != nil {
		return nil, fmt.Errorf("neither operator_key nor operator_key_previous opens it: %w", err)
	}
	log.Info("node key wrapped with the new operator key", "operator_key", o.current.Fingerprint(), "before", o.previous.Fingerprint())
	return keyring.OpenNodeKey(dir, o.current)
}

// keepKeys runs this node's part in the data keys.
func (n *Node) keepKeys(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.keys.follow(ctx) })
	g.Go(func() error { return n.keys.reseal(ctx) })
	g.Go(func() error { return n.cluster.WhileLeader(ctx, n.keys.tend) })
	return g.Wait()
}

// askedWithin is how long a question about keys waits for the other nodes.
const askedWithin = 2 * time.Second

// Keyring lists the data keys, with what every node carries of them.
func (n *Node) Keyring(ctx context.Context) (admin.Keyring, error) {
	s := n.cluster.State()
	if s.ClusterID == "" {
		return admin.Keyring{}, n.notMember()
	}
	return describeKeyring(s, n.keys.ask(ctx, s, askedWithin)), nil
}

// describeKeyring puts the agreed keys into an operator's terms.
func describeKeyring(s *agreed.State, all map[string]carried) admin.Keyring {
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

func describeKey(s *agreed.State, k agreed.DataKey, all map[string]carried) admin.DataKey {
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
		d.Records = carriedBy(all, k.ID)
	}
	return d
}

// unsealed says, for the status, what keeps the first data keys out of use:
// until then nothing can be kept on disk for clients.
func unsealed(s *agreed.State) []string {
	var out []string
	for _, kind := range []agreed.DataKeyKind{agreed.DataKeySeal, agreed.DataKeyMAC} {
		var first agreed.DataKey
		used := false
		for _, k := range s.DataKeys {
			switch {
			case k.Kind != kind:
			case k.State() != agreed.DataKeyPending:
				used = true
			default:
				first = k
			}
		}
		if missing := s.Unconfirmed(first); !used && first.ID != "" && len(missing) > 0 {
			out = append(out, fmt.Sprintf("no job can be taken: data key %s is not confirmed by %s", first.ID, strings.Join(missing, ", ")))
		}
	}
	return out
}

func nonEmpty(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}

// RotateKeyring makes a new sealing key, or gives the one that waits to be
// confirmed already.
func (n *Node) RotateKeyring(ctx context.Context, by string) (admin.DataKey, error) {
	if n.cluster.State().ClusterID == "" {
		return admin.DataKey{}, n.notMember()
	}
	return n.keys.rotate(ctx, by)
}

func (d *dataKeys) rotate(ctx context.Context, by string) (admin.DataKey, error) {
	id, err := d.add(ctx, keyring.KindSeal, by)
	s := d.agreed.State()
	if errors.Is(err, agreed.ErrDataKeyPending) {
		if k, pending := s.PendingDataKey(); pending {
			return describeKey(s, k, nil), nil
		}
	}
	if err != nil {
		return admin.DataKey{}, err
	}
	k, known := s.DataKey(id)
	if !known {
		return admin.DataKey{}, fmt.Errorf("%w: %s", agreed.ErrUnknownDataKey, id)
	}
	return describeKey(s, k, nil), nil
}

// RewrapKeyring wraps all data keys with the operator key that every node has by
// now.
func (n *Node) RewrapKeyring(ctx context.Context, by string) (admin.Keyring, error) {
	if n.cluster.State().ClusterID == "" {
		return admin.Keyring{}, n.notMember()
	}
	if err := n.keys.rewrap(ctx, by); err != nil {
		return admin.Keyring{}, err
	}
	return n.Keyring(ctx)
}

func (d *dataKeys) rewrap(ctx context.Context, by string) error {
	s := d.agreed.State()
	op := d.operator.current
	to := op.Fingerprint()
	if err := mayRewrap(s, d.node, to); err != nil {
		return err
	}
	if len(s.DataKeys) > 0 && s.OperatorKey() == to {
		return nil // it has happened
	}
	wrapped := map[string][]byte{}
	for _, k := range s.DataKeys {
		key, err := d.open(s.ClusterID, k)
		if err != nil {
			return err
		}
		if wrapped[k.ID], err = key.Wrap(op, s.ClusterID); err != nil {
			return err
		}
	}
	if _, err := d.agreed.Propose(ctx, agreed.CmdDataKeyRewrap, agreed.DataKeyRewrap{OperatorKey: to, Wrapped: wrapped, By: by}); err != nil {
		return err
	}
	d.log.Info("data keys wrapped with another operator key", "operator_key", to, "before", s.OperatorKey(), "by", by)
	return nil
}

// mayRewrap refuses in words what Apply would refuse, and a question to a node
// that is not the right one.
func mayRewrap(s *agreed.State, asked, to string) error {
	lack := s.LackOperatorKey(to)
	if len(lack) == 0 {
		return nil
	}
	if to == s.OperatorKey() {
		return fmt.Errorf("%w: node %s was started with the present one, %s, while others have another already (%s)",
			agreed.ErrOperatorKeyMissing, asked, to, strings.Join(lack, ", "))
	}
	return fmt.Errorf("%w: %s, which node %s has, is not that of %s", agreed.ErrOperatorKeyMissing, to, asked, strings.Join(lack, ", "))
}
