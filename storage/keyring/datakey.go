package keyring

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
)

// KeyID names a data key. It is derived from the key but does not reveal it. The
// zero value is no key.
type KeyID [keyIDSize]byte

// String returns the id as 16 hex digits.
func (id KeyID) String() string { return hex.EncodeToString(id[:]) }

// IsZero reports whether the id names no key.
func (id KeyID) IsZero() bool { return id == KeyID{} }

// MarshalText encodes the id in hex, also as the key of a JSON object.
func (id KeyID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, id[:]), nil }

// UnmarshalText decodes what MarshalText encoded.
func (id *KeyID) UnmarshalText(text []byte) error {
	parsed, err := ParseKeyID(string(text))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}

// ParseKeyID parses 16 hex digits.
func ParseKeyID(text string) (KeyID, error) {
	var id KeyID
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(id) {
		return KeyID{}, fmt.Errorf("%q is not the id of a data key: want %d hex digits", text, hex.EncodedLen(len(id)))
	}
	copy(id[:], b)
	return id, nil
}

// Kind is the purpose of a data key.
type Kind string

// The kinds of data keys.
const (
	// KindSeal encrypts records. It is rotated.
	KindSeal Kind = "seal"
	// KindMAC makes ids and digests that must stay the same on every node. There is
	// one such key, and it is never rotated.
	KindMAC Kind = "mac"
)

// DataKey is an opened data key. It prints as "[data key <id>]" in every format;
// only Wrap gives access to it. The zero value is no key.
type DataKey struct {
	id       KeyID
	kind     Kind
	material [keySize]byte
}

// NewDataKey makes a random key.
func NewDataKey(kind Kind) DataKey {
	var material [keySize]byte
	_, _ = rand.Read(material[:]) // never fails; it ends the process instead
	k, err := DataKeyFrom(kind, material[:])
	if err != nil {
		panic(err) // the size above is right; HKDF of 8 bytes can't fail
	}
	return k
}

// DataKeyFrom makes a key from 32 bytes of material.
func DataKeyFrom(kind Kind, material []byte) (DataKey, error) {
	if len(material) != keySize {
		return DataKey{}, fmt.Errorf("key material has %d bytes, want %d", len(material), keySize)
	}
	if kind != KindSeal && kind != KindMAC {
		return DataKey{}, fmt.Errorf("%w: data key of the kind %q", ErrNewerFormat, kind)
	}
	k := DataKey{kind: kind}
	id, err := subkey(material, "dsnode data key id v1 "+string(kind), keyIDSize)
	if err != nil {
		return DataKey{}, err
	}
	copy(k.material[:], material)
	copy(k.id[:], id)
	return k, nil
}

// ID returns the key's id.
func (k DataKey) ID() KeyID { return k.id }

// Kind returns the key's purpose.
func (k DataKey) Kind() Kind { return k.kind }

// String returns the id, not the key.
func (k DataKey) String() string { return "[data key " + k.id.String() + "]" }

// GoString is the same as String.
func (k DataKey) GoString() string { return k.String() }

// LogValue is the same as String.
func (k DataKey) LogValue() slog.Value { return slog.StringValue(k.String()) }

// Both purposes end in a version; see subkey.
const (
	wrapPurpose        = "dsnode operator wraps data key v1"
	fingerprintPurpose = "dsnode operator key fingerprint v1"
)

// Wrap seals the key with the operator's key, for this cluster only.
func (k DataKey) Wrap(op OperatorKey, clusterID string) ([]byte, error) {
	s, err := op.sealer(wrapPurpose)
	if err != nil {
		return nil, err
	}
	return s.Seal(nil, k.material[:], wrapPlace(clusterID, k.id, k.kind)), nil
}

// UnwrapDataKey opens what Wrap sealed. The error wraps ErrWrongOperatorKey,
// ErrDamaged, ErrNewerFormat or ErrNoOperatorKey.
func UnwrapDataKey(op OperatorKey, clusterID string, id KeyID, kind Kind, wrapped []byte) (DataKey, error) {
	s, err := op.sealer(wrapPurpose)
	if err != nil {
		return DataKey{}, err
	}
	material, err := s.Open(nil, wrapped, wrapPlace(clusterID, id, kind))
	if errors.Is(err, ErrWrongKey) {
		return DataKey{}, fmt.Errorf("data key %s: %w", id, ErrWrongOperatorKey)
	}
	if err != nil {
		return DataKey{}, fmt.Errorf("data key %s: %w", id, err)
	}
	k, err := DataKeyFrom(kind, material)
	if err != nil {
		return DataKey{}, fmt.Errorf("data key %s: %w", id, err)
	}
	if k.id != id {
		return DataKey{}, fmt.Errorf("data key %s: %w: it holds the key %s", id, ErrDamaged, k.id)
	}
	return k, nil
}

func wrapPlace(clusterID string, id KeyID, kind Kind) []byte {
	return appendParts(nil, []byte("dsnode data key"), []byte(clusterID), id[:], []byte(kind))
}

// Fingerprint returns 16 hex digits that identify an operator key but do not reveal
// it; "" for no key.
func (k OperatorKey) Fingerprint() string {
	if !k.set {
		return ""
	}
	b, err := subkey(k.material[:], fingerprintPurpose, keyIDSize)
	if err != nil {
		panic(err) // HKDF of 8 bytes can't fail
	}
	return hex.EncodeToString(b)
}

// appendParts joins parts, each preceded by its length, so that two different
// lists of parts never give the same bytes.
func appendParts(dst []byte, parts ...[]byte) []byte {
	for _, p := range parts {
		dst = binary.BigEndian.AppendUint64(dst, uint64(len(p)))
		dst = append(dst, p...)
	}
	return dst
}
