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
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/replication"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	jobsDir    = "jobs" // of the table, and of what node/jobs notes
	journalDir = "journal"
	// clockAhead is how far a peer's clock may be ahead of this node's before it is
	// no longer followed.
	clockAhead = 10 * time.Minute
	// spareShare of the room at the model servers is left to clients that wait.
	spareShare = 4 // a quarter
)

// work is this node's part in asynchronous jobs: the journals, the table that is
// derived from them, what carries them to other nodes, and who executes them.
type work struct {
	n           *Node
	clock       *journal.HLC
	sealer      *journal.Sealer
	log         *journal.Log
	table       *jobtable.Table
	replication *replication.Replication
	ownership   *failover.Ownership

	// jobs is nil until this node is a member, has the data keys and has brought
	// its table up to date.
	jobs atomic.Pointer[jobs.Jobs]
	// stop ends the starting of jobs, before the node's doors close.
	stop atomic.Pointer[context.CancelFunc]
}

// openWork opens the files. The cluster's services are registered by serve.
func (n *Node) openWork() error {
	w := &work{n: n, clock: journal.NewHLC(time.Now, clockAhead), sealer: journal.NewSealer(n.keys.ring)}
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
	n.keys.carry("journals", journalCarrier{w.log, w.sealer})
	n.keys.carry("job table", tableCarrier{w.table})
	n.work = w
	return nil
}

// openTable makes a damaged table anew: it is derived.
func (w *work) openTable(dir string) (*jobtable.Table, error) {
	o := jobtable.Options{
		Dir: dir, Sealer: w.sealer, Ring: w.n.keys.ring, Clock: w.clock, Logger: w.n.log, Registerer: w.n.reg,
		Retention: w.retention,
	}
	t, err := jobtable.Open(o)
	if errors.Is(err, jobtable.ErrDamaged) {
		w.n.log.Error("the job table is damaged; it is made anew from the journals and from other nodes", "err", err)
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

// connect makes what needs the cluster.
func (w *work) connect() error {
	n := w.n
	w.ownership = failover.NewOwnership(n.fence, n.cluster)
	var err error
	w.replication, err = replication.New(replication.Options{
		Self: n.cfg.Name, Site: n.cfg.Site, Dir: filepath.Join(n.cfg.DataDir, jobsDir), Log: w.log, Table: w.table, Ring: n.keys.ring, Members: w.members, Current: w.current,
		Dial:    func(node string) (grpc.ClientConnInterface, error) { return n.cluster.Mesh().ClientConn(node) },
		Retired: w.retired, Deliver: n.absorb, Boottime: clock.Boottime, Logger: n.log, Registerer: n.reg,
	})
	return err
}

// members are the nodes that carry journals, this one among them.
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
		if p := peers[name]; p.HeardWithin(patience) {
			m.Heard, m.Hears = true, make(map[string]bool, len(p.HeardBy))
			for other := range p.HeardBy {
				m.Hears[other] = p.HearsWithin(patience, other)
			}
		}
		members = append(members, m)
	}
	return members
}

// current reports whether members are what is agreed on now.
func (w *work) current() bool {
	raft := w.n.cluster.Raft()
	return raft.Quorum && raft.Ticked && raft.TickAgo < w.n.cluster.Timing().Patience
}

// retired reports whether nobody needs a stream's records any more: its owner was
// done with it, or it was never agreed on, its origin is no member, and nothing in
// it is left to do. What is left somebody asks for.
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

// run brings the table up to date and then takes, carries and executes jobs
// until ctx ends. An error means that this node must not go on.
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
		j, err := jobs.New(w.options())
		if err != nil {
			return err
		}
		starting, stop := context.WithCancel(ctx)
		defer stop()
		w.stop.Store(&stop)
		w.jobs.Store(j)
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
		return j.Run(starting)
	})
	return g.Wait()
}

// stopStarting ends the executor: what runs gets its grace, the rest waits for
// the next start, or for another owner.
func (w *work) stopStarting() {
	if stop := w.stop.Load(); stop != nil {
		(*stop)()
	}
}

// watchJournals ends the node when its journals fail: after a failed write
// nobody knows what is on the disk.
func (w *work) watchJournals(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-w.log.Failed():
		return fmt.Errorf("this node's journals failed: %w", w.log.Err())
	}
}

