package agreed

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// applyDataKey applies a command about data keys. Its rules keep all records
// readable: a key becomes active only after every member has opened it, and is
// dropped only when no member has records sealed with it.
func (s *State) applyDataKey(c Command) error {
	s.DataKeys = slices.Clone(s.DataKeys)
	var err error
	switch c.Type {
	case CmdDataKeyAdd:
		err = with(c, func(d DataKeyAdd) error { return s.addDataKey(d, c.At) })
	case CmdDataKeyConfirm:
		err = with(c, func(d DataKeyConfirm) error { return s.confirmDataKey(d, c.At) })
	case CmdDataKeyActivate:
		err = with(c, func(d DataKeyActivate) error { return s.activateDataKey(d, c.At) })
	case CmdDataKeyDrop:
		err = with(c, s.dropDataKey)
	case CmdDataKeyRewrap:
		err = with(c, s.rewrapDataKeys)
	}
	if err == nil {
		s.DataKeysVersion++
	}
	return err
}

func (s *State) addDataKey(d DataKeyAdd, at time.Time) error {
	id, err := hex.DecodeString(d.ID)
	switch {
	case err != nil || hex.EncodedLen(len(id)) != dataKeyIDSize || hex.EncodeToString(id) != d.ID:
		return fmt.Errorf("%w: %q is not a key id", ErrDataKeyRefused, d.ID)
	case len(d.Wrapped) == 0 || len(d.Wrapped) > maxWrappedKey || len(d.By) > maxDataKeyName:
		return fmt.Errorf("%w: a wrapped key of %d bytes, a creator's name of %d bytes", ErrDataKeyRefused, len(d.Wrapped), len(d.By))
	case d.OperatorKey == "" || len(d.OperatorKey) > maxDataKeyName:
		return fmt.Errorf("%w: the fingerprint of its operator key is missing or too long", ErrDataKeyRefused)
	case len(s.DataKeys) >= maxDataKeys:
		return fmt.Errorf("%w: %d data keys; a retired key is dropped when no node has records sealed with it", ErrStateFull, maxDataKeys)
	case len(s.DataKeys) > 0 && d.OperatorKey != s.OperatorKey():
		return fmt.Errorf("%w: the data keys are wrapped with operator key %s, this one with %s", ErrOperatorKey, s.OperatorKey(), d.OperatorKey)
	case s.dataKey(d.ID) >= 0:
		return fmt.Errorf("%w: %s already exists", ErrDataKeyRefused, d.ID)
	}
	switch d.Kind {
	case DataKeySeal:
		if k, pending := s.PendingDataKey(); pending {
			return fmt.Errorf("%w: %s", ErrDataKeyPending, k.ID)
		}
	case DataKeyMAC:
		if slices.ContainsFunc(s.DataKeys, func(k DataKey) bool { return k.Kind == DataKeyMAC }) {
			return fmt.Errorf("%w: the MAC key already exists and is never replaced", ErrDataKeyRefused)
		}
	default:
		return fmt.Errorf("%w: unknown kind %q", ErrDataKeyRefused, d.Kind)
	}
	s.DataKeys = append(s.DataKeys, DataKey{
		ID: d.ID, Kind: d.Kind, Wrapped: d.Wrapped, OperatorKey: d.OperatorKey, CreatedAt: at, CreatedBy: d.By,
	})
	return nil
}

func (s *State) confirmDataKey(d DataKeyConfirm, at time.Time) error {
	if _, member := s.Nodes[d.Node]; !member {
		return fmt.Errorf("%w: %s", ErrUnknownNode, d.Node)
	}
	if d.OperatorKey != s.OperatorKey() {
		return fmt.Errorf("%w: they are now wrapped with operator key %s, not with %s", ErrDataKeysChanged, s.OperatorKey(), d.OperatorKey)
	}
	found := false
	for _, id := range d.IDs {
		i := s.dataKey(id)
		if i < 0 {
			continue
		}
		found = true
		k := &s.DataKeys[i]
		if _, already := k.Confirmed[d.Node]; already {
			continue
		}
		k.Confirmed = maps.Clone(k.Confirmed)
		if k.Confirmed == nil {
			k.Confirmed = map[string]time.Time{}
		}
		k.Confirmed[d.Node] = at
	}
	if !found {
		return fmt.Errorf("%w: %s", ErrUnknownDataKey, strings.Join(d.IDs, ", "))
	}
	return nil
}

