package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/failover"
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

// asyncJobs has everything of asynchronous jobs: the journals, the job table derived from
// them, their replication, and the service that accepts and executes jobs.
type asyncJobs struct {
	n           *Node
	clock       *journal.HLC
	sealer      *journal.Sealer
	log         *journal.Log
	table       *jobtable.Table
	replication *replication.Replication

	// service answers ErrNotReady until run has brought the table up to date.
	service *jobs.Jobs
	// stop ends service.Run, before the listeners close.
	stop atomic.Pointer[context.CancelFunc]
}

// openJournals opens the files. openReplication and openJobs make the other parts, when
// what they need is open.
func (n *Node) openJournals() error {
	j := &asyncJobs{n: n, clock: journal.NewHLC(n.host.Now, clockAhead), sealer: journal.NewSealer(n.keys.Ring)}
	var err error
	dir := filepath.Join(n.cfg.DataDir, jobsDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make a directory for jobs: %w", err)
	}
	if j.table, err = j.openTable(dir); err != nil {
		return err
	}
	n.onStop("job table", func() error { return j.table.Close() })
	j.log, err = journal.Open(journal.Options{
		Dir: filepath.Join(n.cfg.DataDir, journalDir), Clock: j.clock, Logger: n.log, Registerer: n.reg, Durable: j.table.Apply,
		BeforeWrite: n.host.BeforeWrite(host.WriteJournal), FreeBytes: n.host.FreeBytes(),
		Intact: n.dataDir.Intact,
	})
	if err != nil {
		return fmt.Errorf("open the journals: %w", err)
	}
	n.onStop("journals", j.log.Close)
	n.keys.AddStore("journals", journalStore{j.log, j.sealer})
	n.keys.AddStore("job table", tableStore{j.table})
	n.jobs = j
	return nil
}

// openTable opens the job table. A damaged table is discarded and rebuilt.
func (j *asyncJobs) openTable(dir string) (*jobtable.Table, error) {
	o := jobtable.Options{
		Dir: dir, Sealer: j.sealer, Ring: j.n.keys.Ring, Clock: j.clock, Logger: j.n.log, Registerer: j.n.reg,
		Retention: j.retention, Now: j.n.host.Now, BeforeCommit: j.n.host.BeforeWrite(host.WriteJobTable),
	}
	returns, err := cluster.Returns(j.n.cfg.DataDir)
	if err != nil {
		return nil, err
	}
	if returns {
		// The others have gone on without this node: it lacks how jobs ended there, and
		// must not execute them again.
		if err := jobtable.MarkPartial(dir); err != nil {
			return nil, err
		}
	}
	t, err := jobtable.Open(o)
	if errors.Is(err, jobtable.ErrDamaged) {
		j.n.log.Error("the job table is damaged, rebuilding it from the journals and from other nodes", "err", err)
		if err := jobtable.Discard(dir); err != nil {
			return nil, err
		}
		t, err = jobtable.Open(o)
	}
	return t, err
}

func (j *asyncJobs) retention() time.Duration {
	if j.n.cluster != nil {
		if s := j.n.cluster.State(); s.Parsed != nil {
			return s.Parsed.Jobs.Retention.D()
		}
	}
	return config.DefaultJobs().Retention.D()
}

// openJobs makes the service.
func (n *Node) openJobs() (err error) {
	j := n.jobs
	j.service, err = jobs.New(jobs.Options{
		Node: n.cfg.Name, Site: n.cfg.Site, Dir: filepath.Join(n.cfg.DataDir, jobsDir),
		Journal: j.log, Table: j.table, Sealer: j.sealer, Ring: n.keys.Ring, Replication: jobReplication{j.replication, j},
		Ownership: failover.NewOwnership(n.fence, n.cluster), State: n.cluster.State,
		Server: n.pipeline, Spare: j.spare, Heard: j.heard, Peers: j.peers,
		Host: n.host, Registerer: n.reg, Logger: n.log, Grace: n.cfg.Shutdown.Grace.D(),
	})
	return err
}

