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

func TestDataKeysFromFoundingToDropping(t *testing.T) {
	w, op := newKeyWorld(t), oneKey()
	a := w.start("a-1", t.TempDir(), op)
	a.run(true)
	async.Await(t, "the first node is ready", a.Ring.Ready)
	b := w.start("b-1", t.TempDir(), op)
	b.run(false)
	async.Await(t, "the second has the same key", func() bool { return b.Ring.Ready() && current(a) == current(b) })
	first := current(a)
	for _, n := range []*worldNode{a, b} {
		for i := range 5 {
			if err := n.put(fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A member that does not confirm keeps the new key out of use.
	c := w.start("c-1", t.TempDir(), op)
	k, err := b.Rotate(t.Context(), "ann")
	if err != nil || k.State() != agreed.DataKeyPending || k.CreatedBy != "ann" {
		t.Fatalf("%+v, %v", k, err)
	}
	again, err := a.Rotate(t.Context(), "bob")
	if err != nil || again.ID != k.ID {
		t.Fatalf("a second rotation made %s, not %s: %v", again.ID, k.ID, err)
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
	for _, n := range []*worldNode{a, b} {
		if err := n.read(); err != nil || len(n.records) != 5 {
			t.Fatalf("%d records, %v", len(n.records), err)
		}
	}
}

// secretsOf are the keys that a node holds.
func secretsOf(t *testing.T, d *Keys) [][]byte {
	t.Helper()
	d.mu.Lock()
	kept := d.kept
	d.mu.Unlock()
	return keyringtest.Secrets(t, kept, d.operator.Current, d.operator.Previous)
}

func TestKeysAreNowhereInClear(t *testing.T) {
	w, op := newKeyWorld(t), oneKey()
	a := w.start("a-1", t.TempDir(), op)
	_, stop := a.run(true)
	async.Await(t, "ready", a.Ring.Ready)
	if _, err := a.Rotate(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	async.Await(t, "rotated", func() bool { return len(retiredKeys(a.State())) == 0 && a.State().DataKeysVersion > 8 })
	stop()
	secrets := secretsOf(t, a.Keys)
	state, err := w.state.Encode()
	if err != nil {
		t.Fatal(err)
	}
	keyringtest.NoneIn(t, secrets, "the agreed state", state)
	keyringtest.NoneIn(t, secrets, "the log", w.log.Bytes())
	for _, name := range []string{keyring.KeptFile, keyring.NodeKeyFile} {
		b, err := os.ReadFile(filepath.Join(a.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		keyringtest.NoneIn(t, secrets, name, b)
	}
	if !bytes.Contains(w.log.Bytes(), []byte(current(a))) {
		t.Error("the log does not even name the key") // else this test proves nothing
	}
}

func TestNodeWithAWrongOperatorKeyEnds(t *testing.T) {
	w, op := newKeyWorld(t), oneKey()
	a := w.start("a-1", t.TempDir(), op)
	a.run(true)
	async.Await(t, "ready", a.Ring.Ready)
	if got := NotInUse(a.State()); len(got) > 0 {
		t.Fatalf("the status says %q", got)
	}
	z := w.start("z-1", t.TempDir(), oneKey())
	ended, _ := z.run(false)
	select {
	case err := <-ended:
		if !errors.Is(err, keyring.ErrWrongOperatorKey) {
			t.Fatalf("it ended with %v", err)
		}
		for _, words := range []string{op.Current.Fingerprint(), z.operator.Current.Fingerprint(), "operator_key_previous", "start it again"} {
			if !strings.Contains(err.Error(), words) {
				t.Errorf("%q lacks %q", err, words)
			}
		}
	case <-time.After(time.Minute):
		t.Fatal("it goes on")
	}
	if z.Problem() == "" || z.Ring.Ready() {
		t.Fatalf("problem %q, ready %v", z.Problem(), z.Ring.Ready())
	}
	for _, k := range w.state.DataKeys {
		if _, confirmed := k.Confirmed["z-1"]; confirmed {
			t.Fatal("it confirmed a key that it can't open")
		}
	}
	if !strings.HasPrefix(z.Problem(), "wrong operator key") {
		t.Fatalf("problem %q", z.Problem())
	}
}

// Two nodes met before there were keys, with different operator keys. Which of
// them is wrong nobody can tell: none ends, and nothing is sealed.
func TestKeyThatSomeCanNotOpenIsNeverUsed(t *testing.T) {
	w := newKeyWorld(t)
	a, b := w.start("a-1", t.TempDir(), oneKey()), w.start("b-1", t.TempDir(), oneKey())
	a.run(true)
	ended, _ := b.run(false)
	async.Await(t, "b says it", func() bool { return strings.Contains(b.Problem(), "wrong operator key") })
	async.Await(t, "a has confirmed", func() bool {
		k, there := a.State().PendingDataKey()
		return there && cmp.Equal(a.State().Unconfirmed(k), []string{"b-1"})
	})
	if a.Ring.Ready() || b.Ring.Ready() {
		t.Fatal("a key is in use that b can't open")
	}
	select {
	case err := <-ended:
		t.Fatalf("b ended: %v", err)
	default:
	}
	k, _ := a.State().PendingDataKey()
	want := fmt.Sprintf("no job can be taken: data key %s is not confirmed by b-1", k.ID)
	if got := NotInUse(a.State()); !slices.Contains(got, want) {
		t.Fatalf("the status says %q, not %q", got, want)
	}
}

func TestRingSurvivesARestartWithoutQuorum(t *testing.T) {
	w, op, dir := newKeyWorld(t), oneKey(), t.TempDir()
	a := w.start("a-1", dir, op)
	_, stop := a.run(true)
	async.Await(t, "ready", a.Ring.Ready)
	before := w.state
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
	d, err := New("a-1", dir, sealer, op, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	back := &worldNode{Keys: d, world: w, instance: "next", keyStore: a.keyStore, held: before}
	d.agreed = back
	if !d.Ring.Ready() || current(back) != second {
		t.Fatalf("without a word from the cluster: ready %v, current %s, want %s", d.Ring.Ready(), current(back), second)
	}
	// While the log is replayed, an older list passes by.
	if _, err := d.adopt(before); err != nil || current(back) != second {
		t.Fatalf("it went back to %s: %v", current(back), err)
	}
	if _, err := d.adopt(&agreed.State{}); err != nil || current(back) != second {
		t.Fatalf("an empty state: %s, %v", current(back), err)
	}
}

// A newcomer that replays the whole log sees keys under an operator key of old.
func TestReplayedWrappingIsNoReasonToEnd(t *testing.T) {
	w, old := newKeyWorld(t), oneKey()
	a := w.start("a-1", t.TempDir(), old)
	_, stop := a.run(true)
	async.Await(t, "ready", a.Ring.Ready)
	stop()
	wrapped := w.state
	both := Operator{Current: keyring.GenerateOperatorKey(), Previous: old.Current}
	a = w.start("a-1", a.dir, both)
	_, stop = a.run(true)
	async.Await(t, "it said which operator key it has", func() bool { return len(a.State().LackOperatorKey(both.Current.Fingerprint())) == 0 })
	if err := a.Rewrap(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	b := w.start("b-1", t.TempDir(), Operator{Current: both.Current})
	if _, err := b.adopt(wrapped); err != nil {
		t.Fatalf("an old list: %v", err)
	}
	if b.Ring.Ready() || b.Problem() != "" {
		t.Fatal("it took an old list for the present one")
	}
	b.run(false)
	async.Await(t, "b is ready", func() bool { return b.Ring.Ready() && current(a) == current(b) })
	stop()
}

func TestOperatorKeyChanges(t *testing.T) {
	w, old, next := newKeyWorld(t), oneKey(), oneKey()
	both := Operator{Current: next.Current, Previous: old.Current}
	names := []string{"a-1", "b-1", "c-1"}
	nodes, stops := map[string]*worldNode{}, map[string]func(){}
	boot := func(name, dir string, o Operator) {
		nodes[name] = w.start(name, dir, o)
		_, stops[name] = nodes[name].run(name == "a-1")
	}
	restart := func(name string, o Operator) {
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
	// Nothing to do yet: all have the present one.
	if err := nodes["a-1"].Rewrap(t.Context(), "ann"); err != nil {
		t.Fatal(err)
	}
	restart("a-1", both)
	err := nodes["a-1"].Rewrap(t.Context(), "ann")
	if !errors.Is(err, agreed.ErrOperatorKeyMissing) || !strings.Contains(err.Error(), "b-1, c-1") {
		t.Fatalf("others lack it: %v", err)
	}
	err = nodes["b-1"].Rewrap(t.Context(), "ann")
	if !errors.Is(err, agreed.ErrOperatorKeyMissing) || !strings.Contains(err.Error(), "node b-1 was started with the present one") || !strings.Contains(err.Error(), "a-1") {
		t.Fatalf("asked of a node that has the old one: %v", err)
	}
	// Half-way through a rotation still works: it uses the key that all have.
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
	async.Await(t, "all confirm anew", func() bool {
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
	d := w.start("d-1", t.TempDir(), next)
	d.run(false)
	async.Await(t, "a newcomer is ready", func() bool { return d.Ring.Ready() && current(d) == current(nodes["a-1"]) })
	keyringtest.NoneIn(t, secretsOf(t, nodes["a-1"].Keys), "the log", w.log.Bytes())
}

func TestNodeKeyFollowsTheOperatorKey(t *testing.T) {
	dir, old, next := t.TempDir(), oneKey(), oneKey()
	log := slog.New(slog.DiscardHandler)
	sealer, err := old.OpenNodeKey(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	sealed := sealer.Seal(nil, []byte("x"), nil)
	if _, err := next.OpenNodeKey(dir, log); !errors.Is(err, keyring.ErrWrongOperatorKey) {
		t.Fatalf("the new one alone: %v", err)
	}
	strange := Operator{Current: next.Current, Previous: keyring.GenerateOperatorKey()}
	if _, err := strange.OpenNodeKey(dir, log); !errors.Is(err, keyring.ErrWrongOperatorKey) || !strings.Contains(err.Error(), "neither") {
		t.Fatalf("two strange ones: %v", err)
	}
	for _, o := range []Operator{{Current: next.Current, Previous: old.Current}, next} {
		sealer, err := o.OpenNodeKey(dir, log)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sealer.Open(nil, sealed, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// A key that the cluster has dropped although a record here needs it stays until
// that is sealed anew. It should never happen; records must not pay for it.
func TestDroppedKeyStaysWhileRecordsNeedIt(t *testing.T) {
	w, op := newKeyWorld(t), oneKey()
	a := w.start("a-1", t.TempDir(), op)
	ctx := t.Context()
	step := func() {
		t.Helper()
		opened, err := a.adopt(a.State())
		if err == nil {
			err = a.confirm(ctx, a.State(), opened)
		}
		if err != nil {
			t.Fatal(err)
		}
		for {
			s, ok := nextKeyStep(a.State())
			if !ok {
				return
			}
			if err := a.take(ctx, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 3 {
		step()
	}
	first := current(a)
	if err := a.put("x"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Rotate(ctx, "ann"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		step()
	}
	w.must(agreed.CmdDataKeyDrop, agreed.DataKeyDrop{ID: first, Free: []string{"a-1"}})
	step()
	if err := a.read(); err != nil || current(a) == first {
		t.Fatalf("current %s: %v", current(a), err)
	}
	a.run(false)
	id, err := keyring.ParseKeyID(first)
	if err != nil {
		t.Fatal(err)
	}
	async.Await(t, "it is sealed anew and the key gone", func() bool { return !a.Ring.Has(id) })
	if err := a.read(); err != nil {
		t.Fatal(err)
	}
}

func TestJudgeFreeKeys(t *testing.T) {
	said := func(a, b int64) map[string]Carried {
		m := map[string]Carried{"a-1": {counts: map[string]int64{"k": a}}, "b-1": {counts: map[string]int64{"k": b}}}
		if b < 0 {
			m["b-1"] = Carried{err: errors.New("away")}
		}
		return m
	}
	third := said(0, 0)
	third["c-1"] = Carried{}
	const grace = 30 * time.Second
	type round struct {
		at   time.Duration
		said map[string]Carried
		free bool
	}
	for name, rounds := range map[string][]round{
		"free for all of grace": {{1, said(0, 0), false}, {20 * time.Second, said(0, 0), false}, {grace + 1, said(0, 0), true}},
		"carried in between":    {{1, said(0, 0), false}, {20 * time.Second, said(0, 2), false}, {grace + 1, said(0, 0), false}, {2*grace + 1, said(0, 0), true}},
		"away in between":       {{1, said(0, 0), false}, {20 * time.Second, said(0, -1), false}, {grace + 1, said(0, 0), false}},
		"a newcomer":            {{1, said(0, 0), false}, {grace + 1, third, false}, {2*grace + 1, third, true}},
		"never free":            {{1, said(1, 0), false}, {grace * 9, said(1, 0), false}},
	} {
		t.Run(name, func(t *testing.T) {
			f := freeKeys{since: map[string]time.Duration{}}
			for _, r := range rounds {
				got := f.judge([]string{"k"}, r.said, r.at, grace)
				if free := len(got) == 1; free != r.free {
					t.Fatalf("at %s: free %v, want %v", r.at, free, r.free)
				}
			}
		})
	}
	f := freeKeys{since: map[string]time.Duration{}}
	f.judge([]string{"k"}, said(0, 0), 1, grace)
	f.judge(nil, said(0, 0), 2, grace)
	if len(f.since) != 0 {
		t.Fatal("it remembers a key that is gone")
	}
}

// Nodes go their steps in any order; records are copied between nodes as
// replication does, which takes none that it can't open. Each record always
// opens where it is, no node seals with a key that a member can't open, and the
// sums are the same everywhere.
func TestRecordsAlwaysOpen(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w, op, ctx := newKeyWorld(t), oneKey(), context.Background()
		names := []string{"a-1", "b-1", "c-1"}
		var nodes []*worldNode
		free := freeKeys{since: map[string]time.Duration{}}
		clock := time.Duration(1)
		sums := map[[32]byte]bool{}
		for range rapid.IntRange(1, 80).Draw(rt, "steps") {
			if len(nodes) == 0 || len(nodes) < len(names) && rapid.IntRange(0, 9).Draw(rt, "join") == 0 {
				nodes = append(nodes, w.start(names[len(nodes)], t.TempDir(), op))
			}
			n := rapid.SampledFrom(nodes).Draw(rt, "node")
			before := slices.Collect(maps.Keys(n.State().Nodes))
			switch rapid.IntRange(0, 8).Draw(rt, "what") {
			case 0, 1:
				s := n.State()
				opened, err := n.adopt(s)
				if err != nil {
					rt.Fatal(err)
				}
				_ = n.confirm(ctx, s, opened) // it may be too late
			case 2: // it stops hearing of changes, or hears of them again
				w.mu.Lock()
				if n.held == nil {
					n.held = w.state
				} else {
					n.held = nil
				}
				w.mu.Unlock()
			case 3, 4:
				if s, ok := nextKeyStep(n.State()); ok {
					_ = n.take(ctx, s) // a leader of old may be too late
				}
			case 5:
				if len(n.State().DataKeys) > 0 {
					_, _ = n.Rotate(ctx, "ann") // one may be pending
				}
			case 6:
				if err := n.put("text"); err == nil {
					id, err := keyring.SealedWith(n.records[len(n.records)-1])
					if err != nil {
						rt.Fatal(err)
					}
					for _, name := range before {
						if o := w.nodes[name]; o != nil && !o.Ring.Has(id) && o.fresh(o.State()) {
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
				retired, given := n.leaving()
				if _, err := n.resealSome(ctx, slices.Concat(given, retired)); err != nil {
					rt.Fatal(err)
				}
				_ = n.shed(ctx, given) // some may be needed
			case 8:
				clock += time.Second
				for _, id := range free.judge(retiredKeys(n.State()), n.Ask(ctx, n.State(), time.Second), clock, 2*time.Second) {
					_, _ = n.Propose(ctx, agreed.CmdDataKeyDrop, agreed.DataKeyDrop{ID: id, Free: free.members}) // it may be gone
				}
			}
			for _, o := range nodes {
				if err := o.read(); err != nil {
					rt.Fatalf("a record of %s: %v", o.node, err)
				}
				if m, err := o.Ring.MAC("test v1"); err == nil {
					sums[m.Sum([]byte("x"))] = true
				}
			}
			if len(sums) > 1 {
				rt.Fatal("two nodes give the same thing different sums")
			}
		}
	})
}
