package datakeys

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/storage/keyring"
)

// keyStep is something about the data keys that the raft leader does by itself.
type keyStep struct {
	add      agreed.DataKeyKind // make a key of this kind
	activate string             // put this key to use
}

// nextKeyStep decides, from the agreed state alone, what is to be done; false
// when nothing is.
func nextKeyStep(s *agreed.State) (keyStep, bool) {
	if s.ClusterID == "" {
		return keyStep{}, false
	}
	for _, kind := range []agreed.DataKeyKind{agreed.DataKeyMAC, agreed.DataKeySeal} {
		if !slices.ContainsFunc(s.DataKeys, func(k agreed.DataKey) bool { return k.Kind == kind }) {
			return keyStep{add: kind}, true
		}
	}
	for _, k := range s.DataKeys {
		if k.State() == agreed.DataKeyPending && len(s.Unconfirmed(k)) == 0 {
			return keyStep{activate: k.ID}, true
		}
	}
	return keyStep{}, false
}

// tend takes the leader's steps until ctx ends, which is when leadership does.
func (d *Keys) tend(ctx context.Context, _ cluster.Leadership) error {
	free := freeKeys{since: map[string]time.Duration{}}
	looked := time.Duration(0)
	for {
		changed := d.agreed.Changed()
		s := d.agreed.State()
		again := time.Duration(0)
		if step, ok := nextKeyStep(s); ok {
			if err := d.take(ctx, step); err != nil && ctx.Err() == nil {
				d.log.Warn("a step with the data keys failed; it is tried again", "add", step.add, "activate", step.activate, "err", err)
				again = retryEvery
			}
		}
		if retired := retiredKeys(s); len(retired) > 0 {
			if now := clock.Boottime(); looked == 0 || now-looked >= d.Every {
				looked = now
				d.drop(ctx, &free, retired, d.Ask(ctx, s, d.Every))
			}
			again = d.Every
		}
		if !wait(ctx, changed, again) {
			return nil
		}
	}
}

func (d *Keys) take(ctx context.Context, step keyStep) error {
	if step.add != "" {
		_, err := d.add(ctx, keyring.Kind(step.add), "dsnode")
		return err
	}
	_, err := d.agreed.Propose(ctx, agreed.CmdDataKeyActivate, agreed.DataKeyActivate{ID: step.activate})
	if err == nil {
		d.log.Info("every node has confirmed the data key: it is in use", "key", step.activate)
	}
	return err
}

// add proposes a new key, wrapped with the operator key that all the others are
// wrapped with.
func (d *Keys) add(ctx context.Context, kind keyring.Kind, by string) (id string, err error) {
	s := d.agreed.State()
	op := d.operator.Current
	if len(s.DataKeys) > 0 {
		var ok bool
		if op, ok = d.operator.named(s.OperatorKey()); !ok {
			return "", fmt.Errorf("%w: the data keys are wrapped with operator key %s, node %s was started with %s",
				agreed.ErrOperatorKey, s.OperatorKey(), d.node, d.operator.Current.Fingerprint())
		}
	}
	k := keyring.NewDataKey(kind)
	wrapped, err := k.Wrap(op, s.ClusterID)
	if err != nil {
		return "", err
	}
	_, err = d.agreed.Propose(ctx, agreed.CmdDataKeyAdd, agreed.DataKeyAdd{
		ID: k.ID().String(), Kind: agreed.DataKeyKind(kind), Wrapped: wrapped, OperatorKey: op.Fingerprint(), By: by,
	})
	if err != nil {
		return "", err
	}
	d.log.Info("data key made", "key", k.ID().String(), "kind", kind, "by", by)
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

// carried is what one node said of the keys that its records are sealed with.
type Carried struct {
	counts map[string]int64
	err    error // then it is not known
}

// ask asks every member at once what it carries.
func (d *Keys) Ask(ctx context.Context, s *agreed.State, atMost time.Duration) map[string]Carried {
	ctx, cancel := context.WithTimeout(ctx, max(atMost, retryEvery))
	defer cancel()
	var (
		mu  sync.Mutex // guards all
		all = make(map[string]Carried, len(s.Nodes))
		wg  sync.WaitGroup
	)
	for name := range s.Nodes {
		wg.Go(func() {
			counts, err := d.agreed.Carried(ctx, name)
			mu.Lock()
			defer mu.Unlock()
			all[name] = Carried{counts: counts, err: err}
		})
	}
	wg.Wait()
	return all
}

// carriers sums what is sealed with a key; nil when some node did not say.
func RecordsSealedWith(all map[string]Carried, key string) *int64 {
	sum := int64(0)
	for _, c := range all {
		if c.err != nil {
			return nil
		}
		sum += c.counts[key]
	}
	return &sum
}

// freeKeys remembers since when, on cluster.Boottime, every member says that it
// carries nothing of a retired key.
type freeKeys struct {
	members []string
	since   map[string]time.Duration
}

// judge gives the keys that nobody has carried for all of grace. One round of
// answers is not enough: a record can be under way from a node that was asked
// late to one that was asked early.
func (f *freeKeys) judge(retired []string, all map[string]Carried, now, grace time.Duration) []string {
	members := slices.Sorted(maps.Keys(all))
	if !slices.Equal(members, f.members) {
		f.members, f.since = members, map[string]time.Duration{}
	}
	maps.DeleteFunc(f.since, func(id string, _ time.Duration) bool { return !slices.Contains(retired, id) })
	var free []string
	for _, id := range retired {
		n := RecordsSealedWith(all, id)
		if n == nil || *n > 0 {
			delete(f.since, id)
			continue
		}
		since, already := f.since[id]
		if !already {
			f.since[id] = now
			continue
		}
		if now-since >= grace {
			free = append(free, id)
		}
	}
	return free
}

func (d *Keys) drop(ctx context.Context, f *freeKeys, retired []string, all map[string]Carried) {
	for _, id := range f.judge(retired, all, clock.Boottime(), d.Grace) {
		_, err := d.agreed.Propose(ctx, agreed.CmdDataKeyDrop, agreed.DataKeyDrop{ID: id, Free: f.members})
		switch {
		case err == nil:
			d.log.Info("data key dropped: no node carries a record sealed with it", "key", id)
		case ctx.Err() == nil && !errors.Is(err, agreed.ErrUnknownDataKey):
			d.log.Warn("data key not dropped", "key", id, "err", err)
		}
	}
}
