package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/replication"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	jobsDir    = "jobs" // has the table and the files of node/jobs
	journalDir = "journal"
	// clockAhead is how far the clock of a record may be ahead of this node's clock and
	// still advance the hybrid clock.
	clockAhead = 10 * time.Minute
	// One spareShare-th of the model servers' concurrency is kept free for clients that
	// wait for an answer.
	spareShare = 4
)

// work has everything of asynchronous jobs: the journals, the job table derived from them,
// their replication, the ownership of streams, and the jobs themselves.
type work struct {
	n           *Node
	clock       *journal.HLC
	sealer      *journal.Sealer
	log         *journal.Log
	table       *jobtable.Table
	replication *replication.Replication
	ownership   *failover.Ownership

	// jobs answers ErrNotReady until run has brought the table up to date.
	jobs *jobs.Jobs
	// stop ends jobs.Run, before the listeners close.
	stop atomic.Pointer[context.CancelFunc]
}

// openWork opens the files.
func (n *Node) openWork() error {
	w := &work{n: n, clock: journal.NewHLC(time.Now, clockAhead), sealer: journal.NewSealer(n.keys.Ring)}
	var err error
	dir := filepath.Join(n.cfg.DataDir, jobsDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make a directory for jobs: %w", err)
	}
	if w.table, err = w.openTable(dir); err != nil {
		return err
	}
	n.onStop("job table", func() error { return w.table.Close() })
	w.log, err = journal.Open(journal.Options{
		Dir: filepath.Join(n.cfg.DataDir, journalDir), Clock: w.clock, Logger: n.log, Registerer: n.reg, Durable: w.table.Apply,
	})
	if err != nil {
		return fmt.Errorf("open the journals: %w", err)
	}
	n.onStop("journals", w.log.Close)
	n.keys.Carry("journals", journalCarrier{w.log, w.sealer})
	n.keys.Carry("job table", tableCarrier{w.table})
	n.work = w
	return nil
}

// openTable opens the job table. A damaged table is discarded and rebuilt.
func (w *work) openTable(dir string) (*jobtable.Table, error) {
	o := jobtable.Options{
		Dir: dir, Sealer: w.sealer, Ring: w.n.keys.Ring, Clock: w.clock, Logger: w.n.log, Registerer: w.n.reg,
		Retention: w.retention,
	}
	t, err := jobtable.Open(o)
	if errors.Is(err, jobtable.ErrDamaged) {
		w.n.log.Error("the job table is damaged, rebuilding it from the journals and from other nodes", "err", err)
		if err := jobtable.Discard(dir); err != nil {
			return nil, err
		}
		t, err = jobtable.Open(o)
	}
	return t, err
}

func (w *work) retention() time.Duration {
	if w.n.cluster != nil {
		if s := w.n.cluster.State(); s.Parsed != nil {
			return s.Parsed.Jobs.Retention.D()
		}
	}
	return config.DefaultJobs().Retention.D()
}

// connect makes the parts that need the cluster.
func (w *work) connect() error {
	n := w.n
	w.ownership = failover.NewOwnership(n.fence, n.cluster)
	var err error
	w.replication, err = replication.New(replication.Options{
		Self: n.cfg.Name, Site: n.cfg.Site, Dir: filepath.Join(n.cfg.DataDir, jobsDir), Log: w.log, Table: w.table, Ring: n.keys.Ring, Members: w.members, Current: w.current,
		Dial:    func(node string) (grpc.ClientConnInterface, error) { return n.cluster.Mesh().ClientConn(node) },
		Retired: w.retired, Deliver: n.absorb, Boottime: clock.Boottime, Logger: n.log, Registerer: n.reg,
	})
	return err
}

