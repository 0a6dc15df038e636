package jobs

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// agreement is the cluster as Ownership sees it: a state that commands change, and a lease
// that the test controls.
type agreement struct {
	boot func() time.Duration

	mu      sync.Mutex // guards all below
	state   *agreed.State
	index   uint64
	changed chan struct{}
	leased  bool
	refuse  error // of proposals
}

func newAgreement(boot func() time.Duration) *agreement {
	cfg := config.Config{Jobs: config.DefaultJobs()}
	return &agreement{
		boot: boot, index: 10, changed: make(chan struct{}),
		state: &agreed.State{
			ClusterID: "c", Generation: agreed.Generation{Number: 1}, Parsed: &cfg, Primary: agreed.Primary{Site: "here", Epoch: 7},
			Nodes: map[string]agreed.Node{"here-1": {Name: "here-1", Site: "here"}, "here-2": {Name: "here-2", Site: "here"}, "there-1": {Name: "there-1", Site: "there"}},
		},
	}
}

func (a *agreement) State() *agreed.State {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state
}

func (a *agreement) Changed() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

func (a *agreement) OwnershipLease() (left time.Duration, ownership uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.leased {
		return 0, a.state.Ownership
	}
	return time.Second, a.state.Ownership
}

func (a *agreement) Lease() (left time.Duration, epoch uint64) {
	left, _ = a.OwnershipLease()
	return left, a.State().Primary.Epoch
}

func (a *agreement) LeaseChanged() <-chan struct{} { return nil } // no Fence runs here

func (a *agreement) Propose(_ context.Context, t agreed.CommandType, data any) (uint64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refuse != nil {
		return 0, a.refuse
	}
	text, err := json.Marshal(data)
	if err != nil {
		return 0, err
	}
	a.index++
	next, err := agreed.Apply(a.state, agreed.Command{Format: 1, Type: t, At: time.Now(), Data: text, Term: 1, Index: a.index})
	if err != nil {
		return 0, err
	}
	parsed := a.state.Parsed
	a.state = next
	if a.state.Parsed == nil {
		a.state.Parsed = parsed
	}
	close(a.changed)
	a.changed = make(chan struct{})
	return a.index, nil
}

func (a *agreement) lease(on bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.leased = on
}

func (a *agreement) refuseAll(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refuse = err
}

func (a *agreement) configure(change func(*config.Jobs)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	next, cfg := *a.state, *a.state.Parsed
	change(&cfg.Jobs)
	next.Parsed = &cfg
	a.state = &next
}

// give makes another node the owner of a stream.
func (a *agreement) give(t *testing.T, s journal.Stream, to string) {
	t.Helper()
	j := a.State().Streams[keyOf(s)]
	_, err := a.Propose(t.Context(), agreed.CmdStreamOwn, agreed.StreamOwn{Stream: keyOf(s), Owner: to, Expect: j.Token, Reason: "test", Term: 1})
	if err != nil {
		t.Fatal(err)
	}
}

// copies is a fake Replication. The test sets how durable records are.
type copies struct {
	behind atomic.Bool // CaughtUp is false

	mu        sync.Mutex // guards all below
	possible  map[journal.Durability]bool
	reachable map[journal.Durability]bool
	reached   journal.Durability
	of        map[string]journal.Durability // by origin, instead of reached
	changed   chan struct{}
	caughtUp  chan struct{} // closed: all streams are caught up
	asked     int           // calls of AwaitCaughtUp
	ended     func(journal.Stream) bool
}

func newCopies() *copies {
	done := make(chan struct{})
	close(done)
	return &copies{
		ended:   func(journal.Stream) bool { return false },
		reached: journal.DurableNode, changed: make(chan struct{}), caughtUp: done,
		possible:  map[journal.Durability]bool{journal.DurableNode: true},
		reachable: map[journal.Durability]bool{journal.DurableNode: true},
	}
}

var errImpossibleHere = errors.New("needs another node")

func (c *copies) Possible(level journal.Durability) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.possible[level] {
		return errImpossibleHere
	}
	return nil
}

func (c *copies) Reachable(level journal.Durability) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reachable[level]
}

func (c *copies) DurabilityOf(s journal.Stream, _ uint64) journal.Durability {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d, told := c.of[s.Origin]; told {
		return d
	}
	return c.reached
}

