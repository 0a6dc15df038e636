// Package operate carries out what operators ask of a node: its status, changes of the
// agreed configuration, API keys, nodes and upstreams, failovers, drills, data keys and
// the cache. node/admin serves it over HTTP. Start at Operator; each subject has a file.
package operate

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/gossip"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/datakeys"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/replication"
)

// Cluster is what an Operator needs of *cluster.Cluster.
type Cluster interface {
	State() *agreed.State
	Bootstrap(ctx context.Context, configText []byte, author string) error
	Propose(ctx context.Context, t agreed.CommandType, data any) (index uint64, err error)
	Timing() config.Timing
	StartedAt() time.Time
	Raft() cluster.RaftView
	AgreedAge() (age time.Duration, known bool)
	// StateBytes is the size of the agreed state, of which API keys may fill
	// agreed.MaxBytesForKeys.
	StateBytes() int
	Peers() map[string]cluster.PeerView
	DiskSpeed() cluster.DiskSpeed // of this node's disk
	Members() []gossip.Member
	// Waiting says what the node waits for before it is a member, Quarantined why its
	// Raft leader changes nothing, LeftBehind that the cluster was recovered without
	// it. Each is empty when that is not so.
	Waiting() string
	Quarantined() string
	LeftBehind() string
	// RemovedError says that this node was removed; nil: it has not learned that it was.
	RemovedError() error
}

// Jobs is what an Operator needs of the node's asynchronous jobs.
type Jobs interface {
	// Status returns the counts of jobs and, by site, how far its copies are behind.
	// Unknown is nil and absent.
	Status(s *agreed.State) (*admin.Jobs, map[string]replication.Copy)
	// Problems says what is wrong with the node's journals.
	Problems() []string
	// Alone is what only a node has, as far as this one knows.
	Alone(node string) replication.Alone
	// Missing says why this node may lack jobs that other nodes have; empty: it doesn't.
	Missing() string
	// Check returns nil if the job table agrees with the journals.
	Check(ctx context.Context) error
}

// Control changes the primary, and rehearses that in drills.
type Control struct {
	Coordinator *failover.Coordinator
	Drills      *drill.Runner
}

// Operator does what operators ask of one node. It implements admin.Cluster. All fields
// are required.
type Operator struct {
	ClusterName, Name, Site, Version string

	Cluster Cluster
	Jobs    Jobs
	Fleet   *upstream.Fleet
	Cache   *cache.Cache
	Keys    *datakeys.Keys
	// Control returns nil before the node is a member.
	Control func() *Control
	// Reconnect ends this node's part in an isolation drill, and reports whether it had
	// one.
	Reconnect func(drill string) bool
	// EndQuarantine lets a quarantined Raft leader make changes again.
	EndQuarantine func()
	// Health is what the node tells its peers about itself.
	Health func() cluster.Health
	// Starting says what the node has not caught up with since its start; empty: nothing.
	Starting func() string
	// SetDraining takes the node out of load balancers, or puts it back.
	SetDraining func(draining bool)
	Host        *host.Host // nil: this machine
	Log         *slog.Logger
}

var _ admin.Cluster = (*Operator)(nil)

// control returns an error that says why this node is not a member, if it is none.
func (o *Operator) control() (*Control, error) {
	if c := o.Control(); c != nil {
		return c, nil
	}
	return nil, o.notMember()
}

// notMember says why this node has no agreed state yet.
func (o *Operator) notMember() error {
	if why := o.Cluster.Waiting(); why != "" {
		return fmt.Errorf("%w; %s", cluster.ErrNotMember, why)
	}
	return fmt.Errorf("%w: %s", cluster.ErrNoQuorum, noState)
}

const noState = "this node has not received the agreed state since its start"

// sortedNames returns the keys of m, sorted.
func sortedNames[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