// run brings the table up to date, and then accepts, replicates and executes jobs until ctx
// ends. An error means that the node must stop.
func (j *asyncJobs) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return j.table.Run(ctx) })
	g.Go(func() error { return j.table.KeepFilled(ctx, j.log) })
	g.Go(func() error { return j.watchJournals(ctx) })
	g.Go(func() error {
		if !j.awaitReady(ctx) {
			return nil
		}
		if err := j.replay(ctx); err != nil {
			return err
		}
		starting, stop := context.WithCancel(ctx)
		defer stop()
		j.stop.Store(&stop)
		g.Go(func() error { return j.replication.Run(ctx) })
		g.Go(func() error { return j.n.replicateEntries(ctx) })
		adopter := failover.NewAdopter(j.n.failoverOptions(), j.n.judgement)
		g.Go(func() error { return j.n.cluster.WhileLeader(ctx, adopter.Lead) })
		return j.service.Run(starting)
	})
	return g.Wait()
}

// stopStarting ends service.Run: running jobs get their grace period, the others wait for
// the next start or for another owner.
func (j *asyncJobs) stopStarting() {
	if stop := j.stop.Load(); stop != nil {
		(*stop)()
	}
}

// watchJournals returns an error when the journals fail: after a failed write it is not known
// what is on the disk.
func (j *asyncJobs) watchJournals(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-j.log.Failed():
		return fmt.Errorf("this node's journals failed: %w", j.log.Err())
	}
}

// awaitReady waits until this node is a member and has the data keys.
func (j *asyncJobs) awaitReady(ctx context.Context) bool {
	if err := j.n.cluster.AwaitMember(ctx); err != nil {
		return false
	}
	for {
		changed := j.n.keys.Ring.Changed()
		if j.n.keys.Ring.Ready() {
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
func (j *asyncJobs) replay(ctx context.Context) error {
	began, streams := time.Now(), 0
	for s, end := range j.log.Ends() {
		from := j.table.Applied(s) + 1
		if from < end.First {
			// Records are trimmed only when the table has them: the table is an older one, or
			// the journal's files were removed. Replication gets the rows of other nodes.
			j.n.log.Warn("the job table lacks records that this node's journals no longer have, waiting for the rows of other nodes",
				"stream", s.String(), "from", from, "to", end.First-1)
			if err := j.table.SetPartial(); err != nil {
				return err
			}
			if err := j.table.SetApplied(ctx, s, end.First-1); err != nil {
				return err
			}
			from = end.First
		}
		if from > end.Durable {
			continue
		}
		streams++
		err := j.log.Replay(s, from, func(records []journal.Record) error {
			j.table.Apply(s, records)
			return nil
		})
		if err != nil {
			return fmt.Errorf("bring the job table up to date: %w", err)
		}
	}
	j.n.log.Info("job table is up to date", "streams", streams, "took", time.Since(began), "jobs", j.table.Counts())
	return nil
}

// spare is how many more jobs may start now. A part of the concurrency of the site's model
// servers is kept free for clients that wait for an answer.
func (j *asyncJobs) spare() int {
	free, most := j.n.fleet.Capacity()
	return free - (most+spareShare-1)/spareShare
}

// heard reports whether a node is heard now.
func (j *asyncJobs) heard(node string) bool {
	return node == j.n.cfg.Name || j.n.cluster.Peers()[node].HeardWithin(j.n.cluster.Timing().Patience)
}

// peers are the other living nodes, of this site too.
func (j *asyncJobs) peers() []upstream.Peer {
	patience := j.n.cluster.Timing().Patience
	var peers []upstream.Peer
	for name, p := range j.n.cluster.Peers() {
		if p.HeardWithin(patience) {
			peers = append(peers, j.n.upstreamPeer(name, p))
		}
	}
	return peers
}

// journalStore and tableStore are the stores of datakeys: they count and re-encrypt
// records.
type journalStore struct {
	log    *journal.Log
	sealer *journal.Sealer
}

func (s journalStore) Count(context.Context) (map[keyring.KeyID]int64, error) {
	return s.log.Carried(), nil
}

func (s journalStore) Reseal(ctx context.Context, _ keyring.KeyID) (int64, error) {
	return s.log.Reseal(ctx, s.sealer)
}

type tableStore struct{ table *jobtable.Table }

func (s tableStore) Count(ctx context.Context) (map[keyring.KeyID]int64, error) {
	return s.table.Carries(ctx)
}

func (s tableStore) Reseal(ctx context.Context, from keyring.KeyID) (int64, error) {
	if err := s.table.Reseal(ctx, from); err != nil {
		return 0, err
	}
	counts, err := s.table.Carries(ctx)
	return counts[from], err
}
