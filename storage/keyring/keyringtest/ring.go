// Package keyringtest makes keyrings for tests.
package keyringtest

import (
	"testing"

	"github.com/dsnode/dsnode/storage/keyring"
)

// New returns a ring with a MAC key and n random sealing keys, of which the last
// is current, and the keys in this order. With n = 0 nothing can be sealed.
func New(t testing.TB, n int) (*keyring.Ring, []keyring.DataKey) {
	t.Helper()
	keys := []keyring.DataKey{keyring.NewDataKey(keyring.KindMAC)}
	var current keyring.KeyID
	for range n {
		k := keyring.NewDataKey(keyring.KindSeal)
		keys, current = append(keys, k), k.ID()
	}
	r := keyring.NewRing()
	if err := r.Set(current, keys...); err != nil {
		t.Fatal(err)
	}
	return r, keys
}

// Rotate adds a random sealing key to keys, makes it current, and returns all keys
// that the ring now holds. Leave a key out of keys to drop it.
func Rotate(t testing.TB, r *keyring.Ring, keys []keyring.DataKey) []keyring.DataKey {
	t.Helper()
	k := keyring.NewDataKey(keyring.KindSeal)
	keys = append(keys[:len(keys):len(keys)], k)
	if err := r.Set(k.ID(), keys...); err != nil {
		t.Fatal(err)
	}
	return keys
}
