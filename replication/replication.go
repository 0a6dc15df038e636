package replication

import (
	"cmp"
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

// Log is the part of *journal.Log that replication needs.
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

// Table is the part of *jobtable.Table that replication needs. It does not decode rows.
type Table interface {
	Applied(s journal.Stream) uint64
	Visible(s journal.Stream) uint64
	AppliedAll() map[journal.Stream]uint64
	Rows(after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error)
	Merge(ctx context.Context, frames []byte) error
	MergeSoon(frames []byte) error
	SetApplied(ctx context.Context, s journal.Stream, seq uint64) error
	SetAppliedAll(ctx context.Context, applied map[journal.Stream]uint64) error
	Digests() ([256][16]byte, error)
	Bucket(n byte, after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error)
	Jobs() int64
	// Partial reports whether the table may lack rows of records that are in no journal. It
	// is so for a new one, and after SetPartial, until SetWhole. Proven reports whether
	// SetWhole was ever called.
	Partial() bool
	PartialSince() time.Time
	Proven() bool
	// Rebuilding reports whether the table is partial because it still lacks records of this
	// node's own journals. SetWhole does nothing meanwhile.
	Rebuilding() bool
	SetPartial() error
	SetWhole() error
}

// Ring reports which data keys this node can open.
type Ring interface {
	Has(id keyring.KeyID) bool
	Changed() <-chan struct{}
}

// Limits of what replication uses. Zero means the default.
type Limits struct {
	// BulkBytesPerSecond bounds what this node sends to all peers together for catching up,
	// including snapshots (64 MiB). New records are not limited.
	BulkBytesPerSecond int
	// FeedBytesPerSecond bounds what this node sends of the feed (8 MiB).
	FeedBytesPerSecond int
	// Waiting bounds the concurrent calls of Await that wait (65536).
	Waiting int
}

// Options of a Replication. Caller and Limits are optional.
type Options struct {
	Self string // this node's name
	Dir  string // an existing directory, for durable.json
	Site string

	Log   Log
	Table Table
	Ring  Ring
	// Members returns the agreed nodes, including this one. It is called several times a
	// second and must not block.
	Members func() []Member
	// Current reports whether Members is up to date, as opposed to the state of the node's
	// last contact with others.
	Current func() bool
	// Dial returns the connection to a node, which the callee owns.
	Dial func(node string) (grpc.ClientConnInterface, error)
	// Caller returns the name of the calling node from a gRPC handler's context. Nil: that
	// of the mesh connection.
	Caller func(ctx context.Context) (node string, ok bool)
	// Retired reports whether the owner has retired a stream: it is neither pulled nor sent
	// any more.
	Retired func(s journal.Stream) bool
	// Boottime is a clock that never goes back, and runs during suspend.
	Boottime func() time.Duration

	// Deliver is called with items of the feed from other nodes; it must be quick.
	Deliver func(item []byte)

	Limits     Limits
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Replication is the replication of journals on one node. It does nothing before Run.
type Replication struct {
	opts      Options
	tracker   *tracker
	fresh     *freshness
	metrics   *metrics
	bulk      pacer
	changes   streamChanges
	lifecycle lifecycle
	feed      *feed
	note      *durableNote
	// completion makes the table complete.
	completion *completion
	pulled     atomic.Value // []string, the nodes pulled from
}

// ErrTooManyWaiting means that Limits.Waiting calls already wait for durability.
var ErrTooManyWaiting = errors.New("too many calls wait for durability")

// New makes a Replication. Register it for peers, then call Run.
func New(o Options) (*Replication, error) {
	o.Limits.Waiting = cmp.Or(o.Limits.Waiting, 65536)
	o.Limits.BulkBytesPerSecond = cmp.Or(o.Limits.BulkBytesPerSecond, 64<<20)
	o.Limits.FeedBytesPerSecond = cmp.Or(o.Limits.FeedBytesPerSecond, 8<<20)
	if o.Caller == nil {
		o.Caller = callerOf
	}
	r := &Replication{
		opts: o, tracker: newTracker(o.Self, o.Log.StoreEpoch(), o.Limits.Waiting, o.Retired, o.Logger),
		fresh:     &freshness{now: o.Boottime, own: map[string]*originCopy{}, copies: map[siteCopyKey]siteCopyAge{}},
		bulk:      pacer{now: o.Boottime, perSecond: o.Limits.BulkBytesPerSecond},
		changes:   streamChanges{subs: map[*changeSub]struct{}{}},
		lifecycle: lifecycle{pulls: map[string]*context.CancelFunc{}},
	}
	var damaged, err error
	if r.note, damaged, err = openDurableNote(o.Dir); err != nil {
		return nil, err
	}
	if damaged != nil {
		o.Logger.Error("the note of durable records is damaged; records are shown as less durable until peers report theirs", "err", damaged)
	}
	r.metrics = newMetrics(o.Registerer, r)
	r.completion = newCompletion(r)
	r.feed = &feed{r: r, pace: pacer{now: o.Boottime, perSecond: o.Limits.FeedBytesPerSecond}, outboxes: map[feedTarget]*outbox{}}
	r.tracker.setOwn(durable(o.Log.Ends()))
	r.tracker.setMembers(o.Members())
	return r, nil
}

// Register registers the rpc service. Calls are refused until Run.
func (r *Replication) Register(s grpc.ServiceRegistrar) {
	replicationpb.RegisterReplicationServer(s, &server{r: r})
}

// Await blocks until record seq of a stream that this node writes has the durability. The
// error is that of ctx, ErrTooManyWaiting, or ErrImpossible for an unknown durability. It
// also waits for a durability that the present nodes can't provide, since they may change.
func (r *Replication) Await(ctx context.Context, s journal.Stream, seq uint64, level journal.Durability) error {
	i := levelIndex(level)
	if i < 0 {
		return fmt.Errorf("%w: unknown durability %q", ErrImpossible, level)
	}
	return r.tracker.await(ctx, s, seq, i)
}

// DurabilityOf returns the strongest durability that a record is known to have. It never
// decreases for a record, not even after a restart, because it is noted on disk first; so
// it rises a moment after Await returns. It is empty when the record is not on this node's
// disk. A stream that this node no longer holds was retired, after all nodes had it.
func (r *Replication) DurabilityOf(s journal.Stream, seq uint64) journal.Durability {
	best := r.note.best(s, seq)
	if best == "" {
		end, held := r.opts.Log.End(s)
		switch {
		case !held && r.onTheWay(s):
			return "" // a row of the table arrived before the record
		case !held:
			return levels[len(levels)-1]
		case end.Durable >= seq:
			return journal.DurableNode // does not depend on the note
		}
	}
	return best
}

// onTheWay reports whether a stream that this node does not hold is held by others and not
// retired.
func (r *Replication) onTheWay(s journal.Stream) bool {
	return !r.opts.Retired(s) && r.tracker.heldElsewhere(s)
}

// Possible returns nil if the agreed nodes, when all are alive, can provide the durability,
// else ErrImpossible with what is missing.
func (r *Replication) Possible(level journal.Durability) error {
	self, members := r.members(func(Member) bool { return true })
	return possible(level, self, members)
}

// Reachable reports whether the nodes that are heard now can provide the durability.
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

// HeldByAll returns up to where every member holds a stream on its disk, as far as this
// node knows. Records up to there may be trimmed.
func (r *Replication) HeldByAll(s journal.Stream) uint64 { return r.tracker.heldByAll(s) }

// Holders returns up to where each member holds a stream, as far as this node knows.
func (r *Replication) Holders(s journal.Stream) map[string]uint64 {
	r.tracker.mu.Lock()
	defer r.tracker.mu.Unlock()
	held := map[string]uint64{}
	for _, n := range r.tracker.nodes {
		held[n] = r.tracker.marks[n].Ends[s]
	}
	return held
}

// durable returns only the durable end of each stream.
func durable(ends map[journal.Stream]journal.End) map[journal.Stream]uint64 {
	out := make(map[journal.Stream]uint64, len(ends))
	for s, e := range ends {
		out[s] = e.Durable
	}
	return out
}
