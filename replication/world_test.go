package replication

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// world is a cluster of nodes with real journals and tables in one process, whose links
// can be cut and slowed.
type world struct {
	t     testing.TB
	ring  *keyring.Ring
	keys  []keyring.DataKey
	tune  func(*node) // before a node starts
	delay time.Duration

	mu    sync.Mutex // guards what follows
	nodes map[string]*node
	order []string
	cut   map[[2]string]bool
	conns map[[2]string][]net.Conn
	bytes map[[2]string]int // by (from, to): bytes sent over the link
}

type node struct {
	w          *world
	name, site string
	city       string
	dir        string
	ring       Ring
	segment    int64
	budget     int64
	limits     Limits
	retired    func(journal.Stream) bool
	deliver    func([]byte)
	current    func() bool
	noTable    bool // records are not applied, to measure replication alone
	joins      bool // its first table is not complete: it joins a cluster, or lost its disk

	alive  bool // guarded by w.mu
	log    *journal.Log
	table  *jobtable.Table
	repl   *Replication
	sealer *journal.Sealer
	stream journal.Stream
	lis    *bufconn.Listener
	stop   func()
	dialed map[string]*grpc.ClientConn // guarded by w.mu
}

// newWorld makes nodes with names like "a1", where the letter is the site. The sites a and
// b are in the city "east", the others in "west".
func newWorld(t testing.TB, names ...string) *world {
	w := &world{
		t: t, nodes: map[string]*node{}, cut: map[[2]string]bool{},
		conns: map[[2]string][]net.Conn{}, bytes: map[[2]string]int{},
	}
	w.ring, w.keys = keyringtest.New(t, 1)
	for _, name := range names {
		n := &node{
			w: w, name: name, site: name[:1], city: "west", ring: w.ring, dir: filepath.Join(t.TempDir(), name),
			retired: func(journal.Stream) bool { return false }, deliver: func([]byte) {}, current: func() bool { return true },
		}
		if n.site <= "b" {
			n.city = "east"
		}
		w.nodes[name] = n
		w.order = append(w.order, name)
	}
	t.Cleanup(func() {
		for _, n := range w.nodes {
			n.halt()
		}
	})
	return w
}

func (w *world) start() *world {
	w.t.Helper()
	for _, name := range w.order {
		w.nodes[name].start()
	}
	return w
}

func link2(a, b string) [2]string { return [2]string{min(a, b), max(a, b)} }

// heard reports whether two nodes hear each other. The caller holds w.mu.
func (w *world) heard(a, b string) bool {
	return a == b || w.nodes[a].alive && w.nodes[b].alive && !w.cut[link2(a, b)]
}

func (w *world) members(self string) []Member {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []Member
	for _, name := range w.order {
		n := w.nodes[name]
		m := Member{Node: name, Site: n.site, City: n.city, Heard: w.heard(self, name), Hears: map[string]bool{}}
		for _, other := range w.order {
			m.Hears[other] = w.heard(name, other)
		}
		out = append(out, m)
	}
	return out
}

// sever cuts or restores the link between two nodes.
func (w *world) sever(a, b string, cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := link2(a, b)
	w.cut[l] = cut
	if cut {
		for _, c := range w.conns[l] {
			_ = c.Close()
		}
		w.conns[l] = nil
	}
}

// isolate cuts or restores all links of a site to the others.
func (w *world) isolate(site string, cut bool) {
	for _, a := range w.order {
		for _, b := range w.order {
			if w.nodes[a].site == site && w.nodes[b].site != site {
				w.sever(a, b, cut)
			}
		}
	}
}

func (w *world) dial(from, to string) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.heard(from, to) || !w.nodes[to].alive {
		return nil, errors.New("no way there")
	}
	c, err := w.nodes[to].lis.Dial()
	if err != nil {
		return nil, err
	}
	shaped := shape(c, w.delay/2, func(n int, out bool) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if out {
			w.bytes[[2]string{from, to}] += n
		} else {
			w.bytes[[2]string{to, from}] += n
		}
	})
	w.conns[link2(from, to)] = append(w.conns[link2(from, to)], shaped)
	return shaped, nil
}

