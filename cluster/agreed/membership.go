package agreed

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
)

// MembershipLevel is the feature level from which on a certificate of the CA is not enough:
// a node must be a member by the agreed state, or show a ticket.
const MembershipLevel = 3

// Refusals about who may join.
var (
	// ErrAwaitsAdmission is the answer to a node that must wait for an operator.
	ErrAwaitsAdmission  = errors.New("it waits until an operator admits it")
	ErrClusterKeyChange = errors.New("the cluster key has changed in the meantime")
)

// Bounds of what the state keeps of nodes that ask to join, and of the cluster key.
const (
	maxWaiting       = 64  // nodes; the one that asked first is dropped
	maxApplicantText = 256 // bytes of each field
	maxSealedKey     = 256 // bytes; a sealed key has 69 today
)

// ClusterKey signs the tickets of members. Only its private half is secret: it is sealed
// with the operator key.
type ClusterKey struct {
	Public      []byte    `json:"public"` // Ed25519
	Sealed      []byte    `json:"sealed"`
	OperatorKey string    `json:"operator_key"` // fingerprint of the key that seals it
	Since       time.Time `json:"since"`
}

// Applicant is a node that asked to join and waits for an operator.
type Applicant struct {
	Name    string    `json:"name"`
	Site    string    `json:"site"`
	RPC     string    `json:"rpc"`
	Version string    `json:"version"`
	At      time.Time `json:"at"` // of its first request
	// AdmittedAt is when an operator allowed it to join; zero: it is not allowed.
	AdmittedAt time.Time `json:"admitted_at,omitzero"`
	AdmittedBy string    `json:"admitted_by,omitempty"`
}

// Ticket proves an admission to a node whose agreed state is older. Whom it admits to which
// cluster is not in it: that comes from the certificate and the preface of who shows it.
type Ticket struct {
	Index     uint64 `json:"index"` // of the raft entry that admitted the node
	Signature []byte `json:"signature"`
}

// Holder is whom a ticket is for.
type Holder struct {
	ClusterID  string
	Generation Generation
	Node, Site string
}

// Text is what the cluster key signs. Each part has its length before it, so that no two
// holders have the same text.
func (h Holder) Text(index uint64) []byte {
	b := []byte("dsnode ticket 1\n")
	for _, part := range []string{h.ClusterID, h.Generation.ID, h.Node, h.Site} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(part))) //nolint:gosec // bounded by the preface
		b = append(b, part...)
	}
	b = binary.BigEndian.AppendUint64(b, h.Generation.Number)
	return binary.BigEndian.AppendUint64(b, index)
}

// Proves reports whether the key signed the ticket for this holder. A nil ticket proves
// nothing.
func (t *Ticket) Proves(h Holder, public []byte) bool {
	return t != nil && len(public) == ed25519.PublicKeySize && len(t.Signature) == ed25519.SignatureSize &&
		ed25519.Verify(public, h.Text(t.Index), t.Signature)
}

// Standing is what a node knows of the membership of its peers.
type Standing struct {
	ClusterID  string
	Generation Generation
	PublicKey  []byte // of the cluster key; nil: unknown
	// SiteOf finds a member.
	SiteOf func(node string) (site string, member bool)
	// WasRemoved is State.WasRemoved.
	WasRemoved func(node string, admitted uint64) bool
	// Applied is the raft index up to which SiteOf knows the members: a node that was
	// admitted later may be one although it does not find it.
	Applied uint64
}

// Member reports whether a node is a member: it stands in the state, or its ticket is newer
// than that.
func (s Standing) Member(node, site string, ticket *Ticket) bool {
	if at, known := s.SiteOf(node); known && at == site {
		return true
	}
	return ticket != nil && ticket.Index > s.Applied && !s.WasRemoved(node, ticket.Index) &&
		ticket.Proves(Holder{ClusterID: s.ClusterID, Generation: s.Generation, Node: node, Site: site}, s.PublicKey)
}

// MembersOnly reports whether the cluster has reached the level at which only members are
// served.
func (s *State) MembersOnly() bool { return s.FeatureLevel >= MembershipLevel }

