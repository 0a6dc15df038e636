package keyring

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dsnode/dsnode/storage/notify"
)

// maxRing bounds the keys of a ring. The cluster agrees on fewer.
const maxRing = 64

// Ring holds the data keys that the cluster has agreed on and this node has
// opened. It is safe for concurrent use; sealing and opening take no lock.
//
// The keys change while the process runs: the node's wiring, and only it, calls
// Set. Code that waits for a key, or re-seals after a rotation, watches Changed.
type Ring struct {
	held atomic.Pointer[heldKeys]

	setting sync.Mutex // serialises Set
	changed notify.Broadcast
}

// heldKeys is immutable once published.
type heldKeys struct {
	current *DataKey // nil: nothing can be sealed
	seal    []DataKey
	mac     *DataKey
}

func (h *heldKeys) find(id KeyID) *DataKey {
	for i := range h.seal {
		if h.seal[i].id == id {
			return &h.seal[i]
		}
	}
	return nil
}

// NewRing makes an empty ring. Nothing can be sealed before the first Set.
func NewRing() *Ring {
	r := &Ring{}
	r.held.Store(&heldKeys{})
	return r
}

// Set replaces the keys. current is the key that seals new records, zero if none
// may be used yet; the others only open. At most one key is of KindMAC. Records
// sealed with a key that is not in the list can no longer be opened.
func (r *Ring) Set(current KeyID, keys ...DataKey) error {
	if len(keys) > maxRing {
		return fmt.Errorf("a ring holds at most %d keys, not %d", maxRing, len(keys))
	}
	next := &heldKeys{}
	for _, k := range keys {
		switch {
		case k.kind == KindMAC && next.mac != nil:
			return errors.New("a ring holds one MAC key")
		case k.kind == KindMAC:
			next.mac = &k
		case k.kind == KindSeal:
			next.seal = append(next.seal, k)
		default:
			return errors.New("a ring does not hold the zero key")
		}
	}
	if !current.IsZero() {
		if next.current = next.find(current); next.current == nil {
			return fmt.Errorf("current key: %w", &UnknownKeyError{Key: current})
		}
	}
	r.setting.Lock()
	defer r.setting.Unlock()
	if sameKeys(r.held.Load(), next) {
		return nil
	}
	r.held.Store(next)
	r.changed.Send()
	return nil
}

func sameKeys(a, b *heldKeys) bool {
	same := func(x, y *DataKey) bool { return x == y || x != nil && y != nil && *x == *y }
	return same(a.current, b.current) && same(a.mac, b.mac) && slices.Equal(a.seal, b.seal)
}

// Ready reports whether the ring has a current sealing key and a MAC key.
func (r *Ring) Ready() bool {
	h := r.held.Load()
	return h.current != nil && h.mac != nil
}

// Changed is closed at the next change of the keys. Call it before reading the
// ring, or a change in between goes unnoticed.
func (r *Ring) Changed() <-chan struct{} { return r.changed.Next() }

// Current returns the id of the key that seals new records; false while there is
// none.
func (r *Ring) Current() (KeyID, bool) {
	if k := r.held.Load().current; k != nil {
		return k.id, true
	}
	return KeyID{}, false
}

// Has reports whether this node can open records sealed with the key.
func (r *Ring) Has(id KeyID) bool {
	return r.held.Load().find(id) != nil
}
