package keyring

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"sync"
)

// MAC computes HMAC-SHA-256 under a subkey of the cluster's MAC key, for ids,
// digests and cache keys. The sums are the same on every node and never change,
// because the MAC key is not rotated. It is safe for concurrent use; make one per
// purpose and keep it.
type MAC struct {
	states sync.Pool // of *macState
}

type macState struct {
	h    hash.Hash
	size [8]byte
	sum  [sha256.Size]byte // a field, because arguments of interface methods escape
}

// MAC returns the MAC for one purpose; a purpose ends in a version. The error is
// ErrNoDataKey while the cluster has no MAC key in use.
func (r *Ring) MAC(purpose string) (*MAC, error) {
	key := r.held.Load().mac
	if key == nil {
		return nil, ErrNoDataKey
	}
	secret, err := subkey(key.material[:], "dsnode data key mac v1 "+purpose, keySize)
	if err != nil {
		return nil, err
	}
	m := &MAC{}
	m.states.New = func() any { return &macState{h: hmac.New(sha256.New, secret)} }
	return m, nil
}

// Sum covers the parts and their lengths: two different lists of parts never have
// the same input.
func (m *MAC) Sum(parts ...[]byte) [sha256.Size]byte {
	s := m.states.Get().(*macState) //nolint:forcetypeassert // New above is the only source
	defer m.states.Put(s)
	s.h.Reset()
	for _, p := range parts {
		binary.BigEndian.PutUint64(s.size[:], uint64(len(p)))
		_, _ = s.h.Write(s.size[:]) // a hash never fails
		_, _ = s.h.Write(p)
	}
	s.h.Sum(s.sum[:0])
	return s.sum
}
