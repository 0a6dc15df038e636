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

// fakeCluster applies each proposal at once. Every node sees the same state, unless a
// test holds it back.
type fakeCluster struct {
	t   testing.TB
	log *async.Buffer

	mu      sync.Mutex // guards what follows
	state   *agreed.State
	changed chan struct{}
	nodes   map[string]*fakeNode
}

// fakeNode is the Keys of one node, and the Agreement that they use.
type fakeNode struct {
	*Keys
	*memoryStore
	cluster  *fakeCluster
	instance string
	dir      string
	leads    bool
	// held, when set, is an older state that the node still sees.
	held *agreed.State
}

func newFakeCluster(t testing.TB) *fakeCluster {
	t.Helper()
	return &fakeCluster{t: t, log: &async.Buffer{}, state: &agreed.State{}, changed: make(chan struct{}), nodes: map[string]*fakeNode{}}
}

func (n *fakeNode) State() *agreed.State {
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	if n.held != nil {
		return n.held
	}
	return n.cluster.state
}

func (n *fakeNode) Changed() <-chan struct{} {
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	return n.cluster.changed
}

func (n *fakeNode) Instance() string { return n.instance }

func (n *fakeNode) Propose(_ context.Context, t agreed.CommandType, data any) (uint64, error) {
	return 1, n.cluster.propose(t, data)
}

func (n *fakeNode) Carried(ctx context.Context, node string) (map[string]int64, error) {
	n.cluster.mu.Lock()
	asked := n.cluster.nodes[node]
	n.cluster.mu.Unlock()
	if asked == nil {
		return nil, errors.New("no answer")
	}
	return asked.CountRecords(ctx)
}

// WhileLeader makes the node lead until ctx ends, or never.
func (n *fakeNode) WhileLeader(ctx context.Context, lead func(context.Context, cluster.Leadership) error) error {
	if n.leads {
		return lead(ctx, cluster.Leadership{})
	}
	<-ctx.Done()
	return nil
}

func (c *fakeCluster) propose(t agreed.CommandType, data any) error {
	cmd, err := agreed.NewCommand(t, time.Now(), data)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	next, err := agreed.Apply(c.state, cmd)
	if err != nil {
		return err
	}
	c.state = next
	close(c.changed)
	c.changed = make(chan struct{})
	return nil
}

func (c *fakeCluster) must(t agreed.CommandType, data any) {
	c.t.Helper()
	if err := c.propose(t, data); err != nil {
		c.t.Fatal(err)
	}
}

// start makes a node in a data directory. The first one bootstraps the cluster.
func (c *fakeCluster) start(name, dir string, operator OperatorKeys) *fakeNode {
	c.t.Helper()
	sealer, err := operator.OpenNodeKey(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		c.t.Fatal(err)
	}
	keys, err := New(Options{Node: name, Dir: dir, Sealer: sealer, Operator: operator, Logger: slog.New(slog.NewJSONHandler(c.log, nil))})
	if err != nil {
		c.t.Fatal(err)
	}
	keys.PollInterval, keys.DropGrace = 10*time.Millisecond, 30*time.Millisecond
	n := &fakeNode{
		Keys: keys, memoryStore: newMemoryStore(keys.Ring), cluster: c, dir: dir,
		instance: fmt.Sprintf("%s/%d", name, time.Now().UnixNano()),
	}
	keys.Connect(n)
	keys.AddStore("records", n.memoryStore)
	c.mu.Lock()
	c.nodes[name] = n
	c.mu.Unlock()
	record := agreed.Node{
		Name: name, Site: name[:1], Feature: 1, Instance: n.instance,
		OperatorKey: operator.Current.Fingerprint(), OperatorKeyPrevious: operator.Previous.Fingerprint(),
	}
	if n.State().ClusterID == "" {
		c.must(agreed.CmdInit, agreed.Init{ClusterID: "c1", Name: "dev", Generation: agreed.Generation{Number: 1, ID: "g"}, Node: record})
	} else {
		c.must(agreed.CmdNodePut, record)
	}
	return n
}

// memoryStore is a Store in memory.
type memoryStore struct {
	seal keyring.Scoped

	mu      sync.Mutex // guards records
	records [][]byte
}

func newMemoryStore(r *keyring.Ring) *memoryStore { return &memoryStore{seal: r.Scope("test v1")} }

func (m *memoryStore) put(text string) error {
	sealed, err := m.seal.Seal(nil, []byte(text), nil)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.records = append(m.records, sealed)
	return nil
}

func (m *memoryStore) Count(context.Context) (map[keyring.KeyID]int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	counts := map[keyring.KeyID]int64{}
	for _, r := range m.records {
		id, err := keyring.SealedWith(r)
		if err != nil {
			return nil, err
		}
		counts[id]++
	}
	return counts, nil
}

// Reseal re-seals one record at a time.
func (m *memoryStore) Reseal(_ context.Context, from keyring.KeyID) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	left, done := int64(0), false
	for i, r := range m.records {
		id, err := keyring.SealedWith(r)
		if err != nil || id != from {
			continue
		}
		if done {
			left++
			continue
		}
		plain, err := m.seal.Open(nil, r, nil)
		if err == nil {
			m.records[i], err = m.seal.Seal(nil, plain, nil)
		}
		if err != nil {
			return 0, err
		}
		done = true
	}
	return left, nil
}

// readAll returns an error if some record can't be opened.
func (m *memoryStore) readAll() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.records {
		if _, err := m.seal.Open(nil, r, nil); err != nil {
			return err
		}
	}
	return nil
}

// run runs a node, as the Raft leader or not. ended has the result of Run. stop ends it
// and waits.
func (n *fakeNode) run(leads bool) (ended <-chan error, stop func()) {
	n.leads = leads
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() { result <- n.Run(ctx) })
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); wg.Wait() }) }
	n.cluster.t.Cleanup(stop)
	return result, stop
}

func newOperatorKeys() OperatorKeys { return OperatorKeys{Current: keyring.GenerateOperatorKey()} }

// current is the id of the key that a node seals new records with.
func current(n *fakeNode) string {
	id, _ := n.Ring.Current()
	return id.String()
}
