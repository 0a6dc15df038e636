package cluster

import (
	"maps"
	"slices"
	"sync"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// addressBook has the addresses of each node. They come from the agreed state, from
// gossip, and from the nodes themselves over the rpc port. The agreed state may be
// old (a whole site was restarted with other addresses while there was no quorum), so
// an address from the node itself has precedence; otherwise that of the process that
// started later.
type addressBook struct {
	mu      sync.RWMutex // guards entries
	entries map[string]agreed.Node
}

// recordDirect stores what a node sent about itself over an authenticated connection.
func (b *addressBook) recordDirect(n agreed.Node) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, known := b.entries[n.Name]; !known && len(b.entries) >= agreed.MaxNodes {
		return
	}
	b.entries[n.Name] = n
}

// recordIndirect stores what another source says about a node, if there is no entry
// of a process that started at the same time or later.
func (b *addressBook) recordIndirect(n agreed.Node) {
	if n.RPC == "" {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	old, known := b.entries[n.Name]
	if !known && len(b.entries) >= agreed.MaxNodes {
		return
	}
	if known && !n.StartedAt.After(old.StartedAt) {
		return
	}
	b.entries[n.Name] = n
}

// remove drops a removed node.
func (b *addressBook) remove(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.entries, name)
}

// node returns a node's entry.
func (b *addressBook) node(name string) (agreed.Node, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	n, ok := b.entries[name]
	return n, ok
}

// rpc returns a node's rpc address.
func (b *addressBook) rpc(name string) (string, bool) {
	n, ok := b.node(name)
	return n.RPC, ok && n.RPC != ""
}

// all returns every known node.
func (b *addressBook) all() []agreed.Node {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return slices.Collect(maps.Values(b.entries))
}
