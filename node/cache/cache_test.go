package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func streamed(events ...string) *Answer {
	a := &Answer{ContentType: "text/event-stream", Stream: true}
	for _, e := range events {
		a.Body = append(a.Body, e...)
		a.Ends = append(a.Ends, len(a.Body))
	}
	return a
}

// TestExpiry follows an answer: it is fresh in memory, then in the shared tier, then
// stale, then gone.
func TestExpiry(t *testing.T) {
	r := newRig(t, nil, embeddedTier).run()
	k := r.key("tenant a", `{"model":"m"}`)
	want := streamed("data: a\n\n", "data: b\n\n", "data: [DONE]\n\n")
	r.keep(k, want)
	same := func(step string, f Found, ok, fresh bool) {
		t.Helper()
		if !ok || f.Fresh != fresh || !reflect.DeepEqual(f.Answer, want) {
			t.Errorf("%s: %v, %+v, want fresh %v", step, ok, f, fresh)
		}
	}
	f, ok := r.Local(k, "m", life)
	same("at once", f, ok, true)
	r.ahead.Store(int64(11 * time.Minute))
	f, ok = r.Local(k, "m", life)
	same("after local_ttl in memory", f, ok, false)
	f, ok = r.Shared(t.Context(), k, "m", life)
	same("after local_ttl in the shared tier", f, ok, true)
	if f.Age < 10*time.Minute || f.Left > 50*time.Minute {
		t.Errorf("age %s, left %s", f.Age, f.Left)
	}
	f, ok = r.Local(k, "m", life)
	same("found again in memory", f, ok, true)
	r.ahead.Store(int64(61 * time.Minute))
	f, ok = r.Local(k, "m", life)
	same("expired in memory", f, ok, false)
	f, ok = r.Shared(t.Context(), k, "m", life)
	same("expired in the shared tier", f, ok, false)
	r.ahead.Store(int64(26 * time.Hour))
	if _, ok := r.Local(k, "m", life); ok {
		t.Error("still in memory after ttl and stale")
	}
	if _, ok := r.Shared(t.Context(), k, "m", life); ok {
		t.Error("still shared after ttl and stale")
	}
	r.sweep(t.Context())
	if n, _, _ := r.shared.Load().store.size(); n != 0 {
		t.Errorf("%d entries after the sweep", n)
	}
}

// TestRestart: the next process finds the answers of the one before.
func TestRestart(t *testing.T) {
	first := newRig(t, nil, embeddedTier).run()
	k := first.key("tenant a", `{"model":"m"}`)
	first.keep(k, plainAnswer(`{"x":1}`))
	first.stop()
	second := newRig(t, first, embeddedTier).run()
	f, ok := second.Shared(t.Context(), k, "m", life)
	if !ok || string(f.Answer.Body) != `{"x":1}` {
		t.Fatalf("%v %+v\n%s", ok, f, second.logs)
	}
	if second.Stats().Rebuilds != 0 {
		t.Error("a file was found damaged")
	}
}

// TestPurges: an answer from before a purge of its model, its key or everything
// is a miss in both tiers.
func TestPurges(t *testing.T) {
	r := newRig(t, nil, embeddedTier).run()
	k := r.key("tenant a", `{"model":"m"}`)
	for _, c := range []struct {
		name   string
		purges agreed.CachePurges
		hit    bool
	}{
		{"none", agreed.CachePurges{}, true},
		{"another model", agreed.CachePurges{Count: 1, Models: map[string]uint64{"n": 1}}, true},
		{"another key", agreed.CachePurges{Count: 1, Keys: map[string]agreed.KeyPurge{"x": {Count: 1}}}, true},
		{"everything", agreed.CachePurges{Count: 1, All: 1}, false},
		{"the model", agreed.CachePurges{Count: 1, Models: map[string]uint64{"m": 1}}, false},
		{"the key", agreed.CachePurges{Count: 1, Keys: map[string]agreed.KeyPurge{k.String(): {Count: 1}}}, false},
	} {
		r.purges.Store(&agreed.CachePurges{})
		r.keep(k, plainAnswer("{}"))
		r.purges.Store(&c.purges)
		if _, ok := r.Shared(t.Context(), k, "m", life); ok != c.hit {
			t.Errorf("%s: shared %v", c.name, ok)
		}
		if _, ok := r.Local(k, "m", life); ok != c.hit {
			t.Errorf("%s: local %v", c.name, ok)
		}
		// An answer whose upstream was asked after the purge is a hit.
		a := plainAnswer("{}")
		a.Purge = r.Purges()
		r.keep(k, a)
		if _, ok := r.Local(k, "m", life); !ok {
			t.Errorf("%s: a new answer is no hit", c.name)
		}
	}
	parsed, ok := ParseKey(k.String())
	if !ok || parsed != k {
		t.Errorf("the key reads back as %v", parsed)
	}
}