// Standing is what this state, as applied up to an index, knows of the members.
func (s *State) Standing(applied uint64) Standing {
	return Standing{
		ClusterID: s.ClusterID, Generation: s.Generation, PublicKey: s.PublicKey(), Applied: applied, WasRemoved: s.WasRemoved,
		SiteOf: func(node string) (string, bool) {
			n, member := s.Nodes[node]
			return n.Site, member
		},
	}
}

// PublicKey is the public half of the cluster key, nil while there is none.
func (s *State) PublicKey() []byte {
	if s.ClusterKey == nil {
		return nil
	}
	return s.ClusterKey.Public
}

// Applicant finds a node that asked to join and is no member.
func (s *State) Applicant(name string) (Applicant, bool) {
	i := slices.IndexFunc(s.Waiting, func(a Applicant) bool { return a.Name == name })
	if i < 0 {
		return Applicant{}, false
	}
	return s.Waiting[i], true
}

// Admission is the answer to a node that asks to join.
type Admission int

// The answers.
const (
	Admit          Admission = iota
	Wait                     // until an operator admits it
	RefusedRemoved           // until an operator admits it again
)

// MayJoin says whether a node without data may become a member, or a member may go on:
// approve is access.join. A removed node needs an operator whatever that says, since its
// certificate may be in other hands.
func (s *State) MayJoin(name, site string, approve bool) Admission {
	if n, member := s.Nodes[name]; member && n.Site == site || !s.MembersOnly() {
		return Admit
	}
	if r, removed := s.Removal(name); removed {
		if r.AdmittedAt.IsZero() || r.Site != site {
			return RefusedRemoved
		}
		return Admit
	}
	if a, waits := s.Applicant(name); waits && a.Site == site && !a.AdmittedAt.IsZero() || !approve {
		return Admit
	}
	return Wait
}

// The data of the commands about membership.
type (
	// ClusterKeySet makes or replaces the cluster key if its public half is still Expect.
	ClusterKeySet struct {
		Expect      []byte `json:"expect,omitempty"` // nil: there is none yet
		Public      []byte `json:"public"`
		Sealed      []byte `json:"sealed"`
		OperatorKey string `json:"operator_key"`
	}
	// NodeWait notes that a node asked to join and waits for an operator.
	NodeWait struct {
		Name    string `json:"name"`
		Site    string `json:"site"`
		RPC     string `json:"rpc"`
		Version string `json:"version"`
	}
)

func (s *State) setClusterKey(d ClusterKeySet, at time.Time) error {
	switch {
	case !bytes.Equal(d.Expect, s.PublicKey()):
		return ErrClusterKeyChange
	case len(d.Public) != ed25519.PublicKeySize, len(d.Sealed) == 0, len(d.Sealed) > maxSealedKey, len(d.OperatorKey) > maxDataKeyName:
		return fmt.Errorf("%w: a public key of %d bytes, a sealed one of %d", ErrDataKeyRefused, len(d.Public), len(d.Sealed))
	}
	s.ClusterKey = &ClusterKey{Public: d.Public, Sealed: d.Sealed, OperatorKey: d.OperatorKey, Since: at}
	return nil
}

// wait changes nothing for a node that waits already, also if it has other addresses now:
// its requests must not fill the log.
func (s *State) wait(d NodeWait, at time.Time) error {
	if _, member := s.Nodes[d.Name]; member {
		return fmt.Errorf("%w: %s is a member", ErrStillMember, d.Name)
	}
	if a, waits := s.Applicant(d.Name); waits && a.Site == d.Site {
		return nil
	}
	for _, text := range []string{d.Name, d.Site, d.RPC, d.Version} {
		if len(text) > maxApplicantText {
			return fmt.Errorf("%w: a name or an address of %d bytes", ErrStateFull, len(text))
		}
	}
	waiting := s.withoutApplicant(d.Name)
	waiting = append(waiting, Applicant{Name: d.Name, Site: d.Site, RPC: d.RPC, Version: d.Version, At: at})
	s.Waiting = waiting[max(0, len(waiting)-maxWaiting):]
	return nil
}

func (s *State) withoutApplicant(name string) []Applicant {
	return slices.DeleteFunc(slices.Clone(s.Waiting), func(a Applicant) bool { return a.Name == name })
}
