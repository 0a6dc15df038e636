package keyring

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
)

// Sealed bytes are
//
//	format (1) | key id (8) | nonce (12) | ciphertext | tag (16)
//
// The key id distinguishes a wrong key from damage. It is derived from the key but
// does not reveal it.
const (
	sealedFormat = 1
	keyIDSize    = 8
	headerSize   = 1 + keyIDSize
	keySize      = 32

	// Overhead is the length of sealed bytes minus that of the plaintext.
	Overhead = headerSize + 12 + 16
)

// Sealer encrypts and authenticates small pieces of data. It is safe for
// concurrent use.
//
// Nonces are random 96-bit numbers: one key must seal fewer than 2^32 pieces. A
// node's key seals a few pieces a second and stays far below that for years.
type Sealer interface {
	// Seal appends plaintext, sealed, to dst. aad is the place of the record; opening
	// it under another aad fails, so records can't be swapped. plaintext must not
	// overlap dst's free capacity.
	Seal(dst, plaintext, aad []byte) []byte
	// Open appends the plaintext to dst and does not change sealed. The error wraps
	// ErrWrongKey, ErrDamaged or ErrNewerFormat.
	Open(dst, sealed, aad []byte) ([]byte, error)
}

type sealer struct {
	header [headerSize]byte // format and key id
	aead   cipher.AEAD
}

// NewSealer makes a Sealer from 32 bytes of key material. It derives two subkeys;
// the material itself does not encrypt anything.
func NewSealer(material []byte) (Sealer, error) {
	if len(material) != keySize {
		return nil, fmt.Errorf("key material has %d bytes, want %d", len(material), keySize)
	}
	key, err := subkey(material, "dsnode seal aes-256-gcm v1", keySize)
	if err != nil {
		return nil, err
	}
	id, err := subkey(material, "dsnode seal key id v1", keyIDSize)
	if err != nil {
		return nil, err
	}
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	s := &sealer{aead: aead}
	s.header[0] = sealedFormat
	copy(s.header[1:], id)
	return s, nil
}

func (s *sealer) Seal(dst, plaintext, aad []byte) []byte {
	dst = append(dst, s.header[:]...)
	return s.aead.Seal(dst, nil, plaintext, aad)
}

func (s *sealer) Open(dst, sealed, aad []byte) ([]byte, error) {
	if len(sealed) < Overhead {
		return nil, fmt.Errorf("%w: %d bytes are too few", ErrDamaged, len(sealed))
	}
	if sealed[0] != sealedFormat {
		return nil, fmt.Errorf("%w: seal format %d", ErrNewerFormat, sealed[0])
	}
	if !bytes.Equal(sealed[:headerSize], s.header[:]) {
		return nil, fmt.Errorf("%w: key %x, have %x", ErrWrongKey, sealed[1:headerSize], s.header[1:])
	}
	plaintext, err := s.aead.Open(dst, nil, sealed[headerSize:], aad)
	if err != nil {
		// The cipher's error says no more than "authentication failed".
		return nil, ErrDamaged
	}
	return plaintext, nil
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return aead, nil
}

// subkey derives size bytes for one purpose. Purposes end in a version, so that a
// later scheme never shares a key with an earlier one.
func subkey(material []byte, purpose string, size int) ([]byte, error) {
	key, err := hkdf.Key(sha256.New, material, nil, purpose, size)
	if err != nil {
		return nil, fmt.Errorf("derive %q: %w", purpose, err)
	}
	return key, nil
}
