// Package jobs accepts asynchronous jobs, stores them, and runs each of them on the node
// that owns the stream in which it was accepted.
//
// A job is a set of records (storage/journal), which the job table merges to one row
// (storage/jobtable). Every change of a job is a record; clients see what view.go reads
// from the row. Start reading at Jobs.Submit (submit.go) for submissions and at
// executor.run (executor.go) for execution.
package jobs

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Options are what New needs. All but Peers and the last group are required.
type Options struct {
	Node, Site string
	// Dir is where the node stores which of its streams are islands. It exists, and only
	// this package writes there.
	Dir string

	Journal     Journal
	Table       Table
	Sealer      *journal.Sealer
	Ring        *keyring.Ring
	Replication Replication
	Ownership   Ownership
	State       func() *agreed.State // never nil

	// Server answers the jobs' requests. It is the gateway's.
	Server serving.Server
	// Spare returns how many more jobs may start now, so that interactive requests come
	// first. It is called before jobs are started, and must not block.
	Spare func() int
	// Heard reports whether a node can be heard now.
	Heard func(node string) bool
	// Peers lists the other living nodes, of this site too. They are asked for
	// jobs that this node doesn't know. nil: none.
	Peers func() []upstream.Peer

	Host       *host.Host // nil: this machine
	Registerer prometheus.Registerer
	Logger     *slog.Logger  // nil: discards
	Grace      time.Duration // for running jobs when Run ends; 0: 20 s
}

// Jobs are the jobs of one node.
type Jobs struct {
	o       Options
	log     *slog.Logger
	metrics *metrics
	ids     ids
	streams *streams
	exec    *executor
	keys    keyLocks
	// lastPossible is the last result of possible.
	lastPossible atomic.Pointer[possibility]
	waits        *waits
	relayed      relayedEnds
	ready        atomic.Bool // Run has begun
	closed       atomic.Bool // Run has ended
}

// New makes the jobs of a node and starts nothing. Until Run is called, all methods
// answer ErrNotReady. While the table may lack rows, they answer ErrPartial wherever
// a missing row would make the answer wrong.
func New(o Options) (*Jobs, error) {
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	o.Grace = cmp.Or(o.Grace, 20*time.Second)
	if o.Peers == nil {
		o.Peers = func() []upstream.Peer { return nil }
	}
	j := &Jobs{o: o, log: o.Logger, ids: ids{ring: o.Ring}, waits: newWaits(o.Journal.Ends()), relayed: relayedEnds{ids: map[journal.JobID]bool{}}}
	j.metrics = newMetrics(o.Registerer, j)
	var err error
	if j.streams, err = newStreams(&j.o); err != nil {
		return nil, err
	}
	j.exec = newExecutor(&j.o, j.metrics, j.streams)
	return j, nil
}

// Run accepts and executes jobs until ctx ends. Jobs that run then get Options.Grace
// to finish; the others wait for the next start. It is called once, after the table
// has all that the journal holds. The journal must outlive it.
func (j *Jobs) Run(ctx context.Context) error {
	j.o.Table.Watch(j.exec.observe)
	j.ready.Store(true)
	defer j.closed.Store(true)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return j.streams.run(ctx, j.exec) })
	g.Go(func() error { return j.exec.run(ctx) })
	err := g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// AwaitStarted blocks until the start of every running job is on this node's disk. During a
// switchover away from this node's site no further jobs start.
func (j *Jobs) AwaitStarted(ctx context.Context) error { return j.exec.awaitStarted(ctx) }

// Writes is the stream that this node writes now; false before the first one.
func (j *Jobs) Writes() (journal.Stream, bool) {
	s, _, begun := j.streams.current()
	return s, begun
}

// Counts are the jobs of all nodes that this node knows of.
type Counts struct{ Queued, Running, Succeeded, Failed, Cancelled, Expired int64 }

// Counts counts the rows of the table. The error is ErrNotReady or ErrPartial.
func (j *Jobs) Counts() (Counts, error) {
	if err := j.complete(); err != nil {
		return Counts{}, err
	}
	c := j.o.Table.Counts()
	return Counts{
		Queued: c[journal.Queued], Running: c[journal.Running], Succeeded: c[journal.Succeeded],
		Failed: c[journal.Failed], Cancelled: c[journal.Cancelled], Expired: c[journal.Expired],
	}, nil
}

// Problem says in words why jobs of this node can't start, or are not safe from its loss;
// empty: nothing is wrong.
func (j *Jobs) Problem() string {
	if !j.ready.Load() || j.closed.Load() {
		return ""
	}
	return j.streams.problem()
}

// complete is nil when the table has all rows that this node can have.
func (j *Jobs) complete() error {
	switch {
	case !j.ready.Load():
		return ErrNotReady
	case j.o.Table.Partial():
		return ErrPartial
	}
	return nil
}

// share is the percent of the queue's bounds that the tenant of a submission may use; 0: all.
func (o *Options) share(sub *journal.Submission) int {
	if s := o.State(); s.Parsed != nil {
		return s.Parsed.ShareOf(sub.KeyID, sub.Tenant)
	}
	return 0
}

// config is the agreed configuration of jobs, or the default one.
func (o *Options) config() config.Jobs {
	if s := o.State(); s.Parsed != nil {
		return s.Parsed.Jobs
	}
	return config.DefaultJobs()
}
