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

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/node/serving"
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
	State       func() *cluster.State

	// Server answers the jobs' requests, the same one that the gateway has.
	Server serving.Server
	// Parse reads a request's body as the gateway does (gateway.Parse).
	Parse func(endpoint string, body []byte) (*serving.Request, error)
	// Spare tells how many more jobs may run now, so that interactive requests
	// come first. It is asked before each start, and must not block.
	Spare func() int
	// Heard reports whether a node can be heard now.
	Heard func(node string) bool
	// Peers lists the other living nodes, of this site too. They are asked for
	// jobs that this node doesn't know. nil: none.
	Peers func() []serving.Peer

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
	ready        atomic.Bool // Run has begun
	closed       atomic.Bool // Run has ended
}

// New makes the jobs of a node and starts nothing. Until Run is called, all methods
// answer ErrNotReady. While the table may lack rows, they answer ErrPartial wherever
// a missing row would make the answer wrong.
func New(o Options) (*Jobs, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Grace <= 0 {
		o.Grace = 20 * time.Second
	}
	if o.Peers == nil {
		o.Peers = func() []serving.Peer { return nil }
	}
	j := &Jobs{o: o, log: o.Logger, ids: ids{ring: o.Ring}, waits: newWaits(o.Journal.Ends())}
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

// config is never nil.
func (o *Options) config() cluster.Jobs {
	if s := o.State(); s != nil && s.Parsed != nil {
		return s.Parsed.Jobs
	}
	return cluster.DefaultJobs()
}
