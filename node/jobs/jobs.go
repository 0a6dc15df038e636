// Package jobs takes asynchronous jobs, keeps them, and runs them: once, on the
// node that owns the stream they were accepted in.
//
// A job is its records (storage/journal) joined to a row (storage/jobtable).
// Whoever changes a job writes a record; what a client sees is read from the row
// (view.go). Start reading at Jobs.Submit (submit.go) for the way in and at
// executor.run (executor.go) for the rest.
package jobs

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Options are what New needs. All but the last group are required.
type Options struct {
	Node, Site string
	// Dir is where the node notes which of its streams others may know of. It
	// exists, and is this package's alone.
	Dir string

	Journal     Journal
	Table       Table
	Sealer      *journal.Sealer
	Ring        *keyring.Ring
	Replication Replication
	Ownership   Ownership
	State       func() *agreed.State

	// Server answers the jobs' requests, the same one that the gateway has.
	Server serving.Server
	// Spare tells how many more jobs may run now, so that interactive requests
	// come first. It is asked before each start, and must not block.
	Spare func() int
	// Heard reports whether a node can be heard now.
	Heard func(node string) bool
	// Elsewhere lists the other living nodes, of this site too, for jobs that
	// have not arrived here yet.
	Elsewhere func() []upstream.Peer

	Registerer prometheus.Registerer
	Logger     *slog.Logger  // nil: discards
	Grace      time.Duration // for running jobs when Run ends; 0: 20 s
}

// Jobs is the jobs of one node.
type Jobs struct {
	o       Options
	log     *slog.Logger
	metrics *metrics
	ids     ids
	streams *streams
	exec    *executor
	keys    keyLocks
	// lastPossible is what the last submission was told of the agreed nodes.
	lastPossible atomic.Pointer[possibility]
	waits        *waits
	elsewhere
	closed atomic.Bool
}

// New makes the jobs of a node, before anything is applied to the table. It
// starts nothing.
func New(o Options) (*Jobs, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Grace <= 0 {
		o.Grace = 20 * time.Second
	}
	if o.Elsewhere == nil {
		o.Elsewhere = func() []upstream.Peer { return nil }
	}
	j := &Jobs{o: o, log: o.Logger, ids: ids{ring: o.Ring}, waits: newWaits(o.Journal.Ends()), elsewhere: elsewhere{peers: o.Elsewhere}}
	j.metrics = newMetrics(o.Registerer, o.Table)
	var err error
	if j.streams, err = newStreams(&j.o); err != nil {
		return nil, err
	}
	j.exec = newExecutor(&j.o, j.metrics, j.streams)
	o.Table.Watch(j.exec.observe)
	return j, nil
}

// Run takes and executes jobs until ctx ends; what runs then gets Options.Grace,
// and the rest waits for the next start. The journal must outlive it.
func (j *Jobs) Run(ctx context.Context) error {
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

// Counts are the jobs that this node knows of, of all nodes.
type Counts struct{ Queued, Running, Succeeded, Failed, Cancelled, Expired int64 }

// Counts reads them off the table.
func (j *Jobs) Counts() Counts {
	c := j.o.Table.Counts()
	return Counts{
		Queued: c[journal.Queued], Running: c[journal.Running], Succeeded: c[journal.Succeeded],
		Failed: c[journal.Failed], Cancelled: c[journal.Cancelled], Expired: c[journal.Expired],
	}
}

// config is never nil.
func (o *Options) config() config.Jobs {
	if s := o.State(); s != nil && s.Parsed != nil {
		return s.Parsed.Jobs
	}
	return config.DefaultJobs()
}