func (c *copies) Await(ctx context.Context, s journal.Stream, seq uint64, level journal.Durability) error {
	for {
		c.mu.Lock()
		changed, ok := c.changed, levelOf(c.reached) >= levelOf(level)
		c.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (c *copies) CaughtUp() bool { return !c.behind.Load() }

func (c *copies) Spread(journal.Stream) bool { return true }

func (c *copies) AwaitCaughtUp(ctx context.Context) error {
	c.mu.Lock()
	done := c.caughtUp
	c.asked++
	c.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *copies) AwaitEnded(context.Context) (func(journal.Stream) bool, error) { return c.ended, nil }

// say sets the levels that the configuration allows, that the living nodes allow, and that
// records have reached.
func (c *copies) say(possible, reachable, reached journal.Durability) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range []journal.Durability{journal.DurableNode, journal.DurableSite, journal.DurableTwoSites, journal.DurableTwoCities} {
		c.possible[l] = levelOf(l) <= levelOf(possible)
		c.reachable[l] = levelOf(l) <= levelOf(reachable)
	}
	c.reached = reached
	close(c.changed)
	c.changed = make(chan struct{})
}

// sayOf sets how durable the records of one origin are.
func (c *copies) sayOf(origin string, reached journal.Durability) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of == nil {
		c.of = map[string]journal.Durability{}
	}
	c.of[origin] = reached
}

// world is a node with real files that can be restarted.
type world struct {
	t      testing.TB
	dir    string
	ring   *keyring.Ring
	agreed *agreement
	copies *copies
	server func(ctx context.Context, r serving.Request, s serving.Sink) error
	spare  atomic.Int64
	node   string
	limit  time.Duration // of until
	poll   time.Duration

	*Jobs
	reg   *prometheus.Registry
	log   *journal.Log
	table *jobtable.Table
	stop  func()
}

// newWorld makes a node that answers its jobs with "ok" and has a lease.
func newWorld(t testing.TB) *world {
	t.Helper()
	ring, _ := keyringtest.New(t, 1)
	began := time.Now()
	w := &world{
		t: t, dir: t.TempDir(), ring: ring, agreed: newAgreement(func() time.Duration { return time.Since(began) }), copies: newCopies(),
		server: answering(`{"ok":true}`), node: "here-1", stop: func() {}, limit: time.Minute, poll: 2 * time.Millisecond,
	}
	w.agreed.leased = true
	w.spare.Store(1000)
	t.Cleanup(func() { w.stop() })
	return w
}

func answering(body string) func(context.Context, serving.Request, serving.Sink) error {
	return func(_ context.Context, _ serving.Request, s serving.Sink) error {
		if err := s.Head(serving.Head{Status: 200, Length: int64(len(body)), Attempts: 1}); err != nil {
			return err
		}
		return s.Data([]byte(body))
	}
}

type serverFunc func(ctx context.Context, r serving.Request, s serving.Sink) error

func (f serverFunc) Serve(ctx context.Context, r serving.Request, s serving.Sink) error {
	return f(ctx, r, s)
}

// start opens the files and runs the node until stop.
func (w *world) start() {
	w.t.Helper()
	w.open()
	w.launch()
}

