package replication

import (
	"errors"
	"fmt"
	"slices"

	"github.com/dsnode/dsnode/storage/journal"
)

// ErrImpossible means that the configured nodes can't provide a durability, even if all
// of them are alive.
var ErrImpossible = errors.New("not enough sites or nodes")

// Member is a node of the cluster as this node sees it.
type Member struct {
	Node, Site, City string
	// Heard reports whether the node answers pings at present. It is always true for this
	// node itself.
	Heard bool
	// Hears are the nodes whose pings it receives, by its own report.
	Hears map[string]bool
}

// levels are the durabilities, weakest first.
var levels = [...]journal.Durability{
	journal.DurableNode, journal.DurableSite, journal.DurableTwoSites, journal.DurableTwoCities,
}

func levelIndex(level journal.Durability) int { return slices.Index(levels[:], level) }

// counts reports whether a copy on node other, together with the writer's own, gives a
// record the durability. Each durability includes the weaker ones: a copy at another site
// survives what one on a neighbour survives, also while the neighbours are down.
func counts(level journal.Durability, writer, other Member) bool {
	switch level {
	case journal.DurableNode:
		return writer.Node == other.Node
	case journal.DurableSite:
		return writer.Node != other.Node
	case journal.DurableTwoSites:
		return writer.Site != other.Site
	case journal.DurableTwoCities:
		return writer.City != other.City
	}
	return false
}

// Satisfied reports whether a record that is on the disks of the writer and of the holders
// has the durability. Every durability needs the writer's own copy.
func Satisfied(level journal.Durability, writer Member, holders []Member) bool {
	own, other := false, false
	for _, h := range holders {
		own = own || h.Node == writer.Node
		other = other || counts(level, writer, h)
	}
	return own && other
}

// possible returns nil if some of the members can give a record of self the durability.
func possible(level journal.Durability, self Member, members []Member) error {
	switch {
	case levelIndex(level) < 0:
		return fmt.Errorf("%w: unknown durability %q", ErrImpossible, level)
	case Satisfied(level, self, append(members[:len(members):len(members)], self)):
		return nil
	case level == journal.DurableSite:
		return fmt.Errorf("%w: %q needs a second node, in site %s or in another one", ErrImpossible, level, self.Site)
	case level == journal.DurableTwoSites:
		return fmt.Errorf("%w: %q needs a node in a second site", ErrImpossible, level)
	}
	return fmt.Errorf("%w: %q needs a node in a second city", ErrImpossible, level)
}
