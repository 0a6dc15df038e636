package datakeys

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/dsnode/dsnode/storage/keyring"
)

// Store holds records that are sealed with data keys.
type Store interface {
	// Count returns the number of records by the data key that they are sealed with.
	// Keys without records may be absent. While a key is retired, Count is called every
	// Keys.PollInterval.
	Count(ctx context.Context) (map[keyring.KeyID]int64, error)
	// Reseal seals some of the records of a key again, with the ring's current key, and
	// returns how many are left. It is called again until none is left. The store
	// decides how many records it takes at a time, and how fast.
	Reseal(ctx context.Context, from keyring.KeyID) (left int64, err error)
}

type namedStore struct {
	name string
	Store
}

// AddStore registers a store of this node. It must be called before Run.
func (ks *Keys) AddStore(name string, s Store) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	ks.stores = append(ks.stores, namedStore{name, s})
}

func (ks *Keys) allStores() []namedStore {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	return slices.Clone(ks.stores)
}

// count returns how many records of this node are sealed with each key.
func (ks *Keys) count(ctx context.Context) (map[keyring.KeyID]int64, error) {
	sum := map[keyring.KeyID]int64{}
	for _, store := range ks.allStores() {
		counts, err := store.Count(ctx)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", store.name, err)
		}
		for id, n := range counts {
			sum[id] += n
		}
	}
	return sum, nil
}

// CountRecords returns what this node reports to others: how many of its records are
// sealed with each key, by the id of the key.
func (ks *Keys) CountRecords(ctx context.Context) (map[string]int64, error) {
	counts, err := ks.count(ctx)
	if err != nil {
		return nil, err
	}
	named := make(map[string]int64, len(counts))
	for id, n := range counts {
		named[id.String()] = n
	}
	return named, nil
}

// obsolete returns the sealing keys whose records must be sealed again: those that the
// cluster has retired, and those that it has dropped although this node kept them.
func (ks *Keys) obsolete() (retired, dropped []keyring.KeyID) {
	s := ks.agreed.State()
	ks.mu.Lock()
	defer ks.mu.Unlock()
	if ks.kept.Current.IsZero() {
		return nil, nil
	}
	for _, k := range ks.kept.Keys {
		if k.Kind() != keyring.KindSeal || k.ID() == ks.kept.Current {
			continue
		}
		agreed, known := s.DataKey(k.ID().String())
		switch {
		case !known:
			dropped = append(dropped, k.ID())
		case !agreed.RetiredAt.IsZero():
			retired = append(retired, k.ID())
		}
	}
	return retired, dropped
}

// reseal seals the records of obsolete keys again, in the background, until ctx ends.
func (ks *Keys) reseal(ctx context.Context) error {
	logged := ""
	for {
		// The ring follows the agreed state with a delay, so a change of either counts.
		changed, ringChanged := ks.agreed.Changed(), ks.Ring.Changed()
		retired, dropped := ks.obsolete()
		if len(retired)+len(dropped) == 0 {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			case <-ringChanged:
			}
			continue
		}
		more, err := ks.resealSome(ctx, slices.Concat(dropped, retired))
		if ctx.Err() != nil {
			return nil
		}
		if err == nil && !more {
			err = ks.forgetDropped(ctx, dropped)
		}
		problem := ""
		if err != nil {
			problem = err.Error()
		}
		if problem != logged && problem != "" {
			ks.log.Warn("can't re-seal records yet, trying again", "err", err)
		}
		if logged = problem; err == nil && more {
			continue
		}
		if !wait(ctx, changed, ks.PollInterval) {
			return nil
		}
	}
}

// resealSome calls each store once for each obsolete key that it has records of. more
// says whether to go on without a pause.
func (ks *Keys) resealSome(ctx context.Context, obsolete []keyring.KeyID) (more bool, err error) {
	for _, store := range ks.allStores() {
		counts, err := store.Count(ctx)
		if err != nil {
			return false, fmt.Errorf("%s: %w", store.name, err)
		}
		for _, id := range obsolete {
			before := counts[id]
			if before == 0 {
				continue
			}
			left, err := store.Reseal(ctx, id)
			if err != nil {
				return false, fmt.Errorf("%s: %d records sealed with %s: %w", store.name, before, id, err)
			}
			if left == 0 {
				ks.log.Info("records re-sealed", "store", store.name, "records", before, "key", id.String())
			}
			// A store that makes no progress is called again after a pause.
			more = more || left > 0 && left < before
		}
	}
	return more, nil
}

// forgetDropped removes the keys from the ring that the cluster has dropped and no record
// of this node needs.
func (ks *Keys) forgetDropped(ctx context.Context, dropped []keyring.KeyID) error {
	if len(dropped) == 0 {
		return nil
	}
	counts, err := ks.count(ctx)
	if err != nil {
		return err
	}
	s := ks.agreed.State()
	ks.mu.Lock()
	defer ks.mu.Unlock()
	next := ks.kept
	next.Keys = slices.DeleteFunc(slices.Clone(ks.kept.Keys), func(k keyring.DataKey) bool {
		_, agreed := s.DataKey(k.ID().String())
		return !agreed && counts[k.ID()] == 0 && slices.Contains(dropped, k.ID())
	})
	if len(next.Keys) == len(ks.kept.Keys) {
		left := maps.Clone(counts)
		maps.DeleteFunc(left, func(id keyring.KeyID, _ int64) bool { return !slices.Contains(dropped, id) })
		return fmt.Errorf("the cluster has dropped data keys that records here are sealed with: %v", left)
	}
	return ks.setRing(next, ks.version)
}
