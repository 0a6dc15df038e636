package agreed

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// applyDataKey carries out a command about data keys. These rules are what
// keeps records readable: nothing is sealed with a key before every member has
// opened it, and no key goes while a member may carry something sealed with it.
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
		return fmt.Errorf("%w: %q is no id", ErrDataKeyRefused, d.ID)
	case len(d.Wrapped) == 0 || len(d.Wrapped) > maxWrappedKey || len(d.By) > maxDataKeyName:
		return fmt.Errorf("%w: %d bytes, made by %d bytes", ErrDataKeyRefused, len(d.Wrapped), len(d.By))
	case d.OperatorKey == "" || len(d.OperatorKey) > maxDataKeyName:
		return fmt.Errorf("%w: it does not say which operator key wraps it", ErrDataKeyRefused)
	case len(s.DataKeys) >= maxDataKeys:
		return fmt.Errorf("%w: %d data keys; retired ones go when no node carries records sealed with them", ErrStateFull, maxDataKeys)
	case len(s.DataKeys) > 0 && d.OperatorKey != s.OperatorKey():
		return fmt.Errorf("%w: the data keys are wrapped with operator key %s, this one with %s", ErrOperatorKey, s.OperatorKey(), d.OperatorKey)
	case s.dataKey(d.ID) >= 0:
		return fmt.Errorf("%w: %s is there already", ErrDataKeyRefused, d.ID)
	}
	switch d.Kind {
	case DataKeySeal:
		if k, pending := s.PendingDataKey(); pending {
			return fmt.Errorf("%w: %s", ErrDataKeyPending, k.ID)
		}
	case DataKeyMAC:
		if slices.ContainsFunc(s.DataKeys, func(k DataKey) bool { return k.Kind == DataKeyMAC }) {
			return fmt.Errorf("%w: there is one MAC key for ever", ErrDataKeyRefused)
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
		return fmt.Errorf("%w: they are wrapped with operator key %s by now, not with %s", ErrDataKeysChanged, s.OperatorKey(), d.OperatorKey)
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
		return nil // another leader was faster
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
			return fmt.Errorf("%w: node %s has not said that nothing there is sealed with %s", ErrDataKeyInUse, name, d.ID)
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
		return fmt.Errorf("%w: no operator key is named", ErrOperatorKey)
	}
	if lack := s.LackOperatorKey(d.OperatorKey); len(lack) > 0 {
		return fmt.Errorf("%w: %s", ErrOperatorKeyMissing, strings.Join(lack, ", "))
	}
	// A key that came or went since the proposer looked would be left under the
	// old operator key.
	if len(d.Wrapped) != len(s.DataKeys) {
		return fmt.Errorf("%w: %d of %d are wrapped anew", ErrDataKeysChanged, len(d.Wrapped), len(s.DataKeys))
	}
	for i := range s.DataKeys {
		k := &s.DataKeys[i]
		wrapped := d.Wrapped[k.ID]
		if len(wrapped) == 0 || len(wrapped) > maxWrappedKey {
			return fmt.Errorf("%w: %s is not wrapped anew", ErrDataKeysChanged, k.ID)
		}
		// Every node says anew that it opened the key, as it is wrapped now.
		k.Wrapped, k.OperatorKey, k.Confirmed = wrapped, d.OperatorKey, nil
	}
	return nil
}

// forgetConfirmations is part of a node's removal: should another node take its
// name, that one has confirmed nothing.
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