func (n *node) conn(to string) (grpc.ClientConnInterface, error) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	if !n.alive {
		return nil, errors.New("not started, or stopped")
	}
	if c := n.dialed[to]; c != nil {
		return c, nil
	}
	name := n.name
	tag := func(ctx context.Context) context.Context { return metadata.AppendToOutgoingContext(ctx, "node", name) }
	c, err := grpc.NewClient("passthrough:///"+to,
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return n.w.dial(name, to) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, MaxDelay: 200 * time.Millisecond}}),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, q, a any, cc *grpc.ClientConn, call grpc.UnaryInvoker, o ...grpc.CallOption) error {
			return call(tag(ctx), method, q, a, cc, o...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, method string, call grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
			return call(tag(ctx), d, cc, method, o...)
		}))
	if err != nil {
		return nil, err
	}
	n.dialed[to] = c
	return c, nil
}

func (n *node) start() {
	t := n.w.t
	t.Helper()
	if n.w.tune != nil {
		n.w.tune(n)
	}
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	logger := slog.New(slog.DiscardHandler)
	if os.Getenv("REPLICATION_LOG") != "" {
		logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", n.name)
	}
	moment := journal.NewHLC(time.Now, 10*time.Minute)
	n.sealer = journal.NewSealer(n.w.ring)
	var err error
	n.table, err = jobtable.Open(jobtable.Options{Dir: n.dir, Sealer: n.sealer, Ring: n.w.ring, Clock: moment, Logger: logger, Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if n.table.Fresh() && !n.joins { // a founding node
		if err := n.table.SetWhole(); err != nil {
			t.Fatal(err)
		}
	}
	n.joins = true
	apply := n.table.Apply
	if n.noTable {
		apply = func(journal.Stream, []journal.Record) {}
	}
	n.log, err = journal.Open(journal.Options{
		Dir: filepath.Join(n.dir, "journal"), Clock: moment, Logger: logger, Registerer: prometheus.NewRegistry(),
		FreeFloor: -1, Durable: apply, SegmentBytes: n.segment, BudgetBytes: n.budget,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := n.table.Run(ctx); err != nil {
			t.Errorf("table of %s: %v", n.name, err)
		}
	})
	for s, e := range n.log.Ends() {
		from := n.table.Applied(s) + 1
		if from < e.First { // the table was discarded
			if err := n.table.SetApplied(ctx, s, e.First-1); err != nil {
				t.Fatal(err)
			}
			from = e.First
		}
		if err := n.log.Replay(s, from, func(r []journal.Record) error { n.table.Apply(s, r); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	n.stream = journal.Stream{Origin: n.name}
	_, _ = rand.Read(n.stream.Incarnation[:])
	if err := n.log.Create(ctx, n.stream); err != nil {
		t.Fatal(err)
	}
	n.repl, err = New(Options{
		Self: n.name, Site: n.site, Dir: n.dir, Log: n.log, Table: n.table, Ring: n.ring,
		Members: func() []Member { return n.w.members(n.name) }, Dial: n.conn,
		Caller: func(ctx context.Context) (string, bool) {
			md, _ := metadata.FromIncomingContext(ctx)
			names := md.Get("node")
			return names[0], len(names) == 1
		},
		Boottime: clock.Boottime, Limits: n.limits, Logger: logger, Registerer: prometheus.NewRegistry(),
		Retired: n.retired, Deliver: n.deliver, Current: n.current,
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(4 << 20))
	n.repl.Register(srv)
	lis := bufconn.Listen(1 << 20)
	wg.Go(func() { _ = srv.Serve(lis) })
	wg.Go(func() {
		if err := n.repl.Run(ctx); err != nil {
			t.Errorf("replication of %s: %v", n.name, err)
		}
	})
	n.w.mu.Lock()
	n.lis, n.alive, n.dialed = lis, true, map[string]*grpc.ClientConn{}
	n.w.mu.Unlock()
	n.stop = func() {
		n.w.mu.Lock()
		n.alive = false
		dialed := n.dialed
		n.w.mu.Unlock()
		for _, c := range dialed {
			_ = c.Close()
		}
		srv.Stop()
		cancel()
		wg.Wait()
		if err := n.log.Close(); err != nil {
			t.Errorf("close the log of %s: %v", n.name, err)
		}
		if err := n.table.Close(); err != nil {
			t.Errorf("close the table of %s: %v", n.name, err)
		}
	}
}

// halt stops a running node.
func (n *node) halt() {
	if n.stop != nil {
		n.stop()
		n.stop = nil
	}
}

func (n *node) wipe() {
	n.w.t.Helper()
	if err := os.RemoveAll(n.dir); err != nil {
		n.w.t.Fatal(err)
	}
}

// submit appends jobs, each with a body of the given size, and returns the last seq.
func (n *node) submit(jobs, bytes int) uint64 {
	n.w.t.Helper()
	var last uint64
	for jobs > 0 {
		batch := min(jobs, 256)
		records := make([]journal.Record, batch)
		for i := range records {
			records[i] = n.submission(bytes)
		}
		var err error
		if last, err = n.log.Append(context.Background(), n.stream, records); err != nil {
			n.w.t.Fatal(err)
		}
		jobs -= batch
	}
	return last
}

func (n *node) submission(bytes int) journal.Record {
	r := journal.Record{Stream: n.stream}
	_, _ = rand.Read(r.Job[:])
	body := make([]byte, bytes)
	_, _ = rand.Read(body)
	now := time.Now()
	err := n.sealer.SealSubmission(&r, &journal.Submission{
		Endpoint: "/v1/chat/completions", Model: "m", Durability: journal.DurableNode, Site: n.site,
		CreatedAt: now, ExpiresAt: now.Add(time.Hour), Body: body,
	})
	if err != nil {
		n.w.t.Fatal(err)
	}
	return r
}

func (n *node) holds(s journal.Stream) uint64 {
	e, _ := n.log.End(s)
	return e.Durable
}

// patience is long enough for a busy machine and the race detector.
const patience = 2 * time.Minute

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	eventuallyWithin(t, patience, what, cond)
}

func eventuallyWithin(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-deadline.C:
			t.Fatalf("not in time: %s", what)
		case <-tick.C:
		}
	}
}

// wantEverywhere waits until all living nodes hold all of a stream.
func (w *world) wantEverywhere(s journal.Stream, seq uint64) {
	w.t.Helper()
	for _, name := range w.order {
		n := w.nodes[name]
		if n.stop == nil {
			continue
		}
		eventually(w.t, fmt.Sprintf("%s holds %s to %d", name, s, seq), func() bool { return n.holds(s) >= seq })
	}
}

// shaped delays both directions of a connection.
type shaped struct {
	net.Conn
	delay   time.Duration
	count   func(n int, out bool)
	in, out chan late
	closed  chan struct{}
	once    sync.Once
	rest    []byte
	wg      sync.WaitGroup
}

type late struct {
	data []byte
	due  time.Time
	err  error
}

func shape(c net.Conn, delay time.Duration, count func(int, bool)) net.Conn {
	s := &shaped{Conn: c, delay: delay, count: count, in: make(chan late, 4096), out: make(chan late, 4096), closed: make(chan struct{})}
	s.wg.Go(func() {
		for {
			buf := make([]byte, 64<<10)
			n, err := c.Read(buf)
			if n > 0 {
				count(n, false)
			}
			select {
			case s.in <- late{data: buf[:n], due: time.Now().Add(delay), err: err}:
			case <-s.closed:
				return
			}
			if err != nil {
				return
			}
		}
	})
	s.wg.Go(func() {
		for {
			select {
			case l := <-s.out:
				if !s.await(l.due) {
					return
				}
				if _, err := c.Write(l.data); err != nil {
					return
				}
			case <-s.closed:
				return
			}
		}
	})
	return s
}

func (s *shaped) await(due time.Time) bool {
	d := time.Until(due)
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.closed:
		return false
	}
}

func (s *shaped) Read(b []byte) (int, error) {
	if len(s.rest) == 0 {
		select {
		case l := <-s.in:
			if !s.await(l.due) {
				return 0, io.ErrClosedPipe
			}
			if l.err != nil {
				return 0, l.err
			}
			s.rest = l.data
		case <-s.closed:
			return 0, io.ErrClosedPipe
		}
	}
	n := copy(b, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (s *shaped) Write(b []byte) (int, error) {
	s.count(len(b), true)
	select {
	case s.out <- late{data: append([]byte(nil), b...), due: time.Now().Add(s.delay)}:
		return len(b), nil
	case <-s.closed:
		return 0, io.ErrClosedPipe
	}
}

func (s *shaped) Close() error {
	err := s.Conn.Close()
	s.once.Do(func() { close(s.closed) })
	return err
}
