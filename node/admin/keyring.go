package admin

import (
	"context"
	"net/http"
	"time"
)

// This file is the surface of data keys, on both sides of the wire.

// Keyrings is what operators ask about data keys.
type Keyrings interface {
	Keyring(ctx context.Context) (Keyring, error)
	// RotateKeyring makes a new sealing key. It is used by itself once every node
	// has confirmed it; one that waits for that already is given back instead.
	RotateKeyring(ctx context.Context, by string) (DataKey, error)
	// RewrapKeyring wraps all data keys with the operator key that the asked node
	// was started with, cluster.ErrOperatorKeyMissing unless every node was.
	RewrapKeyring(ctx context.Context, by string) (Keyring, error)
}

// Keyring is the cluster's data keys; no part of a key is in it.
type Keyring struct {
	// OperatorKey is the fingerprint of the operator key that wraps all data keys,
	// nil while there are none.
	OperatorKey *string       `json:"operator_key"`
	Keys        []DataKey     `json:"keys"` // oldest first
	Nodes       []KeyringNode `json:"nodes"`
}

// DataKey is one data key.
type DataKey struct {
	ID   string `json:"id"`
	Kind string `json:"kind"` // seal or mac
	// State is pending until every node has confirmed the key, then active, then,
	// for a sealing key after a rotation, retired until nothing carries it.
	State     string     `json:"state"`
	CreatedAt time.Time  `json:"created_at"`
	CreatedBy string     `json:"created_by"`
	ActiveAt  *time.Time `json:"active_at"`
	RetiredAt *time.Time `json:"retired_at"`
	Confirmed []string   `json:"confirmed"` // nodes that have opened it, as wrapped now
	Missing   []string   `json:"missing"`   // the others
	// Records is how many are sealed with it, copies counted one by one; nil when
	// some node did not say, and for the MAC key, which seals nothing.
	Records *int64 `json:"records"`
}

// KeyringNode is which operator keys a node was started with, by fingerprint.
type KeyringNode struct {
	Name                string  `json:"name"`
	Site                string  `json:"site"`
	OperatorKey         *string `json:"operator_key"`
	OperatorKeyPrevious *string `json:"operator_key_previous"`
}

func (s *Server) getKeyring(ctx context.Context, _ call) (any, error) {
	return s.cluster.Keyring(ctx)
}

func (s *Server) postKeyringRotate(ctx context.Context, c call) (any, error) {
	return s.cluster.RotateKeyring(ctx, c.author)
}

func (s *Server) postKeyringRewrap(ctx context.Context, c call) (any, error) {
	return s.cluster.RewrapKeyring(ctx, c.author)
}

// Keyring implements Cluster.
func (c *Client) Keyring(ctx context.Context) (Keyring, error) {
	return ask[Keyring](ctx, c, http.MethodGet, "/admin/v1/keyring", nil, nil)
}

// RotateKeyring implements Cluster.
func (c *Client) RotateKeyring(ctx context.Context, by string) (DataKey, error) {
	return ask[DataKey](ctx, c, http.MethodPost, "/admin/v1/keyring/rotate", c.by(by), nil)
}

// RewrapKeyring implements Cluster.
func (c *Client) RewrapKeyring(ctx context.Context, by string) (Keyring, error) {
	return ask[Keyring](ctx, c, http.MethodPost, "/admin/v1/keyring/rewrap", c.by(by), nil)
}
