package datakeys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/keyring"
)

// step is what the Raft leader does next about the data keys. One of its fields is set.
type step struct {
	add      agreed.DataKeyKind // add a key of this kind
	activate string             // activate the key with this id
}

// nextStep decides from the agreed state alone. False: there is nothing to do.
func nextStep(s *agreed.State) (step, bool) {
	if s.ClusterID == "" {
		return step{}, false
	}
	for _, kind := range []agreed.DataKeyKind{agreed.DataKeyMAC, agreed.DataKeySeal} {
		if !slices.ContainsFunc(s.DataKeys, func(k agreed.DataKey) bool { return k.Kind == kind }) {
			return step{add: kind}, true
		}
	}
	for _, k := range s.DataKeys {
		if k.State() == agreed.DataKeyPending && len(s.Unconfirmed(k)) == 0 {
			return step{activate: k.ID}, true
		}
	}
	return step{}, false
}

// lead takes the leader's steps until the leadership ends, and ctx with it.
func (ks *Keys) lead(ctx context.Context, _ cluster.Leadership) error {
	unused := newUnusedKeys()
	counted := time.Duration(0)
	for {
		changed := ks.agreed.Changed()
		s := ks.agreed.State()
		retry := time.Duration(0)
		if next, ok := nextStep(s); ok {
			if err := ks.take(ctx, next); err != nil && ctx.Err() == nil {
				ks.log.Warn("can't add or activate a data key, trying again", "add", next.add, "activate", next.activate, "err", err)
				retry = retryPause
			}
		}
		if retired := retiredKeys(s); len(retired) > 0 {
			if now := ks.boottime(); counted == 0 || now-counted >= ks.PollInterval {
				counted = now
				ks.drop(ctx, unused, retired, ks.Records(ctx, s, ks.PollInterval))
			}
			retry = ks.PollInterval
		}
		if !wait(ctx, changed, retry) {
			return nil
		}
	}
}

func (ks *Keys) take(ctx context.Context, next step) error {
	if next.add != "" {
		_, err := ks.add(ctx, keyring.Kind(next.add), "dsnode")
		return err
	}
	_, err := ks.agreed.Propose(ctx, agreed.CmdDataKeyActivate, agreed.DataKeyActivate{ID: next.activate})
	if err == nil {
		ks.log.Info("every node has confirmed the data key: it is in use", "key", next.activate)
	}
	return err
}

// add proposes a new key, wrapped with the operator key that wraps all others.
func (ks *Keys) add(ctx context.Context, kind keyring.Kind, by string) (id string, err error) {
	s := ks.agreed.State()
	op := ks.operator.Current
	if len(s.DataKeys) > 0 {
		var ok bool
		if op, ok = ks.operator.byFingerprint(s.OperatorKey()); !ok {
			return "", fmt.Errorf("%w: the data keys are wrapped with operator key %s, node %s was started with %s",
				agreed.ErrOperatorKey, s.OperatorKey(), ks.node, ks.operator.Current.Fingerprint())
		}
	}
	k := keyring.NewDataKey(kind)
	wrapped, err := k.Wrap(op, s.ClusterID)
	if err != nil {
		return "", err
	}
	_, err = ks.agreed.Propose(ctx, agreed.CmdDataKeyAdd, agreed.DataKeyAdd{
		ID: k.ID().String(), Kind: agreed.DataKeyKind(kind), Wrapped: wrapped, OperatorKey: op.Fingerprint(), By: by,
	})
	if err != nil {
		return "", err
	}
	ks.log.Info("data key added", "key", k.ID().String(), "kind", kind, "by", by)
	return k.ID().String(), nil
}

func retiredKeys(s *agreed.State) []string {
	var ids []string
	for _, k := range s.DataKeys {
		if k.State() == agreed.DataKeyRetired {
			ids = append(ids, k.ID)
		}
	}
	return ids
}

// drop proposes to drop the retired keys that have been unused for all of DropGrace.
func (ks *Keys) drop(ctx context.Context, unused *unusedKeys, retired []string, records Records) {
	for _, id := range unused.update(retired, records, ks.boottime(), ks.DropGrace) {
		_, err := ks.agreed.Propose(ctx, agreed.CmdDataKeyDrop, agreed.DataKeyDrop{ID: id, Free: unused.members})
		switch {
		case err == nil:
			ks.log.Info("data key dropped: no record of any node is sealed with it", "key", id)
		case ctx.Err() == nil && !errors.Is(err, agreed.ErrUnknownDataKey):
			ks.log.Warn("can't drop a data key", "key", id, "err", err)
		}
	}
}