// awaitReady waits until this node is a member and can open its records.
func (w *work) awaitReady(ctx context.Context) bool {
	if err := w.n.cluster.AwaitMember(ctx); err != nil {
		return false
	}
	for {
		changed := w.n.keys.ring.Changed()
		if w.n.keys.ring.Ready() {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// replay applies what the table had not committed when the node last stopped.
func (w *work) replay(ctx context.Context) error {
	began, streams := time.Now(), 0
	for s, end := range w.log.Ends() {
		from := w.table.Applied(s) + 1
		if from < end.First {
			// Only a table that was made anew lacks what its journals have dropped. It is
			// partial until replication has the rows from other nodes.
			w.n.log.Warn("the job table lacks records that this node's journals no longer hold; the rows come from other nodes",
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

func (w *work) options() jobs.Options {
	n := w.n
	return jobs.Options{
		Node: n.cfg.Name, Site: n.cfg.Site, Dir: filepath.Join(n.cfg.DataDir, jobsDir),
		Journal: w.log, Table: w.table, Sealer: w.sealer, Ring: n.keys.ring, Replication: jobReplication{w.replication, w},
		Ownership: w.ownership, State: n.cluster.State,
		Server: n.pipeline, Parse: gateway.Parse, Spare: w.spare, Heard: w.heard, Elsewhere: w.elsewhere,
		Registerer: n.reg, Logger: n.log, Grace: n.cfg.Shutdown.Grace.D(),
	}
}

// spare is how many more jobs may run now: a part of the room at the site's
// model servers is for those who wait.
func (w *work) spare() int {
	free, most := w.n.pipeline.Room()
	return free - (most+spareShare-1)/spareShare
}

// heard reports whether a node can be heard now.
func (w *work) heard(node string) bool {
	return node == w.n.cfg.Name || w.n.cluster.Peers()[node].HeardWithin(w.n.cluster.Timing().Patience)
}

// elsewhere are the other living nodes, of this site too.
func (w *work) elsewhere() []serving.Peer {
	n := w.n
	patience, client := n.cluster.Timing().Patience, n.cluster.Mesh().HTTPTransport()
	var peers []serving.Peer
	for name, p := range n.cluster.Peers() {
		if p.HeardWithin(patience) {
			peers = append(peers, serving.Peer{Node: name, Site: p.Site, Client: client, Draining: p.Draining})
		}
	}
	return peers
}

// status is what this node knows of jobs, and of how far the copies of each site
// are behind; nothing before it carries any.
func (w *work) status(s *agreed.State) (*admin.Jobs, map[string]replication.Copy) {
	j := w.jobs.Load()
	if j == nil || s.Parsed == nil {
		return nil, nil
	}
	c := j.Counts()
	copies := make(map[string]replication.Copy, len(s.Parsed.Sites))
	for site := range s.Parsed.Sites {
		copies[site] = w.replication.Copy(site)
	}
	if w.table.Partial() {
		return &admin.Jobs{}, copies // what is there is not what there is
	}
	return &admin.Jobs{Queued: &c.Queued, Running: &c.Running, Succeeded: &c.Succeeded, Failed: &c.Failed}, copies
}

// check compares the journals with the table, for an operator and for tests.
func (w *work) check(ctx context.Context) error {
	if w.jobs.Load() == nil {
		return jobs.ErrNotReady
	}
	if w.table.Partial() {
		return jobs.ErrPartial
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

// jobReplication adds what the journals know.
type jobReplication struct {
	*replication.Replication
	w *work
}

// AwaitCaughtUp waits for what other nodes hold, and then for what this node's
// own journals have lost to damage: without it nobody knows which jobs were done.
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
			r.w.n.log.Error("jobs that were accepted before are not executed here", "because", damaged)
		}
		select {
		case <-r.w.log.Changed():
		case <-ctx.Done():
			return fmt.Errorf("catch up: %w", ctx.Err())
		}
	}
}

// damaged says what this node's own journals have lost, in words; empty: nothing.
func (w *work) damaged() string {
	for s, end := range w.log.Ends() {
		if s.Origin == w.n.cfg.Name && end.Damaged != 0 {
			return fmt.Sprintf("its journal %s lost records %d to %d to damage, and no node that is heard has them: "+
				"bring back a node that has, or remove this one (dsnode node remove) so that others take its jobs over",
				s, end.Durable+1, end.Damaged)
		}
	}
	return ""
}

// partial says in words that the table was made anew and isn't whole yet; empty:
// it is.
func (w *work) partial() string {
	if !w.table.Partial() {
		return ""
	}
	return "its job table was damaged and is made anew with the rows of other nodes: until a node that has them all is heard, " +
		"ask another node for jobs; those that were accepted here before are not executed"
}

// manyStreams is from how many agreed streams of a node on they are done with
// although some member lacks records of theirs: it gets rows instead, since
// nothing bounds how long a member is away.
const manyStreams = 32

// Spread reports whether every member holds all of a stream.
func (r jobReplication) Spread(s journal.Stream) bool {
	if r.w.table.Partial() {
		return false // it may be that jobs look done which are not known yet
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

// journalCarrier and tableCarrier are the stores as the keyring sees them.
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
