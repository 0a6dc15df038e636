package agreed

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Bounds of the agreed data keys.
const (
	maxDataKeys    = 32
	maxWrappedKey  = 256 // a wrapped key has 69 bytes today
	maxDataKeyName = 256 // who made one
	dataKeyIDSize  = 16  // hex digits
)

// DataKeyKind says what a data key is for.
type DataKeyKind string

// The kinds of data keys; the same words as keyring.Kind.
const (
	DataKeySeal DataKeyKind = "seal" // encrypts records, is rotated
	DataKeyMAC  DataKeyKind = "mac"  // makes ids and digests, never changes
)

// DataKeyState is where a data key stands in its life.
type DataKeyState string

// The states of a data key, in order.
const (
	DataKeyPending DataKeyState = "pending" // not every node has opened it yet, so nothing is sealed with it
	DataKeyActive  DataKeyState = "active"
	DataKeyRetired DataKeyState = "retired" // opens what it sealed, until nothing carries it
)

// DataKey is one of the keys that records are sealed with, as the cluster
// agrees on it: wrapped with the operator's key, never in clear.
type DataKey struct {
	ID      string      `json:"id"` // 16 hex digits
	Kind    DataKeyKind `json:"kind"`
	Wrapped []byte      `json:"wrapped"`
	// OperatorKey is the fingerprint of the operator key that it is wrapped with:
	// the same for all data keys at any time.
	OperatorKey string    `json:"operator_key"`
	CreatedAt   time.Time `json:"created_at"`
	CreatedBy   string    `json:"created_by"`
	// Confirmed says when each node had opened it, as wrapped now.
	Confirmed map[string]time.Time `json:"confirmed,omitempty"`
	ActiveAt  time.Time            `json:"active_at,omitzero"`
	RetiredAt time.Time            `json:"retired_at,omitzero"`
}

// State is where the key stands.
func (k DataKey) State() DataKeyState {
	switch {
	case !k.RetiredAt.IsZero():
		return DataKeyRetired
	case !k.ActiveAt.IsZero():
		return DataKeyActive
	}
	return DataKeyPending
}

// DataKey finds an agreed data key.
func (s *State) DataKey(id string) (DataKey, bool) {
	if i := s.dataKey(id); i >= 0 {
		return s.DataKeys[i], true
	}
	return DataKey{}, false
}

func (s *State) dataKey(id string) int {
	return slices.IndexFunc(s.DataKeys, func(k DataKey) bool { return k.ID == id })
}

// PendingDataKey is the sealing key that waits to be confirmed by every node;
// there is one at most.
func (s *State) PendingDataKey() (DataKey, bool) {
	i := slices.IndexFunc(s.DataKeys, func(k DataKey) bool { return k.Kind == DataKeySeal && k.State() == DataKeyPending })
	if i < 0 {
		return DataKey{}, false
	}
	return s.DataKeys[i], true
}

// Unconfirmed names the members, sorted, that have not said yet that they opened
// a key.
func (s *State) Unconfirmed(k DataKey) []string {
	var missing []string
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		if _, confirmed := k.Confirmed[name]; !confirmed {
			missing = append(missing, name)
		}
	}
	return missing
}

// OperatorKey is the fingerprint of the operator key that the data keys are
// wrapped with, empty while there are none.
func (s *State) OperatorKey() string {
	if len(s.DataKeys) == 0 {
		return ""
	}
	return s.DataKeys[0].OperatorKey
}

// LackOperatorKey names the members, sorted, that don't have the operator key of
// this fingerprint as theirs.
func (s *State) LackOperatorKey(fingerprint string) []string {
	var lack []string
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		if s.Nodes[name].OperatorKey != fingerprint {
			lack = append(lack, name)
		}
	}
	return lack
}

// Refusals about data keys.
var (
	ErrUnknownDataKey     = errors.New("no such data key")
	ErrDataKeyRefused     = errors.New("that data key can't be added")
	ErrDataKeyPending     = errors.New("a new data key waits to be confirmed already")
	ErrDataKeyUnconfirmed = errors.New("not every node has confirmed the data key")
	ErrDataKeyInUse       = errors.New("the data key is still in use")
	ErrDataKeysChanged    = errors.New("the data keys have changed meanwhile")
	ErrOperatorKey        = errors.New("wrong operator key")
	ErrOperatorKeyMissing = errors.New("not every node has the new operator key")
)

// The data of the commands about data keys.
type (
	// DataKeyAdd proposes a key. It is used once every node has confirmed it.
	DataKeyAdd struct {
		ID          string      `json:"id"`
		Kind        DataKeyKind `json:"kind"`
		Wrapped     []byte      `json:"wrapped"`
		OperatorKey string      `json:"operator_key"`
		By          string      `json:"by"`
	}
	// DataKeyConfirm is a node's word that it has opened keys, as they are wrapped
	// with this operator key. Keys that are gone meanwhile are passed over.
	DataKeyConfirm struct {
		Node        string   `json:"node"`
		IDs         []string `json:"ids"`
		OperatorKey string   `json:"operator_key"`
	}
	// DataKeyActivate puts a key to use that every member has confirmed; the
	// sealing key before it is retired.
	DataKeyActivate struct {
		ID string `json:"id"`
	}
	// DataKeyDrop ends a retired key. Free names the nodes that said, each, that
	// nothing of theirs is sealed with it: every member must be there.
	DataKeyDrop struct {
		ID   string   `json:"id"`
		Free []string `json:"free"`
	}
	// DataKeyRewrap replaces the wrapping of all keys, by their ids.
	DataKeyRewrap struct {
		OperatorKey string            `json:"operator_key"`
		Wrapped     map[string][]byte `json:"wrapped"`
		By          string            `json:"by"`
	}
)

// mayOpen refuses a node that could open none of the data keys.
func (s *State) MayOpen(n Node) error {
	want := s.OperatorKey()
	if want == "" || n.OperatorKey == "" || n.OperatorKey == want || n.OperatorKeyPrevious == want {
		return nil
	}
	return fmt.Errorf("%w: the cluster's data keys are wrapped with operator key %s, node %s was started with %s; "+
		"give it the cluster's operator key, as operator_key_previous while the cluster changes to another one", ErrOperatorKey, want, n.Name, n.OperatorKey)
}
