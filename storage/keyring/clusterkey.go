package keyring

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
)

// ClusterKey signs the tickets of a cluster's members. It prints as "[cluster key]" in
// every format; only Wrap gives access to it. The zero value is no key.
type ClusterKey struct{ private ed25519.PrivateKey }

// NewClusterKey makes a random key.
func NewClusterKey() ClusterKey {
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		panic(err) // crypto/rand never fails; it ends the process instead
	}
	return ClusterKey{private: private}
}

// Public is the half that verifies.
func (k ClusterKey) Public() []byte { return k.private.Public().(ed25519.PublicKey) }

// Sign signs a text.
func (k ClusterKey) Sign(text []byte) []byte { return ed25519.Sign(k.private, text) }

func (k ClusterKey) String() string       { return "[cluster key]" }
func (k ClusterKey) GoString() string     { return "[cluster key]" }
func (k ClusterKey) LogValue() slog.Value { return slog.StringValue("[cluster key]") }

const clusterKeyPurpose = "dsnode operator wraps cluster key v1"

// Wrap seals the key with the operator's key, for this cluster only.
func (k ClusterKey) Wrap(op OperatorKey, clusterID string) ([]byte, error) {
	s, err := op.sealer(clusterKeyPurpose)
	if err != nil {
		return nil, err
	}
	return s.Seal(nil, k.private.Seed(), clusterKeyPlace(clusterID, k.Public())), nil
}

// UnwrapClusterKey opens what Wrap sealed. The error wraps ErrWrongOperatorKey, ErrDamaged,
// ErrNewerFormat or ErrNoOperatorKey.
func UnwrapClusterKey(op OperatorKey, clusterID string, public, wrapped []byte) (ClusterKey, error) {
	s, err := op.sealer(clusterKeyPurpose)
	if err != nil {
		return ClusterKey{}, err
	}
	seed, err := s.Open(nil, wrapped, clusterKeyPlace(clusterID, public))
	if errors.Is(err, ErrWrongKey) {
		return ClusterKey{}, fmt.Errorf("cluster key: %w", ErrWrongOperatorKey)
	}
	if err != nil {
		return ClusterKey{}, fmt.Errorf("cluster key: %w", err)
	}
	if len(seed) != ed25519.SeedSize {
		return ClusterKey{}, fmt.Errorf("cluster key: %w: a seed of %d bytes", ErrDamaged, len(seed))
	}
	k := ClusterKey{private: ed25519.NewKeyFromSeed(seed)}
	if string(k.Public()) != string(public) {
		return ClusterKey{}, fmt.Errorf("cluster key: %w: its public half is another one", ErrDamaged)
	}
	return k, nil
}

func clusterKeyPlace(clusterID string, public []byte) []byte {
	return appendParts(nil, []byte("dsnode cluster key"), []byte(clusterID), public)
}
