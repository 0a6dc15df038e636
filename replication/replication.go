package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Log is what replication needs of the journals; *journal.Log is one.
type Log interface {
	StoreEpoch() uint64
	Ends() map[journal.Stream]journal.End
	End(s journal.Stream) (journal.End, bool)
	Changed() <-chan struct{}
	Read(s journal.Stream, from uint64, maxBytes int) (frames []byte, next uint64, err error)
	Receive(ctx context.Context, s journal.Stream, frames []byte) (durable uint64, err error)
	ReceiveFrom(s journal.Stream, first uint64) error
	Trim(s journal.Stream, keepFrom uint64) error
	Shrink(applied func(journal.Stream) uint64) (map[journal.Stream]uint64, error)
	Drop(s journal.Stream) error
}

// Table is what replication needs of the jobs' table; *jobtable.Table is one.
// Rows are opaque here.
type Table interface {
	Applied(s journal.Stream) uint64
	AppliedAll() map[journal.Stream]uint64
	Rows(after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error)
	Merge(ctx context.Context, frames []byte) error
	SetApplied(ctx context.Context, s journal.Stream, seq uint64) error
	Digests() ([256][16]byte, error)
	Bucket(n byte, after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error)
	// Partial is true while the table, made anew, may lack rows of trimmed records;
	// SetWhole ends that.
	Partial() bool
	SetWhole() error
}

// Ring tells which data keys this node can open.
type Ring interface {
	Has(id keyring.KeyID) bool
	Changed() <-chan struct{}
}

// Limits bound what replication takes. Zero is the default.
type Limits struct {
	// BulkBytesPerSecond bounds what this node sends to those that catch up, and
	// of snapshots, to all together (64 MiB). What is new is not bounded by it.
	BulkBytesPerSecond int
	// FeedBytesPerSecond bounds what this node sends of the feed (8 MiB).
	FeedBytesPerSecond int
	// Waiting bounds the calls of Await that wait at one time (65536).
	Waiting int
}

