package admin

import (
	"context"
	"net/http"
	"time"
)

// This file has the API of data keys, for server and client.

// Keyrings are the operations on data keys.
type Keyrings interface {
	Keyring(ctx context.Context) (Keyring, error)
	// RotateKeyring makes a new sealing key. It becomes active when every node has
	// confirmed it. While one is pending, it returns that one instead.
	RotateKeyring(ctx context.Context, by string) (DataKey, error)
	// RewrapKeyring wraps all data keys with the operator key that the asked node was
	// started with. The error is cluster.ErrOperatorKeyMissing unless every node has it.
	RewrapKeyring(ctx context.Context, by string) (Keyring, error)
}

// Keyring lists the cluster's data keys, without the keys themselves.
type Keyring struct {
	// OperatorKey is the fingerprint of the operator key that wraps all data keys; nil
	// while there are none.
	OperatorKey *string       `json:"operator_key"`
	Keys        []DataKey     `json:"keys"` // oldest first
	Nodes       []KeyringNode `json:"nodes"`
}

// DataKey is one data key.
type DataKey struct {
	ID   string `json:"id"`
	Kind string `json:"kind"` // seal or mac
	// State is pending until every node has confirmed the key, then active. After a
	// rotation a sealing key is retired, until no record uses it.
	State     string     `json:"state"`
	CreatedAt time.Time  `json:"created_at"`
	CreatedBy string     `json:"created_by"`
	ActiveAt  *time.Time `json:"active_at"`
	RetiredAt *time.Time `json:"retired_at"`
	Confirmed []string   `json:"confirmed"` // nodes that have opened it, as wrapped now
	Missing   []string   `json:"missing"`   // the others
	// Records is how many records are sealed with it, each copy counted. It is nil when
	// a node did not report, and for the MAC key, which seals nothing.
	Records *int64 `json:"records"`
}

// KeyringNode has the fingerprints of the operator keys that a node was started with.
type KeyringNode struct {
	Name                string  `json:"name"`
	Site                string  `json:"site"`
	OperatorKey         *string `json:"operator_key"`
	OperatorKeyPrevious *string `json:"operator_key_previous"`
}

func (s *Server) postKeyringRotate(ctx context.Context, c call) (any, error) {
	return s.cluster.RotateKeyring(ctx, c.author)
}

func (s *Server) postKeyringRewrap(ctx context.Context, c call) (any, error) {
	return s.cluster.RewrapKeyring(ctx, c.author)
}

func (c *Client) Keyring(ctx context.Context) (Keyring, error) {
	return ask[Keyring](ctx, c, http.MethodGet, "/admin/v1/keyring", nil, nil)
}

func (c *Client) RotateKeyring(ctx context.Context, by string) (DataKey, error) {
	return ask[DataKey](ctx, c, http.MethodPost, "/admin/v1/keyring/rotate", c.by(by), nil)
}

func (c *Client) RewrapKeyring(ctx context.Context, by string) (Keyring, error) {
	return ask[Keyring](ctx, c, http.MethodPost, "/admin/v1/keyring/rewrap", c.by(by), nil)
}
