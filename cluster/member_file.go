package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/storage/atomicfile"
)

const (
	memberFileFormat = 1
	memberFileEvery  = 2 * time.Second // between checks for new addresses
)

// memberFile has what a node must know before raft can run: the cluster that it
// belongs to, and the last known addresses of the other nodes. It contains no secret.
type memberFile struct {
	Format      int               `json:"format"`
	ClusterID   string            `json:"cluster_id"`
	Name        string            `json:"name"`
	Generation  agreed.Generation `json:"generation"`
	HeartbeatMS int64             `json:"heartbeat_ms"`
	Nodes       []agreed.Node     `json:"nodes"`
	// Founder is true from the bootstrap until this node has applied the cluster's
	// first entry. Only then may it bootstrap empty raft stores: later, empty stores
	// mean a lost disk, and a bootstrap would create a second cluster.
	Founder bool `json:"founder,omitempty"`
	// VoteFrom is the index of the entry that admitted this node; see
	// voterTransport.
	VoteFrom uint64 `json:"vote_from,omitempty"`
	// StoreLost is true from a start with empty raft stores until this node is admitted
	// again: until then it does not vote; see rejoin_vote.go.
	StoreLost bool `json:"store_lost,omitempty"`
	// Ticket proves this node's admission; nil: it has none yet.
	Ticket *agreed.Ticket `json:"ticket,omitempty"`
	// ClusterKey verifies the tickets of others; nil below agreed.MembershipLevel. With it
	// and with Nodes, which are those of the raft index NodesAt, a node knows the members
	// before its agreed state is restored.
	ClusterKey []byte `json:"cluster_key,omitempty"`
	NodesAt    uint64 `json:"nodes_at,omitempty"`
	// Removed says that this node was removed; empty: it is a member. See removal.go.
	Removed string `json:"removed,omitempty"`
}

func (m memberFile) membership() mesh.Membership {
	return mesh.Membership{ClusterID: m.ClusterID, Generation: m.Generation, Admitted: m.VoteFrom, Ticket: m.Ticket}
}

func (m memberFile) standing() agreed.Standing {
	return agreed.Standing{
		ClusterID: m.ClusterID, Generation: m.Generation, PublicKey: m.ClusterKey, Applied: m.NodesAt,
		WasRemoved: func(string, uint64) bool { return false },
		SiteOf: func(node string) (string, bool) {
			i := slices.IndexFunc(m.Nodes, func(n agreed.Node) bool { return n.Name == node })
			if i < 0 {
				return "", false
			}
			return m.Nodes[i].Site, true
		},
	}
}

func (m memberFile) heartbeat() time.Duration {
	return time.Duration(m.HeartbeatMS) * time.Millisecond
}

func memberPath(dir string) string { return filepath.Join(dir, "cluster.json") }

// readMemberFile returns a zero memberFile if there is none: the node is new.
func readMemberFile(dir string) (memberFile, error) {
	b, err := os.ReadFile(memberPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return memberFile{}, nil
	}
	if err != nil {
		return memberFile{}, fmt.Errorf("read member file: %w", err)
	}
	var m memberFile
	if err := json.Unmarshal(b, &m); err != nil {
		return memberFile{}, fmt.Errorf("%s is damaged (%w): restore it from a backup, or wipe the data directory to join again", memberPath(dir), err)
	}
	if m.Format > memberFileFormat {
		return memberFile{}, fmt.Errorf("%s has format %d, this version reads up to %d: %w", memberPath(dir), m.Format, memberFileFormat, agreed.ErrUnknownCommand)
	}
	return m, nil
}

// writeMemberFile replaces the file atomically: after a crash it is the old one or the
// new one.
func writeMemberFile(dir string, m memberFile) error {
	m.Format = memberFileFormat
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("encode member file: %w", err)
	}
	if err := atomicfile.Replace(memberPath(dir), append(b, '\n')); err != nil {
		return fmt.Errorf("write member file: %w", err)
	}
	return nil
}

// keepMemberFile keeps the member file's list of nodes up to date for the next start.
func (c *Cluster) keepMemberFile(ctx context.Context) error {
	tick := time.NewTicker(memberFileEvery)
	defer tick.Stop()
	removed := c.removed
	for {
		changed := c.Changed()
		if err := c.updateMemberFile(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return c.updateMemberFile()
		case <-changed:
		case <-tick.C:
		case <-removed:
			removed = nil
		}
	}
}

func (c *Cluster) updateMemberFile() error {
	c.memberMu.Lock()
	defer c.memberMu.Unlock()
	applied := c.fsm.applied.Load() // before the state: it may be too low then, never too high
	s, m := c.State(), *c.member.Load()
	removed := c.removedWhy()
	if removed != "" && m.Removed == "" {
		m.Removed = removed
		if err := c.setMember(m); err != nil {
			c.log.Warn("could not note that this node was removed; at its next start it asks again", "err", err)
			return nil
		}
	}
	if s.ClusterID == "" || removed != "" {
		return nil
	}
	nodes := make([]agreed.Node, 0, len(s.Nodes))
	for name, n := range s.Nodes {
		if known, ok := c.book.node(name); ok && known.StartedAt.After(n.StartedAt) {
			known.JoinedAt, known.Admitted = n.JoinedAt, n.Admitted
			n = known
		}
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b agreed.Node) int { return strings.Compare(a.Name, b.Name) })
	var key []byte
	if s.MembersOnly() {
		key = s.PublicKey()
	}
	if !m.Founder && slices.Equal(nodes, m.Nodes) && bytes.Equal(key, m.ClusterKey) {
		return nil
	}
	m.Nodes, m.NodesAt, m.ClusterKey, m.Founder = nodes, applied, key, false
	if err := c.setMember(m); err != nil {
		c.log.Warn("could not save the addresses of the nodes; the next start uses older ones", "err", err)
	}
	return nil
}