func (w *world) open() {
	w.t.Helper()
	must := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	logger := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		logger = slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	w.reg = prometheus.NewRegistry()
	sealer := journal.NewSealer(w.ring)
	clock := journal.NewHLC(time.Now, 10*time.Minute)
	for _, sub := range []string{"journal", "jobs", "table"} {
		must(os.MkdirAll(filepath.Join(w.dir, sub), 0o700))
	}
	founding, err := os.ReadDir(filepath.Join(w.dir, "table"))
	must(err)
	tables := jobtable.Options{Dir: filepath.Join(w.dir, "table"), Sealer: sealer, Ring: w.ring, Clock: clock, Logger: logger, Registerer: prometheus.NewRegistry()}
	w.table, err = jobtable.Open(tables)
	if errors.Is(err, jobtable.ErrDamaged) { // crash copies files while they change; the table can be rebuilt
		must(jobtable.Discard(tables.Dir))
		tables.Registerer = prometheus.NewRegistry()
		w.table, err = jobtable.Open(tables)
	}
	must(err)
	if len(founding) == 0 {
		must(w.table.SetWhole())
	}
	table := w.table
	w.log, err = journal.Open(journal.Options{
		Dir: filepath.Join(w.dir, "journal"), Clock: clock, Logger: logger, Registerer: w.reg, FreeFloor: -1,
		Durable: func(s journal.Stream, records []journal.Record) { table.Apply(s, records) },
	})
	must(err)
	w.Jobs, err = New(Options{
		Node: w.node, Site: "here", Dir: filepath.Join(w.dir, "jobs"), Journal: w.log, Table: w.table, Sealer: sealer, Ring: w.ring,
		Replication: w.copies, Ownership: w.ownership(logger), State: w.agreed.State,
		Server: serverFunc(func(ctx context.Context, r serving.Request, s serving.Sink) error { return w.server(ctx, r, s) }),
		Spare:  func() int { return int(w.spare.Load()) }, Heard: func(string) bool { return true },
		Registerer: w.reg, Logger: logger, Grace: 5 * time.Second,
	})
	must(err)
	for s := range w.log.Ends() {
		must(w.log.Replay(s, w.table.Applied(s)+1, func(records []journal.Record) error {
			w.table.Apply(s, records)
			return nil
		}))
	}
}

func (w *world) ownership(logger *slog.Logger) *failover.Ownership {
	wait := func() time.Duration { return 1300 * time.Millisecond }
	return failover.NewOwnership(failover.NewFence(w.node, "here", w.agreed, wait, w.agreed.boot, logger), w.agreed)
}

func (w *world) launch() {
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	tableCtx, stopTable := context.WithCancel(context.Background())
	jobs, table, log := w.Jobs, w.table, w.log
	group.Go(func() {
		if err := jobs.Run(ctx); err != nil {
			w.t.Errorf("jobs: %v", err)
		}
		stopTable()
	})
	group.Go(func() {
		if err := table.Run(tableCtx); err != nil {
			w.t.Errorf("table: %v", err)
		}
	})
	w.stop = func() {
		w.stop = func() {}
		cancel()
		group.Wait()
		if err := errors.Join(log.Close(), table.Close()); err != nil {
			w.t.Errorf("close: %v", err)
		}
	}
	for { // the first stream is begun
		if _, _, begun := jobs.streams.current(); begun {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// restart stops the node and starts it again.
func (w *world) restart() {
	w.t.Helper()
	w.stop()
	w.start()
}

// crash continues with a copy of the files at this moment, as after a kill.
func (w *world) crash() {
	w.t.Helper()
	copied := w.t.TempDir()
	if err := os.CopyFS(copied, os.DirFS(w.dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.t.Fatal(err)
	}
	w.stop()
	w.dir = copied
	w.start()
}

var ann = Caller{Principal: serving.Principal{Tenant: "ann", KeyID: "k1"}}

// marked is a request's body that a word tells from others.
func marked(word string) []byte { return []byte(`{"model":"m","user":"` + word + `"}`) }

func request(change ...func(*Request)) *Request {
	r := &Request{
		Who: ann.Principal, Endpoint: Endpoints[0], Model: "m", Body: []byte(`{"model":"m","messages":[]}`),
		Durability: journal.DurableNode, Priority: 5,
	}
	for _, c := range change {
		c(r)
	}
	return r
}

func (w *world) counts() Counts {
	w.t.Helper()
	c, err := w.Counts()
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (w *world) submit(change ...func(*Request)) *View {
	w.t.Helper()
	v, err := w.Submit(w.t.Context(), request(change...))
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) get(id journal.JobID) *View {
	w.t.Helper()
	v, err := w.Get(w.t.Context(), ann, id)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// await waits until a job has a status.
func (w *world) await(id journal.JobID, want journal.Status) *View {
	w.t.Helper()
	var v *View
	w.until("job is "+string(want), func() bool {
		v = w.get(id)
		if v.Status.Final() && v.Status != want {
			w.t.Fatalf("job is %s (%s), want %s", v.Status, v.Error, want)
		}
		return v.Status == want
	})
	return v
}

// until waits for a condition.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	limit := time.Now().Add(w.limit)
	for !ok() {
		if time.Now().After(limit) {
			w.t.Fatalf("not in %s: %s", w.limit, what)
		}
		time.Sleep(w.poll)
	}
}
