package agreed

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Reasons why Authenticate refuses a client's key.
var (
	ErrKeyMissing = errors.New("no API key was sent")
	ErrKeyUnknown = errors.New("the API key is unknown")
	ErrKeyExpired = errors.New("the API key has expired")
	ErrKeyRevoked = errors.New("the API key was revoked")
)

const keyPrefix = "dsk-"

// NewAPIKey makes a key and its secret, "dsk-<id>-<43 characters>". The secret
// has 256 random bits and can't be guessed, so SHA-256 is as good as a slow
// password hash.
func NewAPIKey(tenant, note string, models []string, expires, now time.Time) (APIKey, string) {
	var id [6]byte
	var secret [32]byte
	// crypto/rand.Read never fails since Go 1.24: it crashes the program instead.
	_, _ = rand.Read(id[:])
	_, _ = rand.Read(secret[:])
	k := APIKey{
		ID: hex.EncodeToString(id[:]), Tenant: tenant, Note: note, Models: models,
		CreatedAt: now.UTC(), ExpiresAt: expires.UTC(),
	}
	if expires.IsZero() {
		k.ExpiresAt = time.Time{}
	}
	token := base64.RawURLEncoding.EncodeToString(secret[:])
	k.Hash = hashSecret(token)
	return k, keyPrefix + k.ID + "-" + token
}

func hashSecret(token string) string {
	h := sha256.Sum256([]byte(token))
	return hex.EncodeToString(h[:])
}

// isSecret compares in constant time. It runs on every request and does not
// allocate.
func (k *APIKey) isSecret(token string) bool {
	sum := sha256.Sum256(append(make([]byte, 0, 64), token...))
	var text [2 * len(sum)]byte
	hex.Encode(text[:], sum[:])
	return subtle.ConstantTimeCompare(text[:], []byte(k.Hash)) == 1
}

// Authenticate finds the key that a client sent. It uses only the local state: a
// valid key must also work without a quorum.
func (s *State) Authenticate(key string, now time.Time) (APIKey, error) {
	if key == "" {
		return APIKey{}, ErrKeyMissing
	}
	id, token, ok := strings.Cut(strings.TrimPrefix(key, keyPrefix), "-")
	if !ok || !strings.HasPrefix(key, keyPrefix) {
		return APIKey{}, ErrKeyUnknown
	}
	k, known := s.APIKeys[id]
	// An unknown id is hashed and compared too, so that the response time does not
	// reveal whether the id exists.
	if !k.isSecret(token) || !known {
		return APIKey{}, ErrKeyUnknown
	}
	switch {
	case !k.RevokedAt.IsZero():
		return APIKey{}, fmt.Errorf("%w at %s", ErrKeyRevoked, k.RevokedAt.Format(time.RFC3339))
	case !k.ExpiresAt.IsZero() && now.After(k.ExpiresAt):
		return APIKey{}, fmt.Errorf("%w at %s", ErrKeyExpired, k.ExpiresAt.Format(time.RFC3339))
	}
	return k, nil
}