// TestReplicatedEntries: an answer that one node keeps is a hit on another.
func TestReplicatedEntries(t *testing.T) {
	here := newRig(t, nil, embeddedTier).run()
	there := newRig(t, nil, embeddedTier)
	there.ring = here.ring
	there = newRig(t, &rig{dir: there.dir, ring: here.ring, keys: here.keys}, embeddedTier).run()
	k := here.key("tenant a", `{"model":"m"}`)
	if k != there.key("tenant a", `{"model":"m"}`) {
		t.Fatal("the same question has two keys")
	}
	here.Keep(k, "m", plainAnswer(`{"x":1}`))
	batch, err := here.Outbound().Take(t.Context(), 10)
	if err != nil || len(batch) != 1 {
		t.Fatalf("%v: %v", err, batch)
	}
	if bytes.Contains(batch[0].Sealed, []byte(`"x"`)) {
		t.Error("the entry is not sealed")
	}
	if err := there.Absorb(batch[0]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other node finds it", func() bool {
		f, ok := there.Shared(t.Context(), k, "m", life)
		return ok && string(f.Answer.Body) == `{"x":1}`
	})
	if n, _ := there.Outbound().Len(); n != 0 {
		t.Error("the other node sends it on")
	}
	old, future, empty := batch[0], batch[0], batch[0]
	old.StoredAt = old.StoredAt.Add(-48 * time.Hour)
	future.StoredAt = future.StoredAt.Add(time.Hour)
	empty.Sealed = nil
	for _, e := range []Entry{old, future, empty} {
		if err := there.Absorb(e); !errors.Is(err, ErrRefused) {
			t.Errorf("an entry of %v: %v", e.StoredAt, err)
		}
	}
}

