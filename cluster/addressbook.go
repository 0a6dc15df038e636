package cluster

import (
	"sync"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// addressBook knows where each node can be reached. Addresses come from the
// agreed state, from gossip, and from the nodes themselves when they speak over
// the rpc port. The agreed state may be old (a whole site restarted elsewhere
// while there was no quorum), so what a node said itself counts most, and
// otherwise the later start of the process.
type addressBook struct {
	mu      sync.RWMutex // guards entries
	entries map[string]bookEntry
}

type bookEntry struct {
	node   agreed.Node
	direct bool // the node itself said so, over mutual TLS
}

func newAddressBook() *addressBook {
	return &addressBook{entries: map[string]bookEntry{}}
}

// heard records what a node said of itself over an authenticated connection.
func (b *addressBook) heard(n agreed.Node) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, known := b.entries[n.Name]; !known && len(b.entries) >= agreed.MaxNodes {
		return
	}
	b.entries[n.Name] = bookEntry{node: n, direct: true}
}

// learn records hearsay: kept unless something better is known.
func (b *addressBook) learn(n agreed.Node) {
	if n.RPC == "" {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	old, known := b.entries[n.Name]
	if !known && len(b.entries) >= agreed.MaxNodes {
		return
	}
	if known && !n.StartedAt.After(old.node.StartedAt) {
		return
	}
	b.entries[n.Name] = bookEntry{node: n}
}

// forget drops a removed node.
func (b *addressBook) forget(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.entries, name)
}

// node gives what is known of a node.
func (b *addressBook) node(name string) (agreed.Node, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	e, ok := b.entries[name]
	return e.node, ok
}

// rpc gives a node's rpc address.
func (b *addressBook) rpc(name string) (string, bool) {
	n, ok := b.node(name)
	return n.RPC, ok && n.RPC != ""
}

// all gives every known node.
func (b *addressBook) all() []agreed.Node {
	b.mu.RLock()
	defer b.mu.RUnlock()
	nodes := make([]agreed.Node, 0, len(b.entries))
	for _, e := range b.entries {
		nodes = append(nodes, e.node)
	}
	return nodes
}
