package datakeys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
	"github.com/dsnode/dsnode/test/async"
)

func TestDataKeysFromBootstrapToDrop(t *testing.T) {
	fake, op := newFakeCluster(t), newOperatorKeys()
	a := fake.start("a-1", t.TempDir(), op)
	a.run(true)
	async.Await(t, "the first node is ready", a.Ring.Ready)
	b := fake.start("b-1", t.TempDir(), op)
	b.run(false)
	async.Await(t, "the second has the same key", func() bool { return b.Ring.Ready() && current(a) == current(b) })
	first := current(a)
	for _, n := range []*fakeNode{a, b} {
		for i := range 5 {
			if err := n.put(fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	// The new key is not used while a member has not confirmed it.
	c := fake.start("c-1", t.TempDir(), op)
	k, err := b.Rotate(t.Context(), "ann")
	if err != nil || k.State() != agreed.DataKeyPending || k.CreatedBy != "ann" {
		t.Fatalf("%+v, %v", k, err)
	}
	again, err := a.Rotate(t.Context(), "bob")
	if err != nil || again.ID != k.ID {
		t.Fatalf("a second rotation returned %s, not %s: %v", again.ID, k.ID, err)
	}
	async.Await(t, "a and b have confirmed", func() bool {
		key, _ := a.State().DataKey(k.ID)
		return cmp.Equal(a.State().Unconfirmed(key), []string{"c-1"})
	})
	if current(a) != first || current(b) != first {
		t.Fatal("a key is in use before every member has opened it")
	}
	id, err := keyring.ParseKeyID(k.ID)
	if err != nil || !a.Ring.Has(id) {
		t.Fatalf("a pending key opens already: %v", err)
	}
	c.run(false)
	async.Await(t, "the new key is used everywhere", func() bool { return current(a) == k.ID && current(b) == k.ID && current(c) == k.ID })
	async.Await(t, "the first key is dropped", func() bool { _, there := a.State().DataKey(first); return !there })
	async.Await(t, "the rings follow", func() bool {
		old, err := keyring.ParseKeyID(first)
		return err == nil && !a.Ring.Has(old) && !b.Ring.Has(old) && !c.Ring.Has(old)
	})
	for _, n := range []*fakeNode{a, b} {
		if err := n.readAll(); err != nil || len(n.records) != 5 {
			t.Fatalf("%d records, %v", len(n.records), err)
		}
	}
}

// secretsOf returns the keys that a node holds.
func secretsOf(t *testing.T, ks *Keys) [][]byte {
	t.Helper()
	ks.mu.Lock()
	kept := ks.kept
	ks.mu.Unlock()
	return keyringtest.Secrets(t, kept, ks.operator.Current, ks.operator.Previous)
}

func TestNoKeyIsWrittenInClear(t *testing.T) {
	fake, op := newFakeCluster(t), newOperatorKeys()
	a := fake.start("a-1", t.TempDir(), op)
	_, stop := a.run(true)
	async.Await(t, "ready", a.Ring.Ready)
	if _, err := a.Rotate(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	async.Await(t, "rotated", func() bool { return len(retiredKeys(a.State())) == 0 && a.State().DataKeysVersion > 8 })
	stop()
	secrets := secretsOf(t, a.Keys)
	state, err := fake.state.Encode()
	if err != nil {
		t.Fatal(err)
	}
	keyringtest.NoneIn(t, secrets, "the agreed state", state)
	keyringtest.NoneIn(t, secrets, "the log", fake.log.Bytes())
	for _, name := range []string{keyring.KeptFile, keyring.NodeKeyFile} {
		b, err := os.ReadFile(filepath.Join(a.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		keyringtest.NoneIn(t, secrets, name, b)
	}
	if !bytes.Contains(fake.log.Bytes(), []byte(current(a))) {
		t.Error("the log does not have the id of the key, so the search in it proves nothing")
	}
}

func TestNodeWithAWrongOperatorKeyStops(t *testing.T) {
	fake, op := newFakeCluster(t), newOperatorKeys()
	a := fake.start("a-1", t.TempDir(), op)
	a.run(true)
	async.Await(t, "ready", a.Ring.Ready)
	if got := Unconfirmed(a.State()); len(got) > 0 {
		t.Fatalf("the status says %q", got)
	}
	z := fake.start("z-1", t.TempDir(), newOperatorKeys())
	ended, _ := z.run(false)
	select {
	case err := <-ended:
		if !errors.Is(err, keyring.ErrWrongOperatorKey) {
			t.Fatalf("Run returned %v", err)
		}
		for _, want := range []string{op.Current.Fingerprint(), z.operator.Current.Fingerprint(), "operator_key_previous", "start it again"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q lacks %q", err, want)
			}
		}
	case <-time.After(time.Minute):
		t.Fatal("the node still runs")
	}
	if z.Problem() == "" || z.Ring.Ready() {
		t.Fatalf("problem %q, ready %v", z.Problem(), z.Ring.Ready())
	}
	for _, k := range fake.state.DataKeys {
		if _, confirmed := k.Confirmed["z-1"]; confirmed {
			t.Fatal("the node confirmed a key that it can't open")
		}
	}
	if !strings.HasPrefix(z.Problem(), "wrong operator key") {
		t.Fatalf("problem %q", z.Problem())
	}
}

// Two nodes with different operator keys join before there are data keys. Nothing tells
// which of them is wrong, so both go on, and nothing is sealed.
func TestKeyThatAMemberCannotOpenIsNotUsed(t *testing.T) {
	fake := newFakeCluster(t)
	a, b := fake.start("a-1", t.TempDir(), newOperatorKeys()), fake.start("b-1", t.TempDir(), newOperatorKeys())
	a.run(true)
	ended, _ := b.run(false)
	async.Await(t, "b reports the problem", func() bool { return strings.Contains(b.Problem(), "wrong operator key") })
	async.Await(t, "a has confirmed", func() bool {
		k, there := a.State().PendingDataKey()
		return there && cmp.Equal(a.State().Unconfirmed(k), []string{"b-1"})
	})
	if a.Ring.Ready() || b.Ring.Ready() {
		t.Fatal("a key that b can't open is in use")
	}
	select {
	case err := <-ended:
		t.Fatalf("b stopped: %v", err)
	default:
	}
	k, _ := a.State().PendingDataKey()
	want := fmt.Sprintf("no job can be accepted: data key %s is not confirmed by b-1", k.ID)
	if got := Unconfirmed(a.State()); !slices.Contains(got, want) {
		t.Fatalf("the status says %q, not %q", got, want)
	}
}

func TestRingIsReadyAfterARestartWithoutQuorum(t *testing.T) {
	fake, op, dir := newFakeCluster(t), newOperatorKeys(), t.TempDir()
	a := fake.start("a-1", dir, op)
	_, stop := a.run(true)
	async.Await(t, "ready", a.Ring.Ready)
	before := fake.state
	first := current(a)
	if _, err := a.Rotate(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	async.Await(t, "rotated", func() bool { return current(a) != first })
	if err := a.put("x"); err != nil {
		t.Fatal(err)
	}
	second := current(a)
	stop()

	sealer, err := op.OpenNodeKey(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := New(Options{Node: "a-1", Dir: dir, Sealer: sealer, Operator: op, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	back := &fakeNode{Keys: keys, cluster: fake, instance: "next", memoryStore: a.memoryStore, held: before}
	keys.Connect(back)
	if !keys.Ring.Ready() || current(back) != second {
		t.Fatalf("before any contact to the cluster: ready %v, current %s, want %s", keys.Ring.Ready(), current(back), second)
	}
	// While the log is replayed, an older list passes by.
	if _, err := keys.apply(before); err != nil || current(back) != second {
		t.Fatalf("the ring went back to %s: %v", current(back), err)
	}
	if _, err := keys.apply(&agreed.State{}); err != nil || current(back) != second {
		t.Fatalf("an empty state: %s, %v", current(back), err)
	}
}

// A new node that replays the whole log sees keys that an earlier operator key wraps.
func TestReplayedOldWrappingDoesNotStopTheNode(t *testing.T) {
	fake, old := newFakeCluster(t), newOperatorKeys()
	a := fake.start("a-1", t.TempDir(), old)
	_, stop := a.run(true)
	async.Await(t, "ready", a.Ring.Ready)
	stop()
	wrapped := fake.state
	both := OperatorKeys{Current: keyring.GenerateOperatorKey(), Previous: old.Current}
	a = fake.start("a-1", a.dir, both)
	_, stop = a.run(true)
	async.Await(t, "a has registered its new operator key", func() bool { return len(a.State().LackOperatorKey(both.Current.Fingerprint())) == 0 })
	if err := a.Rewrap(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	b := fake.start("b-1", t.TempDir(), OperatorKeys{Current: both.Current})
	if _, err := b.apply(wrapped); err != nil {
		t.Fatalf("an old list: %v", err)
	}
	if b.Ring.Ready() || b.Problem() != "" {
		t.Fatal("the node used an old list")
	}
	b.run(false)
	async.Await(t, "b is ready", func() bool { return b.Ring.Ready() && current(a) == current(b) })
	stop()
}

func TestOperatorKeyChanges(t *testing.T) {
	fake, old, next := newFakeCluster(t), newOperatorKeys(), newOperatorKeys()
	both := OperatorKeys{Current: next.Current, Previous: old.Current}
	names := []string{"a-1", "b-1", "c-1"}
	nodes, stops := map[string]*fakeNode{}, map[string]func(){}
	boot := func(name, dir string, o OperatorKeys) {
		nodes[name] = fake.start(name, dir, o)
		_, stops[name] = nodes[name].run(name == "a-1")
	}
	restart := func(name string, o OperatorKeys) {
		stops[name]()
		boot(name, nodes[name].dir, o)
	}
	for _, name := range names {
		boot(name, t.TempDir(), old)
	}
	async.Await(t, "all are ready", func() bool {
		return nodes["a-1"].Ring.Ready() && nodes["b-1"].Ring.Ready() && nodes["c-1"].Ring.Ready()
	})
	if err := nodes["b-1"].put("x"); err != nil {
		t.Fatal(err)
	}
	// All have the present key, so there is nothing to do.
	if err := nodes["a-1"].Rewrap(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	restart("a-1", both)
	err := nodes["a-1"].Rewrap(t.Context(), "ann")
	if !errors.Is(err, agreed.ErrOperatorKeyMissing) || !strings.Contains(err.Error(), "b-1, c-1") {
		t.Fatalf("others lack the new key: %v", err)
	}
	err = nodes["b-1"].Rewrap(t.Context(), "ann")
	if !errors.Is(err, agreed.ErrOperatorKeyMissing) || !strings.Contains(err.Error(), "node b-1 was started with the present one") || !strings.Contains(err.Error(), "a-1") {
		t.Fatalf("a node that has only the old key was asked: %v", err)
	}
	// A rotation works meanwhile: it uses the operator key that all have.
	k, err := nodes["a-1"].Rotate(t.Context(), "ann")
	if err != nil {
		t.Fatal(err)
	}
	async.Await(t, "rotated", func() bool { return current(nodes["c-1"]) == k.ID })
	restart("b-1", both)
	restart("c-1", both)
	if err := nodes["c-1"].Rewrap(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	async.Await(t, "all have confirmed again", func() bool {
		s := nodes["a-1"].State()
		return s.OperatorKey() == next.Current.Fingerprint() && !slices.ContainsFunc(s.DataKeys, func(k agreed.DataKey) bool {
			return len(s.Unconfirmed(k)) > 0
		})
	})
	for _, name := range names {
		restart(name, next)
		if n := nodes[name]; !n.Ring.Ready() || n.Problem() != "" {
			t.Fatalf("%s with the new operator key alone: ready %v, %s", name, n.Ring.Ready(), n.Problem())
		}
	}
	d := fake.start("d-1", t.TempDir(), next)
	d.run(false)
	async.Await(t, "a new node is ready", func() bool { return d.Ring.Ready() && current(d) == current(nodes["a-1"]) })
	keyringtest.NoneIn(t, secretsOf(t, nodes["a-1"].Keys), "the log", fake.log.Bytes())
}

func TestNodeKeyFollowsTheOperatorKey(t *testing.T) {
	dir, old, next := t.TempDir(), newOperatorKeys(), newOperatorKeys()
	log := slog.New(slog.DiscardHandler)
	sealer, err := old.OpenNodeKey(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	sealed := sealer.Seal(nil, []byte("x"), nil)
	if _, err := next.OpenNodeKey(dir, log); !errors.Is(err, keyring.ErrWrongOperatorKey) {
		t.Fatalf("the new key alone: %v", err)
	}
	unrelated := OperatorKeys{Current: next.Current, Previous: keyring.GenerateOperatorKey()}
	if _, err := unrelated.OpenNodeKey(dir, log); !errors.Is(err, keyring.ErrWrongOperatorKey) || !strings.Contains(err.Error(), "neither") {
		t.Fatalf("two unrelated keys: %v", err)
	}
	for _, o := range []OperatorKeys{{Current: next.Current, Previous: old.Current}, next} {
		sealer, err := o.OpenNodeKey(dir, log)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sealer.Open(nil, sealed, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// The cluster should never drop a key that a record needs. If it does, the node keeps the
// key until the record is re-sealed.
func TestDroppedKeyStaysWhileRecordsNeedIt(t *testing.T) {
	fake, op := newFakeCluster(t), newOperatorKeys()
	a := fake.start("a-1", t.TempDir(), op)
	ctx := t.Context()
	advance := func() {
		t.Helper()
		opened, err := a.apply(a.State())
		if err == nil {
			err = a.confirm(ctx, a.State(), opened)
		}
		if err != nil {
			t.Fatal(err)
		}
		for {
			s, ok := nextStep(a.State())
			if !ok {
				return
			}
			if err := a.take(ctx, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 3 {
		advance()
	}
	first := current(a)
	if err := a.put("x"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Rotate(ctx, "ann"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		advance()
	}
	fake.must(agreed.CmdDataKeyDrop, agreed.DataKeyDrop{ID: first, Free: []string{"a-1"}})
	advance()
	if err := a.readAll(); err != nil || current(a) == first {
		t.Fatalf("current %s: %v", current(a), err)
	}
	a.run(false)
	id, err := keyring.ParseKeyID(first)
	if err != nil {
		t.Fatal(err)
	}
	async.Await(t, "the record is re-sealed and the key gone", func() bool { return !a.Ring.Has(id) })
	if err := a.readAll(); err != nil {
		t.Fatal(err)
	}
}

func TestRetiredKeyExpiresAfterItsGrace(t *testing.T) {
	counts := func(a, b int64) Records {
		r := Records{"a-1": {counts: map[string]int64{"k": a}}, "b-1": {counts: map[string]int64{"k": b}}}
		if b < 0 {
			r["b-1"] = nodeRecords{err: errors.New("no answer")}
		}
		return r
	}
	third := counts(0, 0)
	third["c-1"] = nodeRecords{}
	const grace = 30 * time.Second
	type round struct {
		at      time.Duration
		records Records
		expired bool
	}
	for name, rounds := range map[string][]round{
		"unused for all of grace": {{1, counts(0, 0), false}, {20 * time.Second, counts(0, 0), false}, {grace + 1, counts(0, 0), true}},
		"used in between":         {{1, counts(0, 0), false}, {20 * time.Second, counts(0, 2), false}, {grace + 1, counts(0, 0), false}, {2*grace + 1, counts(0, 0), true}},
		"no answer in between":    {{1, counts(0, 0), false}, {20 * time.Second, counts(0, -1), false}, {grace + 1, counts(0, 0), false}},
		"a new member":            {{1, counts(0, 0), false}, {grace + 1, third, false}, {2*grace + 1, third, true}},
		"never unused":            {{1, counts(1, 0), false}, {grace * 9, counts(1, 0), false}},
	} {
		t.Run(name, func(t *testing.T) {
			unused := newUnusedKeys()
			for _, r := range rounds {
				got := unused.update([]string{"k"}, r.records, r.at, grace)
				if expired := len(got) == 1; expired != r.expired {
					t.Fatalf("at %s: expired %v, want %v", r.at, expired, r.expired)
				}
			}
		})
	}
	unused := newUnusedKeys()
	unused.update([]string{"k"}, counts(0, 0), 1, grace)
	unused.update(nil, counts(0, 0), 2, grace)
	if len(unused.since) != 0 {
		t.Fatal("a key that is gone is still remembered")
	}
}

// Nodes take their steps in any order. Records are copied between nodes as replication
// does it: no node takes a record that it can't open. At all times each node can open its
// records, no node seals with a key that a member can't open, and all nodes compute the
// same MAC.
func TestEveryNodeCanAlwaysOpenItsRecords(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		fake, op, ctx := newFakeCluster(t), newOperatorKeys(), context.Background()
		names := []string{"a-1", "b-1", "c-1"}
		var nodes []*fakeNode
		unused := newUnusedKeys()
		clock := time.Duration(1)
		sums := map[[32]byte]bool{}
		for range rapid.IntRange(1, 80).Draw(rt, "steps") {
			if len(nodes) == 0 || len(nodes) < len(names) && rapid.IntRange(0, 9).Draw(rt, "join") == 0 {
				nodes = append(nodes, fake.start(names[len(nodes)], t.TempDir(), op))
			}
			n := rapid.SampledFrom(nodes).Draw(rt, "node")
			before := slices.Collect(maps.Keys(n.State().Nodes))
			switch rapid.IntRange(0, 8).Draw(rt, "what") {
			case 0, 1:
				s := n.State()
				opened, err := n.apply(s)
				if err != nil {
					rt.Fatal(err)
				}
				_ = n.confirm(ctx, s, opened) // refused if the state has changed
			case 2: // it stops receiving changes, or receives them again
				fake.mu.Lock()
				if n.held == nil {
					n.held = fake.state
				} else {
					n.held = nil
				}
				fake.mu.Unlock()
			case 3, 4:
				if s, ok := nextStep(n.State()); ok {
					_ = n.take(ctx, s) // refused if the state has changed
				}
			case 5:
				if len(n.State().DataKeys) > 0 {
					_, _ = n.Rotate(ctx, "ann") // refused while its copy of the state is old
				}
			case 6:
				if err := n.put("text"); err == nil {
					id, err := keyring.SealedWith(n.records[len(n.records)-1])
					if err != nil {
						rt.Fatal(err)
					}
					for _, name := range before {
						if o := fake.nodes[name]; o != nil && !o.Ring.Has(id) && o.caughtUp(o.State()) {
							if k, there := o.State().DataKey(id.String()); there && k.Confirmed[name].IsZero() && k.State() == agreed.DataKeyPending {
								rt.Fatalf("%s seals with %s, which %s has not opened", n.node, id, name)
							}
						}
					}
				}
				other := rapid.SampledFrom(nodes).Draw(rt, "to")
				for _, r := range n.records {
					if id, err := keyring.SealedWith(r); err == nil && other != n && other.Ring.Has(id) && len(other.records) < 20 {
						other.records = append(other.records, bytes.Clone(r))
					}
				}
			case 7:
				retired, dropped := n.obsolete()
				if _, err := n.resealSome(ctx, slices.Concat(dropped, retired)); err != nil {
					rt.Fatal(err)
				}
				_ = n.forgetDropped(ctx, dropped) // an error if some are needed
			case 8:
				clock += time.Second
				for _, id := range unused.update(retiredKeys(n.State()), n.Records(ctx, n.State(), time.Second), clock, 2*time.Second) {
					_, _ = n.Propose(ctx, agreed.CmdDataKeyDrop, agreed.DataKeyDrop{ID: id, Free: unused.members}) // refused if the key is gone
				}
			}
			for _, o := range nodes {
				if err := o.readAll(); err != nil {
					rt.Fatalf("a record of %s: %v", o.node, err)
				}
				if m, err := o.Ring.MAC("test v1"); err == nil {
					sums[m.Sum([]byte("x"))] = true
				}
			}
			if len(sums) > 1 {
				rt.Fatal("two nodes compute different MACs of the same bytes")
			}
		}
	})
}
