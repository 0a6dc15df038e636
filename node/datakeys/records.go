package datakeys

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// Records says, for each node that was asked, which data keys its records are sealed
// with.
type Records map[string]nodeRecords

type nodeRecords struct {
	counts map[string]int64 // by the id of the key
	err    error            // the node did not answer
}

// Records asks all members at once. timeout bounds the wait; it is at least a second.
func (ks *Keys) Records(ctx context.Context, s *agreed.State, timeout time.Duration) Records {
	ctx, cancel := context.WithTimeout(ctx, max(timeout, time.Second))
	defer cancel()
	var (
		mu  sync.Mutex // guards all
		all = make(Records, len(s.Nodes))
		wg  sync.WaitGroup
	)
	for name := range s.Nodes {
		wg.Go(func() {
			counts, err := ks.agreed.Carried(ctx, name)
			mu.Lock()
			defer mu.Unlock()
			all[name] = nodeRecords{counts: counts, err: err}
		})
	}
	wg.Wait()
	return all
}

// SealedWith returns the number of records that are sealed with a key; nil when some
// node did not answer.
func (r Records) SealedWith(key string) *int64 {
	sum := int64(0)
	for _, n := range r {
		if n.err != nil {
			return nil
		}
		sum += n.counts[key]
	}
	return &sum
}

// unusedKeys remembers since when no member has reported a record of a retired key.
type unusedKeys struct {
	members []string
	since   map[string]time.Duration // on Options.Boottime
}

func newUnusedKeys() *unusedKeys { return &unusedKeys{since: map[string]time.Duration{}} }

// update returns the keys that have been unused for all of grace. One round of answers is
// not enough: a record can be under way from a node that was asked late to a node that
// was asked early. When the members change, the time starts again.
func (u *unusedKeys) update(retired []string, records Records, now, grace time.Duration) []string {
	members := slices.Sorted(maps.Keys(records))
	if !slices.Equal(members, u.members) {
		u.members, u.since = members, map[string]time.Duration{}
	}
	maps.DeleteFunc(u.since, func(id string, _ time.Duration) bool { return !slices.Contains(retired, id) })
	var expired []string
	for _, id := range retired {
		n := records.SealedWith(id)
		if n == nil || *n > 0 {
			delete(u.since, id)
			continue
		}
		since, known := u.since[id]
		if !known {
			u.since[id] = now
			continue
		}
		if now-since >= grace {
			expired = append(expired, id)
		}
	}
	return expired
}
