package jobs

import (
	"context"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// Journal is what jobs needs of the node's journal; *journal.Log is one. The
// table must show a record when Append returns.
type Journal interface {
	Create(ctx context.Context, s journal.Stream) error
	Append(ctx context.Context, s journal.Stream, records []journal.Record) (last uint64, err error)
	Freeze(s journal.Stream) error
	Ends() map[journal.Stream]journal.End
}

// Table is what jobs needs of the rows; *jobtable.Table is one.
type Table interface {
	Get(id journal.JobID) (jobtable.Row, bool, error)
	List(f jobtable.Filter) (rows []jobtable.Row, more bool, err error)
	FindKey(keyHash string) ([]journal.JobID, error)
	Live(s journal.Stream, yield func(jobtable.Row) bool) error
	LiveCounts() map[journal.Stream]int64
	Counts() map[journal.Status]int64
	Watch(f func(jobtable.Row))
}

// Replication tells where a record is on disk; *replication.Replication is one.
type Replication interface {
	// Possible gives nil when the configured nodes can make a record of this node
	// that durable, else an error that says what is missing.
	Possible(level journal.Durability) error
	// Reachable reports whether the nodes that can be heard now can do it.
	Reachable(level journal.Durability) bool
	// Await blocks until the record is that durable, or ctx ends.
	Await(ctx context.Context, s journal.Stream, seq uint64, level journal.Durability) error
	// DurabilityOf is the best level that is known to be true now.
	DurabilityOf(s journal.Stream, seq uint64) journal.Durability
	// AwaitCaughtUp blocks until this node's table shows what every living node
	// holds, of all streams.
	AwaitCaughtUp(ctx context.Context) error
	// Spread reports whether all members have all of a stream, or need it no more.
	Spread(s journal.Stream) bool
}

// Ownership says which streams' jobs may be started here; *failover.Ownership
// is one. Streams are named by cluster.StreamKey.
type Ownership interface {
	Check(stream string) (failover.Permit, error)
	Mine() []cluster.JobStream
	Changed() <-chan struct{}
	Leased() bool
	Open(ctx context.Context, incarnation string) (cluster.FenceToken, error)
	Inherit(ctx context.Context, origin, incarnation string) error
	Drop(ctx context.Context, streams ...string) error
}

// level orders the durabilities: each is lost in fewer cases than the one
// before. -1 for what is none.
func levelOf(d journal.Durability) int {
	switch d {
	case journal.DurableNode:
		return 0
	case journal.DurableSite:
		return 1
	case journal.DurableTwoSites:
		return 2
	case journal.DurableTwoCities:
		return 3
	}
	return -1
}

func tokenOf(t cluster.FenceToken) journal.Token {
	return journal.Token{Generation: t.Generation, Index: t.Index}
}

// sleep waits, or gives the reason why ctx ended.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
