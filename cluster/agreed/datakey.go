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
	maxDataKeyName = 256 // bytes of its creator's name, and of a fingerprint
	dataKeyIDSize  = 16  // hex digits
)

// DataKeyKind is the use of a data key.
type DataKeyKind string

// The kinds of data keys, with the same values as keyring.Kind.
const (
	DataKeySeal DataKeyKind = "seal" // encrypts records; can be rotated
	DataKeyMAC  DataKeyKind = "mac"  // for ids and digests; never replaced
)

// DataKeyState is the state of a data key's life cycle.
type DataKeyState string

// The states of a data key, in order.
const (
	DataKeyPending DataKeyState = "pending" // some node has not opened it yet, so no node seals with it
	DataKeyActive  DataKeyState = "active"
	DataKeyRetired DataKeyState = "retired" // only opens records, until no node has records sealed with it
)

// DataKey is an agreed data key. It is wrapped with the operator key, never in
// clear.
type DataKey struct {
	ID      string      `json:"id"` // 16 hex digits
	Kind    DataKeyKind `json:"kind"`
	Wrapped []byte      `json:"wrapped"`
	// OperatorKey is the fingerprint of the operator key that wraps it. At any time
	// it is the same for all data keys.
	OperatorKey string    `json:"operator_key"`
	CreatedAt   time.Time `json:"created_at"`
	CreatedBy   string    `json:"created_by"`
	// Confirmed has the time when each node confirmed that it had opened the key as
	// it is wrapped now.
	Confirmed map[string]time.Time `json:"confirmed,omitempty"`
	ActiveAt  time.Time            `json:"active_at,omitzero"`
	RetiredAt time.Time            `json:"retired_at,omitzero"`
}

// State derives the key's state from its times.
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

// PendingDataKey is the sealing key that waits for confirmations; there is at
// most one.
func (s *State) PendingDataKey() (DataKey, bool) {
	i := slices.IndexFunc(s.DataKeys, func(k DataKey) bool { return k.Kind == DataKeySeal && k.State() == DataKeyPending })
	if i < 0 {
		return DataKey{}, false
	}
	return s.DataKeys[i], true
}

// Unconfirmed returns the sorted names of the members that have not confirmed a
// key.
func (s *State) Unconfirmed(k DataKey) []string {
	var missing []string
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		if _, confirmed := k.Confirmed[name]; !confirmed {
			missing = append(missing, name)
		}
	}
	return missing
}

// OperatorKey is the fingerprint of the operator key that wraps the data keys,
// empty while there are none.
func (s *State) OperatorKey() string {
	if len(s.DataKeys) == 0 {
		return ""
	}
	return s.DataKeys[0].OperatorKey
}

// LackOperatorKey returns the sorted names of the members whose operator key has
// another fingerprint.
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
	ErrDataKeyPending     = errors.New("an earlier new data key still waits for confirmations")
	ErrDataKeyUnconfirmed = errors.New("not every node has confirmed the data key")
	ErrDataKeyInUse       = errors.New("the data key is still in use")
	ErrDataKeysChanged    = errors.New("the data keys have changed in the meantime")
	ErrOperatorKey        = errors.New("wrong operator key")
	ErrOperatorKeyMissing = errors.New("not every node has the new operator key")
)

// The data of the commands about data keys.
type (
	// DataKeyAdd adds a pending key.
	DataKeyAdd struct {
		ID          string      `json:"id"`
		Kind        DataKeyKind `json:"kind"`
		Wrapped     []byte      `json:"wrapped"`
		OperatorKey string      `json:"operator_key"`
		By          string      `json:"by"`
	}
	// DataKeyConfirm records that a node has opened keys, as they are wrapped with
	// this operator key. Keys dropped in the meantime are ignored.
	DataKeyConfirm struct {
		Node        string   `json:"node"`
		IDs         []string `json:"ids"`
		OperatorKey string   `json:"operator_key"`
	}
	// DataKeyActivate activates a key that every member has confirmed, and retires
	// the previous sealing key.
	DataKeyActivate struct {
		ID string `json:"id"`
	}
	// DataKeyDrop removes a retired key. Free lists the nodes that have no records
	// sealed with it, by their own answers; every member must be there.
	DataKeyDrop struct {
		ID   string   `json:"id"`
		Free []string `json:"free"`
	}
	// DataKeyRewrap replaces the wrapped form of all keys; Wrapped is by their ids.
	DataKeyRewrap struct {
		OperatorKey string            `json:"operator_key"`
		Wrapped     map[string][]byte `json:"wrapped"`
		By          string            `json:"by"`
	}
)

// MayOpen returns ErrOperatorKey for a node that could open none of the data keys.
func (s *State) MayOpen(n Node) error {
	want := s.OperatorKey()
	if want == "" || n.OperatorKey == "" || n.OperatorKey == want || n.OperatorKeyPrevious == want {
		return nil
	}
	return fmt.Errorf("%w: the cluster's data keys are wrapped with operator key %s, node %s was started with %s; "+
		"give it the cluster's operator key, as operator_key_previous while the cluster changes to another one", ErrOperatorKey, want, n.Name, n.OperatorKey)
}
