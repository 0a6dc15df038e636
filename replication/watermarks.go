package replication

import (
	"github.com/dsnode/dsnode/storage/journal"
)

// Held is what one node has on its disk: the last record of each stream. The epoch
// rises when the node lost records; only then may a number decrease.
type Held struct {
	Epoch uint64
	Ends  map[journal.Stream]uint64
}

// Watermarks is what is known of the nodes' disks, by node. Only the node itself
// reports its watermarks; other nodes forward them, late, repeatedly and in any order.
// So they are merged by the higher epoch and, within one epoch, the higher number.
type Watermarks map[string]Held

// Merge merges what another node knows, and calls changed, which may be nil, for each
// number that changes. It is commutative, idempotent and associative.
func (m Watermarks) Merge(o Watermarks, changed func(holder string, s journal.Stream)) {
	for holder, theirs := range o {
		ours, known := m[holder]
		switch {
		case known && theirs.Epoch < ours.Epoch:
			continue
		case !known || theirs.Epoch > ours.Epoch:
			// Streams that are missing under the new epoch have changed too.
			if changed != nil {
				for s := range ours.Ends {
					if _, still := theirs.Ends[s]; !still {
						changed(holder, s)
					}
				}
			}
			ours = Held{Epoch: theirs.Epoch, Ends: make(map[journal.Stream]uint64, len(theirs.Ends))}
			m[holder] = ours
		}
		for s, seq := range theirs.Ends {
			if was, had := ours.Ends[s]; !had || seq > was {
				ours.Ends[s] = seq
				if changed != nil {
					changed(holder, s)
				}
			}
		}
	}
}

// HeldByAll returns up to where all of the nodes hold a stream.
func (m Watermarks) HeldByAll(s journal.Stream, nodes []string) uint64 {
	if len(nodes) == 0 {
		return 0
	}
	least := m[nodes[0]].Ends[s]
	for _, n := range nodes[1:] {
		least = min(least, m[n].Ends[s])
	}
	return least
}

// MostHeld returns up to where any node holds a stream.
func (m Watermarks) MostHeld(s journal.Stream) uint64 {
	most := uint64(0)
	for _, h := range m {
		most = max(most, h.Ends[s])
	}
	return most
}
