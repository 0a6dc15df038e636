package jobs

import (
	"context"
	"slices"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// Journal is what jobs needs of the node's journal; *journal.Log implements it. When Append
// returns, the table has the records.
type Journal interface {
	Create(ctx context.Context, s journal.Stream) error
	Append(ctx context.Context, s journal.Stream, records []journal.Record) (last uint64, err error)
	Freeze(s journal.Stream) error
	Ends() map[journal.Stream]journal.End
}

// Table is what jobs needs of the job table; *jobtable.Table implements it.
type Table interface {
	Get(id journal.JobID) (jobtable.Row, bool, error)
	List(f jobtable.Filter) (rows []jobtable.Row, more bool, err error)
	FindKey(keyHash string) ([]journal.JobID, error)
	Live(s journal.Stream, yield func(jobtable.Row) bool) error
	LiveCounts() map[journal.Stream]int64
	Counts() map[journal.Status]int64
	Watch(f func(jobtable.Row))
	// Partial reports whether rows may be missing, because the table is new or was damaged
	// and other nodes' rows have not arrived.
	Partial() bool
	// Rebuilding reports whether even records of this node's own journals are missing: the
	// table's file was damaged and replaced.
	Rebuilding() bool
}

// Replication knows which nodes have a record on disk; *replication.Replication implements
// it.
type Replication interface {
	// Possible returns nil if the configured nodes can make a record of this node that
	// durable, else an error that says what is missing.
	Possible(level journal.Durability) error
	// Reachable reports whether the nodes that are heard now can make it that durable.
	Reachable(level journal.Durability) bool
	// Await blocks until the record is that durable, or ctx ends.
	Await(ctx context.Context, s journal.Stream, seq uint64, level journal.Durability) error
	// DurabilityOf is the highest level that the record is known to have.
	DurabilityOf(s journal.Stream, seq uint64) journal.Durability
	// AwaitCaughtUp blocks until this node's table has every record that a living node
	// holds.
	AwaitCaughtUp(ctx context.Context) error
	// AwaitEnded does the same. Then ended tells of which streams this node has all that
	// their origin will ever write to them, by the origin's own word.
	AwaitEnded(ctx context.Context) (ended func(journal.Stream) bool, err error)
	// CaughtUp reports whether this node's table is complete and this process has received
	// what the nodes that are heard held when it first heard them.
	CaughtUp() bool
	// Spread reports whether every member has all records of a stream, or no longer needs
	// them.
	Spread(s journal.Stream) bool
}

// Ownership knows which streams this node owns, whose jobs it may start;
// *failover.Ownership implements it. agreed.StreamKey names a stream.
type Ownership interface {
	Check(stream string) (failover.Permit, error)
	Mine() []agreed.JobStream
	Changed() <-chan struct{}
	Leased() bool
	Open(ctx context.Context, incarnation string) (agreed.FenceToken, error)
	Inherit(ctx context.Context, origin, incarnation string) error
	Drop(ctx context.Context, streams ...string) error
}

// levels are the durabilities. Each one survives more than the one before.
var levels = []journal.Durability{journal.DurableNode, journal.DurableSite, journal.DurableTwoSites, journal.DurableTwoCities}

// levelOf is the place of a durability in levels, -1 for an unknown one.
func levelOf(d journal.Durability) int { return slices.Index(levels, d) }
