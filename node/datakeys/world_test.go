package datakeys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/test/async"
)

// keyWorld is a cluster that agrees at once: every node sees the same state, in
// its own time.
type keyWorld struct {
	t   testing.TB
	log *async.Buffer

	mu      sync.Mutex // guards what follows
	state   *agreed.State
	changed chan struct{}
	nodes   map[string]*worldNode
}

// worldNode is one node's Keys and its view of the world.
type worldNode struct {
	*Keys
	*keyStore
	world    *keyWorld
	instance string
	dir      string
	// held, when set, is an older state that the node still sees.
	held *agreed.State
	away bool // it answers no question
}

func newKeyWorld(t testing.TB) *keyWorld {
	t.Helper()
	return &keyWorld{t: t, log: &async.Buffer{}, state: &agreed.State{}, changed: make(chan struct{}), nodes: map[string]*worldNode{}}
}

func (w *worldNode) State() *agreed.State {
	w.world.mu.Lock()
	defer w.world.mu.Unlock()
	if w.held != nil {
		return w.held
	}
	return w.world.state
}

func (w *worldNode) Changed() <-chan struct{} {
	w.world.mu.Lock()
	defer w.world.mu.Unlock()
	return w.world.changed
}

func (w *worldNode) Instance() string { return w.instance }

func (w *worldNode) Propose(_ context.Context, t agreed.CommandType, data any) (uint64, error) {
	return 1, w.world.propose(t, data)
}

func (w *worldNode) Carried(ctx context.Context, node string) (map[string]int64, error) {
	w.world.mu.Lock()
	n := w.world.nodes[node]
	gone := n == nil || n.away
	w.world.mu.Unlock()
	if gone {
		return nil, errors.New("no answer")
	}
	return n.Keys.Carried(ctx)
}

func (w *keyWorld) propose(t agreed.CommandType, data any) error {
	c, err := agreed.NewCommand(t, time.Now(), data)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	next, err := agreed.Apply(w.state, c)
	if err != nil {
		return err
	}
	w.state = next
	close(w.changed)
	w.changed = make(chan struct{})
	return nil
}

func (w *keyWorld) must(t agreed.CommandType, data any) {
	w.t.Helper()
	if err := w.propose(t, data); err != nil {
		w.t.Fatal(err)
	}
}

// start makes a node in a data directory; the first founds the cluster.
func (w *keyWorld) start(name, dir string, operator Operator) *worldNode {
	w.t.Helper()
	sealer, err := operator.OpenNodeKey(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	d, err := New(name, dir, sealer, operator, slog.New(slog.NewJSONHandler(w.log, nil)))
	if err != nil {
		w.t.Fatal(err)
	}
	d.Every, d.Grace = 10*time.Millisecond, 30*time.Millisecond
	n := &worldNode{Keys: d, world: w, instance: fmt.Sprintf("%s/%d", name, time.Now().UnixNano()), dir: dir, keyStore: newKeyStore(d.Ring)}
	d.agreed = n
	d.Carry("records", n.keyStore)
	w.mu.Lock()
	w.nodes[name] = n
	w.mu.Unlock()
	record := agreed.Node{
		Name: name, Site: name[:1], Feature: 1, Instance: n.instance,
		OperatorKey: operator.Current.Fingerprint(), OperatorKeyPrevious: operator.Previous.Fingerprint(),
	}
	if w.state.ClusterID == "" {
		w.must(agreed.CmdInit, agreed.Init{ClusterID: "c1", Name: "dev", Generation: agreed.Generation{Number: 1, ID: "g"}, Node: record})
	} else {
		w.must(agreed.CmdNodePut, record)
	}
	return n
}

// keyStore is a Carrier: records in memory.
type keyStore struct {
	seal keyring.Scoped

	mu      sync.Mutex // guards records
	records [][]byte
	broken  error
}

func newKeyStore(r *keyring.Ring) *keyStore { return &keyStore{seal: r.Scope("test v1")} }

func (k *keyStore) put(text string) error {
	sealed, err := k.seal.Seal(nil, []byte(text), nil)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.records = append(k.records, sealed)
	return nil
}

func (k *keyStore) Carries(context.Context) (map[keyring.KeyID]int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	counts := map[keyring.KeyID]int64{}
	for _, r := range k.records {
		id, err := keyring.SealedWith(r)
		if err != nil {
			return nil, err
		}
		counts[id]++
	}
	return counts, k.broken
}

// Reseal does one record at a time.
func (k *keyStore) Reseal(_ context.Context, from keyring.KeyID) (int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	left, done := int64(0), false
	for i, r := range k.records {
		id, err := keyring.SealedWith(r)
		if err != nil || id != from {
			continue
		}
		if done {
			left++
			continue
		}
		plain, err := k.seal.Open(nil, r, nil)
		if err == nil {
			k.records[i], err = k.seal.Seal(nil, plain, nil)
		}
		if err != nil {
			return 0, err
		}
		done = true
	}
	return left, nil
}

// read opens everything.
func (k *keyStore) read() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.records {
		if _, err := k.seal.Open(nil, r, nil); err != nil {
			return err
		}
	}
	return nil
}

// run starts a node's loops, and tend on the leader; it gives their end.
func (w *worldNode) run(leads bool) (ended <-chan error, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	end := make(chan error, 1)
	wg.Go(func() { end <- w.follow(ctx) })
	wg.Go(func() { _ = w.reseal(ctx) }) // it has no error
	if leads {
		wg.Go(func() { _ = w.tend(ctx, cluster.Leadership{}) }) // likewise
	}
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); wg.Wait() }) }
	w.world.t.Cleanup(stop)
	return end, stop
}

func oneKey() Operator { return Operator{Current: keyring.GenerateOperatorKey()} }

func current(n *worldNode) string {
	id, _ := n.Ring.Current()
	return id.String()
}
