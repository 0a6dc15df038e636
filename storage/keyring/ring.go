package keyring

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// maxRing bounds the keys of a ring. The cluster agrees on fewer.
const maxRing = 64

// Ring holds the data keys that the cluster has agreed on and this node has
// opened. It is safe for many goroutines; sealing and opening take no lock.
//
// It changes while the process runs: Set is called by the node's wiring, and by
// nobody else. Those who have to wait for a key, or to re-seal after a rotation,
// watch Changed.
type Ring struct {
	held atomic.Pointer[heldKeys]

	mu      sync.Mutex // guards changed, and orders Set
	changed chan struct{}
}

// heldKeys is immutable once published.
type heldKeys struct {
	current *DataKey // nil: none may seal
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

// NewRing makes an empty ring: until the first Set nothing can be sealed.
func NewRing() *Ring {
	r := &Ring{changed: make(chan struct{})}
	r.held.Store(&heldKeys{})
	return r
}

// Set replaces the keys. current is the sealing key for new records, zero while
// none may be used; the others only open. At most one key is of KindMAC. What is
// absent can't be opened any more.
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
	r.mu.Lock()
	defer r.mu.Unlock()
	if sameKeys(r.held.Load(), next) {
		return nil
	}
	r.held.Store(next)
	close(r.changed)
	r.changed = make(chan struct{})
	return nil
}

func sameKeys(a, b *heldKeys) bool {
	same := func(x, y *DataKey) bool { return x == y || x != nil && y != nil && *x == *y }
	return same(a.current, b.current) && same(a.mac, b.mac) && slices.Equal(a.seal, b.seal)
}

// Ready reports whether there are a key to seal with and a MAC key.
func (r *Ring) Ready() bool {
	h := r.held.Load()
	return h.current != nil && h.mac != nil
}

// Changed is closed at the next change of the keys. Take it before looking at
// the ring, else a change in between goes unnoticed.
func (r *Ring) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// Current names the key that new records are sealed with; false while there is
// none.
func (r *Ring) Current() (KeyID, bool) {
	if k := r.held.Load().current; k != nil {
		return k.id, true
	}
	return KeyID{}, false
}

// Has reports whether records sealed with this key can be opened here.
func (r *Ring) Has(id KeyID) bool {
	return r.held.Load().find(id) != nil
}
