package datakeys

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/dsnode/dsnode/storage/keyring"
)

// Carrier holds records that are sealed with data keys.
type Carrier interface {
	// Carries counts the records by the data key that they are sealed with. Keys
	// that none is sealed with may be absent. While a key is to go it is asked
	// every few seconds.
	Carries(ctx context.Context) (map[keyring.KeyID]int64, error)
	// Reseal seals some of the records that are sealed with a key anew, with the
	// ring's current one, and says how many are left. It is called again until
	// none is; how much it does at a time, and how fast, is its own choice.
	Reseal(ctx context.Context, from keyring.KeyID) (left int64, err error)
}

type carrier struct {
	name string
	Carrier
}

// carry makes a store known; before the loops run.
func (d *Keys) Carry(name string, c Carrier) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.carriers = append(d.carriers, carrier{name, c})
}

// count is how many records here are sealed with each key.
func (d *Keys) count(ctx context.Context) (map[keyring.KeyID]int64, error) {
	d.mu.Lock()
	carriers := slices.Clone(d.carriers)
	d.mu.Unlock()
	sum := map[keyring.KeyID]int64{}
	for _, c := range carriers {
		counts, err := c.Carries(ctx)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		for id, n := range counts {
			sum[id] += n
		}
	}
	return sum, nil
}

// carried is count as peers are told.
func (d *Keys) Carried(ctx context.Context) (map[string]int64, error) {
	counts, err := d.count(ctx)
	if err != nil {
		return nil, err
	}
	named := make(map[string]int64, len(counts))
	for id, n := range counts {
		named[id.String()] = n
	}
	return named, nil
}

// leaving are the keys that open records here and must not for long: the
// sealing keys other than the current one, unless they wait to become it.
func (d *Keys) leaving() (retired, given []keyring.KeyID) {
	s := d.agreed.State()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.kept.Current.IsZero() {
		return nil, nil
	}
	for _, k := range d.kept.Keys {
		if k.Kind() != keyring.KindSeal || k.ID() == d.kept.Current {
			continue
		}
		agreed, there := s.DataKey(k.ID().String())
		switch {
		case !there:
			given = append(given, k.ID())
		case !agreed.RetiredAt.IsZero():
			retired = append(retired, k.ID())
		}
	}
	return retired, given
}

// reseal seals what retired keys have sealed anew, in the background, until ctx
// ends.
func (d *Keys) reseal(ctx context.Context) error {
	said := ""
	for {
		// The ring follows what is agreed a moment later, so both count.
		changed, shown := d.agreed.Changed(), d.Ring.Changed()
		retired, given := d.leaving()
		if len(retired)+len(given) == 0 {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			case <-shown:
			}
			continue
		}
		more, err := d.resealSome(ctx, slices.Concat(given, retired))
		if ctx.Err() != nil {
			return nil
		}
		if err == nil && !more {
			err = d.shed(ctx, given)
		}
		words := ""
		if err != nil {
			words = err.Error()
		}
		if words != said && words != "" {
			d.log.Warn("records are not sealed anew yet; it is tried again", "err", err)
		}
		if said = words; err == nil && more {
			continue
		}
		if !wait(ctx, changed, d.Every) {
			return nil
		}
	}
}

// resealSome asks each store once for each key that it carries; more says
// whether to go on at once.
func (d *Keys) resealSome(ctx context.Context, leaving []keyring.KeyID) (more bool, err error) {
	d.mu.Lock()
	carriers := slices.Clone(d.carriers)
	d.mu.Unlock()
	for _, c := range carriers {
		counts, err := c.Carries(ctx)
		if err != nil {
			return false, fmt.Errorf("%s: %w", c.name, err)
		}
		for _, id := range leaving {
			before := counts[id]
			if before == 0 {
				continue
			}
			left, err := c.Reseal(ctx, id)
			if err != nil {
				return false, fmt.Errorf("%s: %d records sealed with %s: %w", c.name, before, id, err)
			}
			if left == 0 {
				d.log.Info("records sealed anew", "store", c.name, "records", before, "key", id.String())
			}
			// A store that makes no progress is asked again later, not at once.
			more = more || left > 0 && left < before
		}
	}
	return more, nil
}

// shed lets go of the keys that the cluster has given up and nothing here needs
// any more.
func (d *Keys) shed(ctx context.Context, given []keyring.KeyID) error {
	if len(given) == 0 {
		return nil
	}
	counts, err := d.count(ctx)
	if err != nil {
		return err
	}
	s := d.agreed.State()
	d.mu.Lock()
	defer d.mu.Unlock()
	next := d.kept
	next.Keys = slices.DeleteFunc(slices.Clone(d.kept.Keys), func(k keyring.DataKey) bool {
		_, agreed := s.DataKey(k.ID().String())
		return !agreed && counts[k.ID()] == 0 && slices.Contains(given, k.ID())
	})
	if len(next.Keys) == len(d.kept.Keys) {
		left := maps.Clone(counts)
		maps.DeleteFunc(left, func(id keyring.KeyID, _ int64) bool { return !slices.Contains(given, id) })
		return fmt.Errorf("the cluster has dropped data keys that records here are sealed with: %v", left)
	}
	return d.show(next, d.adopted)
}
