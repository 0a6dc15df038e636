package datakeys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/keyring"
)

// loadOperatorKeys reads the operator keys that node.yaml names. The previous one
// is optional: its zero value names none.
func LoadOperator(current, previous keyring.KeyRef) (Operator, error) {
	var o Operator
	var err error
	if o.Current, err = keyring.LoadOperatorKey(current); err != nil {
		return o, err
	}
	if previous != (keyring.KeyRef{}) {
		if o.Previous, err = keyring.LoadOperatorKey(previous); err != nil {
			return o, fmt.Errorf("operator_key_previous: %w", err)
		}
	}
	return o, nil
}

// openNodeKey opens node.key, and wraps it with the present operator key when
// only the one before it opens it.
func (o Operator) OpenNodeKey(dir string, log *slog.Logger) (keyring.Sealer, error) {
	sealer, err := keyring.OpenNodeKey(dir, o.Current)
	if !errors.Is(err, keyring.ErrWrongOperatorKey) || o.Previous == (keyring.OperatorKey{}) {
		return sealer, err
	}
	if err := keyring.RewrapNodeKey(dir, o.Previous, o.Current); err != nil {
		return nil, fmt.Errorf("neither operator_key nor operator_key_previous opens it: %w", err)
	}
	log.Info("node key wrapped with the new operator key", "operator_key", o.Current.Fingerprint(), "before", o.Previous.Fingerprint())
	return keyring.OpenNodeKey(dir, o.Current)
}

// rotate proposes a new sealing key. It returns the pending one when there is one
// already.
func (d *Keys) Rotate(ctx context.Context, by string) (agreed.DataKey, error) {
	id, err := d.add(ctx, keyring.KindSeal, by)
	s := d.agreed.State()
	if errors.Is(err, agreed.ErrDataKeyPending) {
		if k, pending := s.PendingDataKey(); pending {
			return k, nil
		}
	}
	if err != nil {
		return agreed.DataKey{}, err
	}
	k, known := s.DataKey(id)
	if !known {
		return agreed.DataKey{}, fmt.Errorf("%w: %s", agreed.ErrUnknownDataKey, id)
	}
	return k, nil
}

// rewrap wraps all data keys with this node's operator key, which every node must
// have by now.

func (d *Keys) Rewrap(ctx context.Context, by string) error {
	s := d.agreed.State()
	op := d.operator.Current
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

// unconfirmed lists, in sentences for the status, why the first data keys are not in
// use yet. Until they are, no job can be accepted.
func NotInUse(s *agreed.State) []string {
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
