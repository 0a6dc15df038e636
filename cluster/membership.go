package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/storage/atomicfile"
)

const membershipFormat = 1

// memberFile is what a node must know before raft can run: which cluster it
// belongs to, and where it last met the others. It holds no secret.
type memberFile struct {
	Format      int               `json:"format"`
	ClusterID   string            `json:"cluster_id"`
	Name        string            `json:"name"`
	Generation  agreed.Generation `json:"generation"`
	HeartbeatMS int64             `json:"heartbeat_ms"`
	Nodes       []agreed.Node     `json:"nodes"`
	// Founder is true from the bootstrap until the cluster's first entry is
	// known: only then may this node bootstrap empty raft stores. Later, empty
	// stores mean a lost disk, and a second founding would be a second cluster.
	Founder bool `json:"founder,omitempty"`
	// VoteFrom is the entry that let this node in; see voterTransport.
	VoteFrom uint64 `json:"vote_from,omitempty"`
}

func (m memberFile) membership() mesh.Membership {
	return mesh.Membership{ClusterID: m.ClusterID, Generation: m.Generation}
}

func (m memberFile) heartbeat() time.Duration {
	return time.Duration(m.HeartbeatMS) * time.Millisecond
}

func memberPath(dir string) string { return filepath.Join(dir, "cluster.json") }

// readMemberFile gives a zero file when there is none: the node is new.
func readMemberFile(dir string) (memberFile, error) {
	b, err := os.ReadFile(memberPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return memberFile{}, nil
	}
	if err != nil {
		return memberFile{}, fmt.Errorf("read membership: %w", err)
	}
	var m memberFile
	if err := json.Unmarshal(b, &m); err != nil {
		return memberFile{}, fmt.Errorf("%s is damaged (%w): restore it from a backup, or wipe the data directory to join again", memberPath(dir), err)
	}
	if m.Format > membershipFormat {
		return memberFile{}, fmt.Errorf("%s has format %d, this version reads up to %d: %w", memberPath(dir), m.Format, membershipFormat, agreed.ErrUnknownCommand)
	}
	return m, nil
}

// writeMemberFile replaces the file so that a crash leaves the old one or the
// new one.
func writeMemberFile(dir string, m memberFile) error {
	m.Format = membershipFormat
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("encode membership: %w", err)
	}
	if err := atomicfile.Replace(memberPath(dir), append(b, '\n')); err != nil {
		return fmt.Errorf("write membership: %w", err)
	}
	return nil
}
