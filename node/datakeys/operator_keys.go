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

// OperatorKeys are the operator keys that this node was started with.
type OperatorKeys struct {
	Current  keyring.OperatorKey
	Previous keyring.OperatorKey // zero: none
}

// LoadOperatorKeys reads the operator keys that node.yaml names. previous may be zero.
func LoadOperatorKeys(current, previous keyring.KeyRef) (OperatorKeys, error) {
	var o OperatorKeys
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

func (o OperatorKeys) byFingerprint(fingerprint string) (keyring.OperatorKey, bool) {
	for _, k := range []keyring.OperatorKey{o.Current, o.Previous} {
		if fingerprint != "" && k.Fingerprint() == fingerprint {
			return k, true
		}
	}
	return keyring.OperatorKey{}, false
}

// OpenNodeKey opens the node's key in a data directory. If only the previous operator key
// opens it, the current one then wraps it.
func (o OperatorKeys) OpenNodeKey(dir string, log *slog.Logger) (keyring.Sealer, error) {
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

// Rotate proposes a new sealing key. While one is pending, it returns that one instead.
func (ks *Keys) Rotate(ctx context.Context, by string) (agreed.DataKey, error) {
	id, err := ks.add(ctx, keyring.KindSeal, by)
	s := ks.agreed.State()
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

// Rewrap wraps all data keys with this node's operator key. Every node must have that key
// already.
func (ks *Keys) Rewrap(ctx context.Context, by string) error {
	s := ks.agreed.State()
	op := ks.operator.Current
	to := op.Fingerprint()
	if err := checkRewrap(s, ks.node, to); err != nil {
		return err
	}
	if len(s.DataKeys) > 0 && s.OperatorKey() == to {
		return nil
	}
	wrapped := map[string][]byte{}
	for _, k := range s.DataKeys {
		key, err := ks.unwrap(s.ClusterID, k)
		if err != nil {
			return err
		}
		if wrapped[k.ID], err = key.Wrap(op, s.ClusterID); err != nil {
			return err
		}
	}
	if _, err := ks.agreed.Propose(ctx, agreed.CmdDataKeyRewrap, agreed.DataKeyRewrap{OperatorKey: to, Wrapped: wrapped, By: by}); err != nil {
		return err
	}
	ks.log.Info("data keys wrapped with another operator key", "operator_key", to, "before", s.OperatorKey(), "by", by)
	return nil
}

// checkRewrap refuses a rewrap that Apply would refuse, with a better message: it tells an
// operator who asks a node with the old operator key from one who asks too early.
func checkRewrap(s *agreed.State, asked, to string) error {
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

// Unconfirmed says, in sentences for the status, why the first data keys are not in use
// yet. Until they are, no job can be accepted.
func Unconfirmed(s *agreed.State) []string {
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
			out = append(out, fmt.Sprintf("no job can be accepted: data key %s is not confirmed by %s", first.ID, strings.Join(missing, ", ")))
		}
	}
	return out
}