// members are the nodes that hold journals, with this one.
func (w *work) members() []replication.Member {
	s := w.n.cluster.State()
	if s.Parsed == nil {
		return nil
	}
	patience := w.n.cluster.Timing().Patience
	peers := w.n.cluster.Peers()
	members := make([]replication.Member, 0, len(s.Nodes))
	for name, node := range s.Nodes {
		m := replication.Member{Node: name, Site: node.Site, City: s.Parsed.Sites[node.Site].City, Heard: name == w.n.cfg.Name}
		if p, known := peers[name]; known && p.Heard && p.Ago < patience {
			m.Heard, m.Hears = true, make(map[string]bool, len(p.HeardBy))
			for other, ago := range p.HeardBy {
				m.Hears[other] = p.Ago+ago < patience
			}
		}
		members = append(members, m)
	}
	return members
}

// current reports whether members is up to date: this node follows a leader with a quorum.
func (w *work) current() bool {
	raft := w.n.cluster.Raft()
	return raft.Quorum && raft.Ticked && raft.TickAgo < w.n.cluster.Timing().Patience
}

// retired reports whether no node needs the records of a stream any more: its owner has
// dropped it, or it was never agreed on, its origin is no member, and all its jobs have
// ended. (A stream with other jobs is inherited, see node/jobs.)
func (w *work) retired(s journal.Stream) bool {
	state, key := w.n.cluster.State(), agreed.StreamKey(s.Origin, s.Incarnation.String())
	if _, agreed := state.Streams[key]; agreed {
		return false
	}
	_, member := state.Nodes[s.Origin]
	if state.ClusterID == "" {
		return false
	}
	return slices.Contains(state.DoneStreams, key) || !member && !w.table.Partial() && w.table.LiveCounts()[s] == 0
}

// run brings the table up to date, and then accepts, replicates and executes jobs until ctx
// ends. An error means that the node must stop.
func (w *work) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return w.table.Run(ctx) })
	g.Go(func() error { return w.watchJournals(ctx) })
	g.Go(func() error {
		if !w.awaitReady(ctx) {
			return nil
		}
		if err := w.replay(ctx); err != nil {
			return err
		}
		starting, stop := context.WithCancel(ctx)
		defer stop()
		w.stop.Store(&stop)
		g.Go(func() error { return w.replication.Run(ctx) })
		g.Go(func() error { return w.n.passOn(ctx) })
		adopter := failover.NewAdopter(failover.Options{
			Name: w.n.cfg.Name, Site: w.n.cfg.Site, Agreement: w.n.cluster,
			Health:      func() cluster.Health { return w.n.surround.Load().health },
			Boottime:    clock.Boottime,
			Quarantined: func() bool { return w.n.cluster.Quarantined() != "" },
			Logger:      w.n.log, Registerer: w.n.reg,
		})
		g.Go(func() error { return w.n.cluster.WhileLeader(ctx, adopter.Lead) })
		return w.jobs.Run(starting)
	})
	return g.Wait()
}

// stopStarting ends jobs.Run: running jobs get their grace period, the others wait for the
// next start or for another owner.
func (w *work) stopStarting() {
	if stop := w.stop.Load(); stop != nil {
		(*stop)()
	}
}

// watchJournals returns an error when the journals fail: after a failed write it is not known
// what is on the disk.
func (w *work) watchJournals(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-w.log.Failed():
		return fmt.Errorf("this node's journals failed: %w", w.log.Err())
	}
}