// Options are what a Replication is made of. All but Current, Caller, Retired,
// Deliver and Limits are needed.
type Options struct {
	Self string // this node's name
	Dir  string // exists, and holds one file of replication's own
	Site string

	Log   Log
	Table Table
	Ring  Ring
	// Members are the agreed nodes, this one among them. Called several times a
	// second; must not block.
	Members func() []Member
	// Current reports whether Members are what is agreed on now, not what was when
	// this node last heard. Nil: they always are.
	Current func() bool
	// Dial gives the channel to a node; it stays the giver's.
	Dial func(node string) (grpc.ClientConnInterface, error)
	// Caller names the node that calls, from a gRPC handler's context. Nil: as
	// cluster's mesh knows it.
	Caller func(ctx context.Context) (node string, ok bool)
	// Retired reports whether a stream was given up by all: nothing of it is wanted
	// or offered any more. Nil: none is.
	Retired func(s journal.Stream) bool
	// Boottime is a clock that never goes back.
	Boottime func() time.Duration

	// Deliver takes items of the feed that other nodes offered; it must be quick.
	// Nil: they are dropped.
	Deliver func(item []byte)

	Limits     Limits
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Replication is one node's part in carrying journals. It does nothing before
// Run.
type Replication struct {
	opts    Options
	ledger  *ledger
	fresh   *freshness
	metrics *metrics
	bulk    pacer
	news    news
	life    life
	feed    *feed
	reached *reachedNote
	pulled  atomic.Value // []string, the nodes pulled from
}

// ErrTooManyWaiting means that more calls wait for durability than are allowed.
var ErrTooManyWaiting = errors.New("too many wait for durability")

// New makes a Replication that Register offers to peers and Run sets going.
func New(o Options) (*Replication, error) {
	if o.Limits.Waiting == 0 {
		o.Limits.Waiting = 65536
	}
	if o.Limits.BulkBytesPerSecond == 0 {
		o.Limits.BulkBytesPerSecond = 64 << 20
	}
	if o.Limits.FeedBytesPerSecond == 0 {
		o.Limits.FeedBytesPerSecond = 8 << 20
	}
	if o.Current == nil {
		o.Current = func() bool { return true }
	}
	if o.Caller == nil {
		o.Caller = callerOf
	}
	r := &Replication{
		opts: o, ledger: newLedger(o.Self, o.Log.StoreEpoch(), o.Limits.Waiting, o.Logger),
		fresh: newFreshness(o.Boottime),
		bulk:  pacer{now: o.Boottime, perSecond: o.Limits.BulkBytesPerSecond},
		news:  news{subs: map[*headlines]struct{}{}},
		life:  life{pulls: map[string]*context.CancelFunc{}},
	}
	var damaged, err error
	if r.reached, damaged, err = openReached(o.Dir); err != nil {
		return nil, err
	}
	if damaged != nil {
		o.Logger.Error("what was known of the durability of jobs is lost, and learned anew", "err", damaged)
	}
	r.metrics = newMetrics(o.Registerer, r)
	r.feed = newFeed(r)
	r.ledger.setOwn(durable(o.Log.Ends()))
	r.ledger.setMembers(o.Members())
	return r, nil
}

// Register offers the journals to peers. They are refused until Run.
func (r *Replication) Register(s grpc.ServiceRegistrar) {
	replicationpb.RegisterReplicationServer(s, &server{r: r})
}

// Await blocks until record seq of a stream that this node writes is durable to
// the level. The error is that of ctx, ErrTooManyWaiting or ErrImpossible (for
// what is no level; what the topology can't give is waited for: it may change).
func (r *Replication) Await(ctx context.Context, s journal.Stream, seq uint64, level journal.Durability) error {
	i := levelIndex(level)
	if i < 0 {
		return fmt.Errorf("%w: %q is none", ErrImpossible, level)
	}
	return r.ledger.await(ctx, s, seq, i)
}

// Reached is the strongest durability that a record is known to have, and will
// be known to have: what it says of a record never gets weaker, also after a
// restart, so it comes a moment later than Await returns. Empty when the record is
// not on this node's disk. A stream that this node holds no more was given up by
// all, once all had it.
func (r *Replication) Reached(s journal.Stream, seq uint64) journal.Durability {
	best := r.reached.best(s, seq)
	if best == "" {
		end, held := r.opts.Log.End(s)
		switch {
		case !held && r.onTheWay(s):
			return "" // its row was faster
		case !held:
			return levels[len(levels)-1]
		case end.Durable >= seq:
			return journal.DurableNode // with or without a note
		}
	}
	return best
}

// onTheWay reports whether a stream that is not held here is held by others,
// and not given up by all.
func (r *Replication) onTheWay(s journal.Stream) bool {
	return (r.opts.Retired == nil || !r.opts.Retired(s)) && r.ledger.elsewhere(s)
}

// Possible is nil when the agreed nodes, alive or not, can give the durability,
// else ErrImpossible with what is missing.
func (r *Replication) Possible(level journal.Durability) error {
	self, members := r.members(func(Member) bool { return true })
	return possible(level, self, members)
}

// Reachable reports whether the nodes that are heard now can give the durability.
func (r *Replication) Reachable(level journal.Durability) bool {
	self, members := r.members(func(m Member) bool { return m.Heard })
	return possible(level, self, members) == nil
}

func (r *Replication) members(keep func(Member) bool) (self Member, kept []Member) {
	self = Member{Node: r.opts.Self, Site: r.opts.Site}
	for _, m := range r.opts.Members() {
		if m.Node == r.opts.Self {
			self = m
		}
		if m.Node == r.opts.Self || keep(m) {
			kept = append(kept, m)
		}
	}
	return self, kept
}

// HeldByAll is up to where every member holds a stream on its disk, as far as
// this node knows: what is up to there may be trimmed.
func (r *Replication) HeldByAll(s journal.Stream) uint64 { return r.ledger.heldByAll(s) }

// Holders is up to where each member holds a stream, as far as this node knows.
func (r *Replication) Holders(s journal.Stream) map[string]uint64 {
	r.ledger.mu.Lock()
	defer r.ledger.mu.Unlock()
	held := map[string]uint64{}
	for _, n := range r.ledger.nodes {
		held[n] = r.ledger.marks[n].Ends[s]
	}
	return held
}

// durable is the ends alone.
func durable(ends map[journal.Stream]journal.End) map[journal.Stream]uint64 {
	out := make(map[journal.Stream]uint64, len(ends))
	for s, e := range ends {
		out[s] = e.Durable
	}
	return out
}
