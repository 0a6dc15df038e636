package replication

import (
	"maps"

	"github.com/dsnode/dsnode/storage/journal"
)

// Held is what one node has on its disk: the last record of each stream. Epoch
// rises when the node lost something, so that what it holds may go down.
type Held struct {
	Epoch uint64
	Ends  map[journal.Stream]uint64
}

// Marks is what is known of the nodes' disks, by node. Each is told by its node
// alone and passed on by the others, late, twice and in any order: so they merge
// by taking the higher epoch and under the same epoch the higher number.
type Marks map[string]Held

// Merge takes in what another node knows and calls changed, which may be nil,
// for each number that is new. Merging is commutative, idempotent and
// associative.
func (m Marks) Merge(o Marks, changed func(holder string, s journal.Stream)) {
	for holder, theirs := range o {
		ours, known := m[holder]
		switch {
		case known && theirs.Epoch < ours.Epoch:
			continue
		case !known || theirs.Epoch > ours.Epoch:
			// What is gone under the new epoch has changed as well.
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

// Clone copies the marks.
func (m Marks) Clone() Marks {
	c := make(Marks, len(m))
	for holder, h := range m {
		c[holder] = Held{Epoch: h.Epoch, Ends: maps.Clone(h.Ends)}
	}
	return c
}

// HeldByAll is up to where every one of the nodes holds a stream.
func (m Marks) HeldByAll(s journal.Stream, nodes []string) uint64 {
	if len(nodes) == 0 {
		return 0
	}
	least := m[nodes[0]].Ends[s]
	for _, n := range nodes[1:] {
		least = min(least, m[n].Ends[s])
	}
	return least
}

// MostHeld is up to where any node holds a stream.
func (m Marks) MostHeld(s journal.Stream) uint64 {
	most := uint64(0)
	for _, h := range m {
		most = max(most, h.Ends[s])
	}
	return most
}