// awaitReady waits until this node is a member and has the data keys.
func (w *work) awaitReady(ctx context.Context) bool {
	if err := w.n.cluster.AwaitMember(ctx); err != nil {
		return false
	}
	for {
		changed := w.n.keys.Ring.Changed()
		if w.n.keys.Ring.Ready() {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// replay applies the records that the table had not committed when the node last stopped.
func (w *work) replay(ctx context.Context) error {
	began, streams := time.Now(), 0
	for s, end := range w.log.Ends() {
		from := w.table.Applied(s) + 1
		if from < end.First {
			// Only a discarded table lacks records that the journals have trimmed. It is
			// partial until replication has the rows of other nodes.
			w.n.log.Warn("the job table lacks records that this node's journals no longer have, waiting for the rows of other nodes",
				"stream", s.String(), "from", from, "to", end.First-1)
			if err := w.table.SetApplied(ctx, s, end.First-1); err != nil {
				return err
			}
			from = end.First
		}
		if from > end.Durable {
			continue
		}
		streams++
		err := w.log.Replay(s, from, func(records []journal.Record) error {
			w.table.Apply(s, records)
			return nil
		})
		if err != nil {
			return fmt.Errorf("bring the job table up to date: %w", err)
		}
	}
	w.n.log.Info("job table is up to date", "streams", streams, "took", time.Since(began), "jobs", w.table.Counts())
	return nil
}

// openJobs makes the jobs; it needs the serving pipeline.
func (w *work) openJobs() (err error) {
	n := w.n
	w.jobs, err = jobs.New(jobs.Options{
		Node: n.cfg.Name, Site: n.cfg.Site, Dir: filepath.Join(n.cfg.DataDir, jobsDir),
		Journal: w.log, Table: w.table, Sealer: w.sealer, Ring: n.keys.Ring, Replication: jobReplication{w.replication, w},
		Ownership: w.ownership, State: n.cluster.State,
		Server: n.pipeline, Spare: w.spare, Heard: w.heard, Peers: w.peers,
		Registerer: n.reg, Logger: n.log, Grace: n.cfg.Shutdown.Grace.D(),
	})
	return err
}

// spare is how many more jobs may start now. A part of the concurrency of the site's model
// servers is kept free for clients that wait for an answer.
func (w *work) spare() int {
	free, most := w.n.fleet.Capacity()
	return free - (most+spareShare-1)/spareShare
}

// heard reports whether a node is heard now.
func (w *work) heard(node string) bool {
	if node == w.n.cfg.Name {
		return true
	}
	p, known := w.n.cluster.Peers()[node]
	return known && p.Heard && p.Ago < w.n.cluster.Timing().Patience
}

// peers are the other living nodes, of this site too.
func (w *work) peers() []upstream.Peer {
	n := w.n
	patience, client := n.cluster.Timing().Patience, n.cluster.Mesh().HTTPTransport()
	var peers []upstream.Peer
	for name, p := range n.cluster.Peers() {
		if p.Heard && p.Ago < patience {
			peers = append(peers, upstream.Peer{Node: name, Site: p.Site, Client: client, Draining: p.Draining})
		}
	}
	return peers
}

// status returns the counts of jobs, and how far the copies of each site are behind. Both
// are nil before run is ready.
func (w *work) status(s *agreed.State) (*admin.Jobs, map[string]replication.Copy) {
	c, err := w.jobs.Counts()
	if errors.Is(err, jobs.ErrNotReady) || s.Parsed == nil {
		return nil, nil
	}
	copies := make(map[string]replication.Copy, len(s.Parsed.Sites))
	for site := range s.Parsed.Sites {
		copies[site] = w.replication.Copy(site)
	}
	if err != nil { // rows are missing: the counts are unknown
		return &admin.Jobs{}, copies
	}
	return &admin.Jobs{Queued: &c.Queued, Running: &c.Running, Succeeded: &c.Succeeded, Failed: &c.Failed}, copies
}

// check compares the table with the journals, for operators and tests.
func (w *work) check(ctx context.Context) error {
	if _, err := w.jobs.Counts(); err != nil {
		return err
	}
	ends := w.log.Ends()
	if err := w.table.Check(ctx); err != nil {
		return err
	}
	for s, end := range ends {
		if applied := w.table.Applied(s); applied < end.Durable {
			return fmt.Errorf("the table has %s up to %d, the journal up to %d", s, applied, end.Durable)
		}
	}
	return nil
}

// jobReplication is a jobs.Replication that also looks at the journals.
type jobReplication struct {
	*replication.Replication
	w *work
}

// AwaitCaughtUp waits for the records of other nodes, and then for records that this node's
// own journals lost to damage: without them it is not known which jobs have ended.
func (r jobReplication) AwaitCaughtUp(ctx context.Context) error {
	said := ""
	for {
		if err := r.Replication.AwaitCaughtUp(ctx); err != nil {
			return err
		}
		damaged := r.w.damaged()
		if damaged == "" {
			return nil
		}
		if damaged != said {
			said = damaged
			r.w.n.log.Error("not executing jobs that were accepted before", "because", damaged)
		}
		select {
		case <-r.w.log.Changed():
		case <-ctx.Done():
			return fmt.Errorf("catch up: %w", ctx.Err())
		}
	}
}

// damaged says which records this node's own journals have lost; empty: none.
func (w *work) damaged() string {
	for s, end := range w.log.Ends() {
		if s.Origin == w.n.cfg.Name && end.Damaged != 0 {
			return fmt.Sprintf("its journal %s lost records %d to %d to damage, and no node that is heard has them: "+
				"start a node that has them, or remove this one (dsnode node remove) so that other nodes take over its jobs",
				s, end.Durable+1, end.Damaged)
		}
	}
	return ""
}

// partial says that the table is being rebuilt and may lack rows; empty: it is whole.
func (w *work) partial() string {
	if !w.table.Partial() {
		return ""
	}
	return "its job table was damaged and is being rebuilt with the rows of other nodes: until a node that has all rows is heard, " +
		"ask another node for jobs; jobs that were accepted here before are not executed"
}

// manyStreams bounds the agreed streams of a node. With more, a stream counts as spread
// although a member lacks records of it, because a member may be away for any time. That
// member gets rows of the table instead.
const manyStreams = 32

// Spread reports whether every member holds all of a stream.
func (r jobReplication) Spread(s journal.Stream) bool {
	if r.w.table.Partial() {
		return false // jobs that have not ended may be missing
	}
	end, held := r.w.log.End(s)
	if !held || r.HeldByAll(s) >= end.Durable {
		return true
	}
	count := 0
	for _, j := range r.w.n.cluster.State().Streams {
		if j.Origin == s.Origin {
			count++
		}
	}
	return count > manyStreams
}

// journalCarrier and tableCarrier are the stores for the data keys: they count and re-encrypt
// records.
type journalCarrier struct {
	log    *journal.Log
	sealer *journal.Sealer
}

func (c journalCarrier) Carries(context.Context) (map[keyring.KeyID]int64, error) {
	return c.log.Carried(), nil
}

func (c journalCarrier) Reseal(ctx context.Context, _ keyring.KeyID) (int64, error) {
	return c.log.Reseal(ctx, c.sealer)
}

type tableCarrier struct{ table *jobtable.Table }

func (c tableCarrier) Carries(ctx context.Context) (map[keyring.KeyID]int64, error) {
	return c.table.Carries(ctx)
}

func (c tableCarrier) Reseal(ctx context.Context, from keyring.KeyID) (int64, error) {
	if err := c.table.Reseal(ctx, from); err != nil {
		return 0, err
	}
	counts, err := c.table.Carries(ctx)
	return counts[from], err
}

// CheckJobs implements admin.JobsChecker.
func (n *Node) CheckJobs(ctx context.Context) error { return n.work.check(ctx) }

// JobStreams implements admin.JobsChecker.
func (n *Node) JobStreams(context.Context) (admin.JobStreams, error) {
	s := n.cluster.State()
	streams := admin.JobStreams{Ownership: s.Ownership, Data: make([]agreed.JobStream, 0, len(s.Streams))}
	for _, key := range slices.Sorted(maps.Keys(s.Streams)) {
		streams.Data = append(streams.Data, s.Streams[key])
	}
	return streams, nil
}