func (s *State) activateDataKey(d DataKeyActivate, at time.Time) error {
	i := s.dataKey(d.ID)
	if i < 0 {
		return fmt.Errorf("%w: %s", ErrUnknownDataKey, d.ID)
	}
	k := &s.DataKeys[i]
	if k.State() != DataKeyPending {
		return nil // an earlier command activated it
	}
	if missing := s.Unconfirmed(*k); len(missing) > 0 {
		return fmt.Errorf("%w: %s waits for %s", ErrDataKeyUnconfirmed, d.ID, strings.Join(missing, ", "))
	}
	if k.Kind == DataKeySeal {
		for j := range s.DataKeys {
			if o := &s.DataKeys[j]; o.Kind == DataKeySeal && o.State() == DataKeyActive {
				o.RetiredAt = at
			}
		}
	}
	k.ActiveAt = at
	return nil
}

func (s *State) dropDataKey(d DataKeyDrop) error {
	i := s.dataKey(d.ID)
	if i < 0 {
		return fmt.Errorf("%w: %s", ErrUnknownDataKey, d.ID)
	}
	if state := s.DataKeys[i].State(); state != DataKeyRetired {
		return fmt.Errorf("%w: %s is %s", ErrDataKeyInUse, d.ID, state)
	}
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		if !slices.Contains(d.Free, name) {
			return fmt.Errorf("%w: node %s may have records sealed with %s", ErrDataKeyInUse, name, d.ID)
		}
	}
	s.DataKeys = slices.Delete(s.DataKeys, i, i+1)
	return nil
}

func (s *State) rewrapDataKeys(d DataKeyRewrap) error {
	if len(s.DataKeys) == 0 {
		return fmt.Errorf("%w: the cluster has none yet", ErrUnknownDataKey)
	}
	if d.OperatorKey == "" || len(d.OperatorKey) > maxDataKeyName {
		return fmt.Errorf("%w: its fingerprint is missing or too long", ErrOperatorKey)
	}
	if lack := s.LackOperatorKey(d.OperatorKey); len(lack) > 0 {
		return fmt.Errorf("%w: %s", ErrOperatorKeyMissing, strings.Join(lack, ", "))
	}
	// A key that was added after the proposer read the list would stay wrapped with
	// the old operator key.
	if len(d.Wrapped) != len(s.DataKeys) {
		return fmt.Errorf("%w: the command rewraps %d keys, there are %d", ErrDataKeysChanged, len(d.Wrapped), len(s.DataKeys))
	}
	for i := range s.DataKeys {
		k := &s.DataKeys[i]
		wrapped := d.Wrapped[k.ID]
		if len(wrapped) == 0 || len(wrapped) > maxWrappedKey {
			return fmt.Errorf("%w: the command does not rewrap %s", ErrDataKeysChanged, k.ID)
		}
		// Every node has to confirm again that it can open the key as wrapped now.
		k.Wrapped, k.OperatorKey, k.Confirmed = wrapped, d.OperatorKey, nil
	}
	return nil
}

// forgetConfirmations removes a removed node's confirmations: a later node with
// the same name has confirmed nothing.
func (s *State) forgetConfirmations(node string) {
	s.DataKeys = slices.Clone(s.DataKeys)
	for i := range s.DataKeys {
		k := &s.DataKeys[i]
		if _, confirmed := k.Confirmed[node]; confirmed {
			k.Confirmed = maps.Clone(k.Confirmed)
			delete(k.Confirmed, node)
		}
	}
}
