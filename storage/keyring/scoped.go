package keyring

import (
	"crypto/cipher"
	"fmt"
	"slices"
	"sync/atomic"
)

// Bytes sealed with a data key are
//
//	format (1) | id of the data key (8) | nonce (12) | ciphertext | tag (16)
//
// that is, Overhead longer than the plaintext. The cipher's key is a subkey for the
// purpose and scope. The id is that of the data key itself, so re-sealing can tell
// old keys without deriving anything. Format 1 is that of a Sealer.
const scopedFormat = 2

// Scoped seals and opens under one purpose and scope of a Ring, with the keys that
// the ring holds at that moment. Copies share their state; it is safe for
// concurrent use. Keep and reuse it: it caches the derived ciphers, one for each
// key of the ring.
//
// Nonces are random 96-bit numbers: choose scopes so that each seals fewer than
// 2^32 pieces under one data key.
type Scoped struct{ *scoped }

type scoped struct {
	ring    *Ring
	info    string // for HKDF
	ciphers atomic.Pointer[[]scopedCipher]
}

type scopedCipher struct {
	id   KeyID
	aead cipher.AEAD
}

// Scope returns the sealer for one purpose, such as "job journal v1" (a purpose
// ends in a version), and one scope, such as a node's name and an incarnation. It is
// cheap. The ring may still be empty.
func (r *Ring) Scope(purpose string, scope ...[]byte) Scoped {
	parts := append([][]byte{[]byte(purpose)}, scope...)
	s := &scoped{ring: r, info: "dsnode data key scope v1 " + string(appendParts(nil, parts...))}
	s.ciphers.Store(&[]scopedCipher{})
	return Scoped{s}
}

// Seal appends plaintext, sealed with the ring's current key, to dst. aad is the
// place of the record; opening it under another aad fails, so records can't be
// swapped. plaintext must not overlap dst's free capacity. Nothing is allocated if
// dst has room for len(plaintext)+Overhead more bytes. The error is ErrNoDataKey.
func (s Scoped) Seal(dst, plaintext, aad []byte) ([]byte, error) {
	key := s.ring.held.Load().current
	if key == nil {
		return dst, ErrNoDataKey
	}
	aead, err := s.cipher(key)
	if err != nil {
		return dst, err
	}
	dst = slices.Grow(dst, len(plaintext)+Overhead)
	dst = append(dst, scopedFormat)
	dst = append(dst, key.id[:]...)
	return aead.Seal(dst, nil, plaintext, aad), nil
}

// Open appends the plaintext to dst and does not change sealed. The error wraps
// ErrUnknownKey (an UnknownKeyError), ErrDamaged or ErrNewerFormat.
func (s Scoped) Open(dst, sealed, aad []byte) ([]byte, error) {
	id, err := SealedWith(sealed)
	if err != nil {
		return dst, err
	}
	key := s.ring.held.Load().find(id)
	if key == nil {
		return dst, &UnknownKeyError{Key: id}
	}
	aead, err := s.cipher(key)
	if err != nil {
		return dst, err
	}
	plaintext, err := aead.Open(dst, nil, sealed[headerSize:], aad)
	if err != nil {
		// The cipher's error says no more than "authentication failed".
		return dst, ErrDamaged
	}
	return plaintext, nil
}

// SealedWith returns the id of the data key that sealed the bytes, without opening
// them. The error wraps ErrDamaged or ErrNewerFormat.
func SealedWith(sealed []byte) (KeyID, error) {
	if len(sealed) < Overhead {
		return KeyID{}, fmt.Errorf("%w: %d bytes are too few", ErrDamaged, len(sealed))
	}
	switch {
	case sealed[0] > scopedFormat:
		return KeyID{}, fmt.Errorf("%w: seal format %d", ErrNewerFormat, sealed[0])
	case sealed[0] < scopedFormat:
		return KeyID{}, fmt.Errorf("%w: not sealed with a data key (seal format %d)", ErrDamaged, sealed[0])
	}
	return KeyID(sealed[1:headerSize]), nil
}

// cipher returns the AEAD of this scope under a key; it is derived once.
func (s *scoped) cipher(key *DataKey) (cipher.AEAD, error) {
	for _, c := range *s.ciphers.Load() {
		if c.id == key.id {
			return c.aead, nil
		}
	}
	return s.derive(key)
}

func (s *scoped) derive(key *DataKey) (cipher.AEAD, error) {
	material, err := subkey(key.material[:], s.info, keySize)
	if err != nil {
		return nil, err
	}
	aead, err := newAEAD(material)
	if err != nil {
		return nil, err
	}
	for {
		old := s.ciphers.Load()
		// Keep only the ciphers of keys that the ring still holds, so that their number
		// is bounded. The newest is first because it is used most.
		held := s.ring.held.Load()
		next := []scopedCipher{{key.id, aead}}
		for _, c := range *old {
			if c.id != key.id && held.find(c.id) != nil {
				next = append(next, c)
			}
		}
		if s.ciphers.CompareAndSwap(old, &next) {
			return aead, nil
		}
	}
}