// TestMovedEntry: an entry can't be opened under another key, with another age or with
// another purge count.
func TestMovedEntry(t *testing.T) {
	r := newRig(t, nil, embeddedTier).run()
	k, other := r.key("tenant a", `{"model":"m"}`), r.key("tenant b", `{"model":"m"}`)
	r.keep(k, plainAnswer(`{"x":1}`))
	s := r.shared.Load().store
	value, err := s.get(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	e, err := parseEntry(k, value)
	if err != nil {
		t.Fatal(err)
	}
	for _, moved := range []Entry{
		{Key: other, StoredAt: e.StoredAt, Sealed: e.Sealed},
		{Key: other, StoredAt: e.StoredAt.Add(time.Minute), Sealed: e.Sealed},
		{Key: other, StoredAt: e.StoredAt.Add(2 * time.Minute), Purge: 7, Sealed: e.Sealed},
	} {
		if err := s.put(t.Context(), []Entry{moved}, time.Hour); err != nil {
			t.Fatal(err)
		}
		before := r.Stats().Requests["shared"]["damaged"]
		if f, ok := r.Shared(t.Context(), other, "m", life); ok {
			t.Fatalf("tenant b got %s", f.Answer.Body)
		}
		if r.Stats().Requests["shared"]["damaged"] != before+1 {
			t.Error("the damaged entry was not counted")
		}
		// It is dropped, so that it keeps out no good answer with an earlier date.
		eventually(t, "the damaged entry is dropped", func() bool {
			v, err := s.get(t.Context(), other)
			return err == nil && v == nil
		})
	}
	r.keep(other, plainAnswer(`{"y":2}`))
	if f, ok := r.Shared(t.Context(), other, "m", life); !ok || string(f.Answer.Body) != `{"y":2}` {
		t.Error("a good answer is not kept in its place")
	}
	if f, ok := r.Shared(t.Context(), k, "m", life); !ok || string(f.Answer.Body) != `{"x":1}` {
		t.Error("the original entry is lost")
	}
	// Entries can't be opened once their data key was dropped.
	keys := keyringtest.Rotate(t, r.ring, r.keys)
	if _, ok := r.Shared(t.Context(), k, "m", life); !ok {
		t.Error("the rotation lost the entry")
	}
	if err := r.ring.Set(keys[2].ID(), keys[0], keys[2]); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Shared(t.Context(), k, "m", life); ok {
		t.Error("the entry opens without its data key")
	}
}

// TestNothingInClear: the files have no question and no answer in clear.
func TestNothingInClear(t *testing.T) {
	r := newRig(t, nil, embeddedTier).run()
	const canary = "canary-7f3a91"
	for i := range 50 {
		k := r.key("tenant "+canary, fmt.Sprintf(`{"prompt":"%s %d"}`, canary, i))
		r.keep(k, plainAnswer(strings.Repeat(canary+" ", 1+20*i)))
	}
	r.stop()
	files, err := filepath.Glob(filepath.Join(r.dir, "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("canary")) {
			t.Errorf("%s has it in clear", f)
		}
	}
}

// TestNoKeys: before the cluster has agreed on keys, no question has a key.
func TestNoKeys(t *testing.T) {
	ring := keyring.NewRing()
	r := newRig(t, &rig{dir: t.TempDir(), ring: ring}, embeddedTier).run()
	q := &Question{Model: "m", Body: []byte(`{"model":"m"}`)}
	if _, ok := r.Key(q); ok {
		t.Fatal("a key before there are any")
	}
	mac := keyring.NewDataKey(keyring.KindMAC)
	if err := ring.Set(keyring.KeyID{}, mac); err != nil {
		t.Fatal(err)
	}
	k, ok := r.Key(q)
	if !ok {
		t.Fatal("no key although there is one")
	}
	// Without a data key answers are kept in memory only.
	r.Keep(k, "m", plainAnswer("{}"))
	eventually(t, "the write fails", func() bool { return r.Stats().Dropped["write_failed"] == 1 })
	if _, ok := r.Local(k, "m", life); !ok {
		t.Error("the answer is not in memory")
	}
	if _, ok := r.Key(&Question{Model: "m", Body: []byte("[]")}); ok {
		t.Error("a list has a key")
	}
}

// TestTooLarge: an answer beyond entry_bytes is not kept, and it is counted.
func TestTooLarge(t *testing.T) {
	r := newRig(t, nil, noTier)
	r.conf.Cache.EntryBytes = 1024
	r.Configure(r.conf)
	k := r.key("tenant a", "{}")
	r.Keep(k, "m", plainAnswer(strings.Repeat("x", 1025)))
	if _, ok := r.Local(k, "m", life); ok {
		t.Error("kept")
	}
	if r.Stats().Dropped["too_large"] != 1 {
		t.Error("not counted")
	}
	r.Keep(k, "m", plainAnswer(strings.Repeat("x", 1024)))
	if _, ok := r.Local(k, "m", life); !ok {
		t.Error("the largest allowed is not kept")
	}
}

// TestLocalBytes keeps ten times as much as local_bytes: memory stays within the bound.
func TestLocalBytes(t *testing.T) {
	r := newRig(t, nil, noTier)
	const bound = 4 << 20
	r.conf.Cache.LocalBytes = bound
	r.Configure(r.conf)
	body := strings.Repeat("x", 4096)
	most := int64(0)
	for i := range 10 * bound / len(body) {
		r.Keep(r.key("tenant a", fmt.Sprintf(`{"i":%d}`, i)), "m", plainAnswer(body))
		if i%64 == 0 {
			r.local.held.CleanUp()
			_, n := r.local.size()
			most = max(most, n)
		}
	}
	if most > bound || most < bound/2 {
		t.Errorf("it held up to %d bytes of %d", most, bound)
	}
	// The bound can be lowered.
	r.conf.Cache.LocalBytes = 1 << 20
	r.Configure(r.conf)
	r.local.held.CleanUp()
	if _, n := r.local.size(); n > 1<<20 {
		t.Errorf("%d bytes after the bound was lowered", n)
	}
}

func TestQueueDropsOldest(t *testing.T) {
	lost := 0
	q := NewQueue(3, 100, func(n int) int { return n }, func(n int) { lost += n })
	for _, n := range []int{10, 20, 30, 40} {
		q.Offer(n)
	}
	if got := q.now(10); !reflect.DeepEqual(got, []int{20, 30, 40}) || lost != 1 {
		t.Errorf("%v, %d lost", got, lost)
	}
	for _, n := range []int{50, 40, 60, 101} {
		q.Offer(n)
	}
	if got, err := q.Take(t.Context(), 1); err != nil || !reflect.DeepEqual(got, []int{40}) || lost != 3 {
		t.Errorf("%v %v, %d lost", got, err, lost)
	}
	if n, size := q.Len(); n != 1 || size != 60 {
		t.Errorf("%d left with %d", n, size)
	}
	if got, err := q.Take(t.Context(), 5); err != nil || !reflect.DeepEqual(got, []int{60}) {
		t.Errorf("%v %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := q.Take(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("empty: %v", err)
	}
}

func BenchmarkLocalHit(b *testing.B) {
	c, k := benchCache(b)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if f, ok := c.Local(k, "m", life); !ok || !f.Fresh {
				b.Error("no hit")
				return
			}
		}
	})
}

// BenchmarkKey measures the key of a request of 1 KiB.
func BenchmarkKey(b *testing.B) {
	c, _ := benchCache(b)
	q := Question{Owner: "tenant a", Endpoint: "/v1/chat/completions", Model: "m", Shape: Plain, Body: []byte(`{"model":"m","messages":[{"role":"system","content":"Answer briefly."},{"role":"user","content":"` + strings.Repeat("word ", 190) + `"}],"temperature":0,"max_tokens":50}`)}
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := c.Key(&q); !ok {
			b.Fatal("no key")
		}
	}
}

func benchCache(b *testing.B) (*Cache, Key) {
	ring, _ := keyringtest.New(b, 1)
	c, err := New(Options{Dir: b.TempDir(), Site: "east", Ring: ring})
	if err != nil {
		b.Fatal(err)
	}
	k, ok := c.Key(&Question{Body: []byte(`{"model":"m"}`)})
	if !ok {
		b.Fatal("no key")
	}
	c.Keep(k, "m", plainAnswer(strings.Repeat("x", 1024)))
	return c, k
}
