package agreed

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// ErrNotRemoved refuses to admit a node that neither waits nor was removed, or was removed
// so long ago that State.Removed no longer has it.
var ErrNotRemoved = errors.New("no such removed or waiting node")

// removalLevel is the feature level from which on the state notes removals.
const removalLevel = 2

// maxRemovals bounds State.Removed. A node that was dropped from it is still refused, by
// State.RemovedBefore, but it can't be admitted again with its data.
const maxRemovals = 64

// Removal is a node that was removed and has not joined again.
type Removal struct {
	Name  string    `json:"name"`
	Site  string    `json:"site"`
	By    string    `json:"by,omitempty"`
	At    time.Time `json:"at"`
	Index uint64    `json:"index"` // of the raft entry that removed it
	// AdmittedAt is when an operator allowed the node to join again with its data; zero:
	// it is not allowed.
	AdmittedAt time.Time `json:"admitted_at,omitzero"`
	AdmittedBy string    `json:"admitted_by,omitempty"`
}

// WasRemoved reports whether a node was removed that became a member by the raft entry
// admitted (0: it founded the cluster). It is never true for a member, however old the
// state is: the state of a removal is newer than the entry that admitted the removed node.
//
//   - A name that is no member: all admissions before RemovedBefore are in the state, and
//     this one has ended.
//   - A name that is a member: it was removed and joined again, and this is the disk from
//     before.
func (s *State) WasRemoved(name string, admitted uint64) bool {
	if n, member := s.Nodes[name]; member {
		return admitted < n.Admitted
	}
	return admitted < s.RemovedBefore
}

// Removal is what the state says about a removed node; false if it is not in Removed.
func (s *State) Removal(name string) (Removal, bool) {
	i := slices.IndexFunc(s.Removed, func(r Removal) bool { return r.Name == name })
	if i < 0 {
		return Removal{}, false
	}
	return s.Removed[i], true
}

func (s *State) noteRemoval(r Removal) {
	s.RemovedBefore = max(s.RemovedBefore, r.Index)
	kept := slices.DeleteFunc(slices.Clone(s.Removed), func(o Removal) bool { return o.Name == r.Name })
	kept = append(kept, r)
	s.Removed = kept[max(0, len(kept)-maxRemovals):]
}

// admitNode changes what the leader answers to the removed node; the node becomes a
// member when it joins.
func (s *State) admitNode(d NodeAdmit, at time.Time) error {
	if w := slices.IndexFunc(s.Waiting, func(a Applicant) bool { return a.Name == d.Name }); w >= 0 {
		s.Waiting = slices.Clone(s.Waiting)
		s.Waiting[w].AdmittedAt, s.Waiting[w].AdmittedBy = at, d.By
		return nil
	}
	i := slices.IndexFunc(s.Removed, func(r Removal) bool { return r.Name == d.Name })
	if i < 0 {
		return fmt.Errorf("%w: %s", ErrNotRemoved, d.Name)
	}
	s.Removed = slices.Clone(s.Removed)
	s.Removed[i].AdmittedAt, s.Removed[i].AdmittedBy = at, d.By
	return nil
}

// endRemoval is called when a name joins again. A node that comes back with its data may
// have records of streams that were dropped because their origin was gone: they are
// needed again. One with an empty disk has none.
func (s *State) endRemoval(name string, empty bool) {
	r, removed := s.Removal(name)
	if !removed {
		return
	}
	s.Removed = slices.DeleteFunc(slices.Clone(s.Removed), func(o Removal) bool { return o.Name == name })
	if !r.AdmittedAt.IsZero() && !empty {
		s.DoneStreams = slices.DeleteFunc(slices.Clone(s.DoneStreams), func(key string) bool {
			return strings.HasPrefix(key, StreamKey(name, ""))
		})
	}
}
