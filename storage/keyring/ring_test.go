package keyring

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

func newTestRing(t testing.TB, n int) (*Ring, []DataKey) {
	t.Helper()
	r := NewRing()
	keys := []DataKey{NewDataKey(KindMAC)}
	var current KeyID
	for range n {
		k := NewDataKey(KindSeal)
		keys, current = append(keys, k), k.ID()
	}
	if err := r.Set(current, keys...); err != nil {
		t.Fatal(err)
	}
	return r, keys
}

func TestEmptyRingSealsNothing(t *testing.T) {
	r := NewRing()
	s := r.Scope("test v1")
	if _, err := s.Seal(nil, []byte("x"), nil); !errors.Is(err, ErrNoDataKey) {
		t.Fatalf("seal: %v", err)
	}
	if _, err := r.MAC("test v1"); !errors.Is(err, ErrNoDataKey) {
		t.Fatalf("mac: %v", err)
	}
	if _, ok := r.Current(); ok || r.Ready() {
		t.Fatal("Ready is true for an empty ring")
	}
	k, mac := NewDataKey(KindSeal), NewDataKey(KindMAC)
	// A key that is held but not current opens and does not seal.
	if err := r.Set(KeyID{}, k, mac); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Seal(nil, []byte("x"), nil); !errors.Is(err, ErrNoDataKey) || r.Ready() || !r.Has(k.ID()) {
		t.Fatalf("unconfirmed key: %v", err)
	}
	if err := r.Set(k.ID(), k, mac); err != nil || !r.Ready() {
		t.Fatalf("set: %v", err)
	}
	if _, err := s.Seal(nil, []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
}

func TestSetRefusesInvalidKeys(t *testing.T) {
	k, mac := NewDataKey(KindSeal), NewDataKey(KindMAC)
	for name, set := range map[string]func(*Ring) error{
		"absent current": func(r *Ring) error { return r.Set(NewDataKey(KindSeal).ID(), k, mac) },
		"mac as current": func(r *Ring) error { return r.Set(mac.ID(), k, mac) },
		"two mac keys":   func(r *Ring) error { return r.Set(k.ID(), k, mac, NewDataKey(KindMAC)) },
		"zero key":       func(r *Ring) error { return r.Set(k.ID(), k, DataKey{}) },
		"too many":       func(r *Ring) error { return r.Set(k.ID(), make([]DataKey, maxRing+1)...) },
	} {
		r := NewRing()
		changed := r.Changed()
		if set(r) == nil {
			t.Errorf("%s: accepted", name)
		}
		select {
		case <-changed:
			t.Errorf("%s: Changed was closed by a refused Set", name)
		default:
		}
	}
}

func TestChangedIsClosedOncePerChange(t *testing.T) {
	r, keys := newTestRing(t, 1)
	changed := r.Changed()
	if err := r.Set(keys[1].ID(), keys...); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
		t.Fatal("Changed was closed by a Set of the same keys")
	default:
	}
	k := NewDataKey(KindSeal)
	if err := r.Set(keys[1].ID(), append(keys, k)...); err != nil {
		t.Fatal(err)
	}
	<-changed
}

func TestRotation(t *testing.T) {
	r, keys := newTestRing(t, 1)
	s := r.Scope("test v1", []byte("node"))
	first, err := s.Seal(nil, []byte("old"), []byte("place"))
	if err != nil {
		t.Fatal(err)
	}
	if id, err := SealedWith(first); err != nil || id != keys[1].ID() {
		t.Fatalf("sealed with %s, %v", id, err)
	}
	next := NewDataKey(KindSeal)
	if err := r.Set(next.ID(), append(keys, next)...); err != nil {
		t.Fatal(err)
	}
	second, err := s.Seal(nil, []byte("new"), []byte("place"))
	if err != nil {
		t.Fatal(err)
	}
	if id, _ := SealedWith(second); id != next.ID() {
		t.Fatalf("after the rotation records are sealed with %s", id)
	}
	for sealed, want := range map[string]string{string(first): "old", string(second): "new"} {
		got, err := s.Open(nil, []byte(sealed), []byte("place"))
		if err != nil || string(got) != want {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if err := r.Set(next.ID(), keys[0], next); err != nil {
		t.Fatal(err)
	}
	var unknown *UnknownKeyError
	if _, err := s.Open(nil, first, []byte("place")); !errors.As(err, &unknown) || !errors.Is(err, ErrUnknownKey) || unknown.Key != keys[1].ID() {
		t.Fatalf("a dropped key: %v", err)
	}
	if _, err := s.Seal(nil, nil, nil); err != nil {
		t.Fatal(err)
	}
}

// After many rotations a Scoped caches no cipher of a dropped key beyond the next
// derivation.
func TestScopedForgetsDroppedKeys(t *testing.T) {
	r, keys := newTestRing(t, 1)
	s := r.Scope("test v1")
	for range 3 * maxRing {
		k := NewDataKey(KindSeal)
		if err := r.Set(k.ID(), keys[0], k); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Seal(nil, []byte("x"), nil); err != nil {
			t.Fatal(err)
		}
		if n := len(*s.ciphers.Load()); n != 1 {
			t.Fatalf("%d ciphers are cached", n)
		}
	}
}

func TestScopedOpenNeedsTheSameScopeAndPlace(t *testing.T) {
	r, _ := newTestRing(t, 3)
	s := r.Scope("test v1", []byte("ab"), []byte("c"))
	others := map[string]Scoped{
		"purpose": r.Scope("test v2", []byte("ab"), []byte("c")),
		"scope":   r.Scope("test v1", []byte("ab"), []byte("d")),
		"split":   r.Scope("test v1", []byte("a"), []byte("bc")),
		"shorter": r.Scope("test v1", []byte("ab")),
		"joined":  r.Scope("test v1", []byte("abc")),
	}
	rapid.Check(t, func(t *rapid.T) {
		plain := rapid.SliceOf(rapid.Byte()).Draw(t, "plain")
		aad := rapid.SliceOf(rapid.Byte()).Draw(t, "aad")
		prefix := rapid.SliceOf(rapid.Byte()).Draw(t, "prefix")
		sealed, err := s.Seal(bytes.Clone(prefix), plain, aad)
		if err != nil || !bytes.HasPrefix(sealed, prefix) {
			t.Fatalf("seal: %v", err)
		}
		sealed = sealed[len(prefix):]
		if len(sealed) != len(plain)+Overhead {
			t.Fatalf("%d bytes were sealed as %d", len(plain), len(sealed))
		}
		before := bytes.Clone(sealed)
		got, err := s.Open(bytes.Clone(prefix), sealed, aad)
		if err != nil || !bytes.Equal(got, append(bytes.Clone(prefix), plain...)) {
			t.Fatalf("open: %q, %v", got, err)
		}
		if !bytes.Equal(before, sealed) {
			t.Fatal("Open changed the sealed bytes")
		}
		for name, o := range others {
			if _, err := o.Open(nil, sealed, aad); !errors.Is(err, ErrDamaged) {
				t.Fatalf("another %s: %v", name, err)
			}
		}
		if _, err := s.Open(nil, sealed, append(aad, 'x')); !errors.Is(err, ErrDamaged) {
			t.Fatalf("another place: %v", err)
		}
		at := rapid.IntRange(0, len(sealed)-1).Draw(t, "at")
		sealed[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		_, err = s.Open(nil, sealed, aad)
		switch {
		case at == 0:
			if !errors.Is(err, ErrNewerFormat) && !errors.Is(err, ErrDamaged) {
				t.Fatalf("flip of the format: %v", err)
			}
		case at < headerSize:
			if !errors.Is(err, ErrUnknownKey) {
				t.Fatalf("flip of the key id: %v", err)
			}
		case !errors.Is(err, ErrDamaged):
			t.Fatalf("flip at %d: %v", at, err)
		}
	})
}

func TestRingConcurrently(t *testing.T) {
	r, keys := newTestRing(t, 1)
	s := r.Scope("test v1")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				sealed, err := s.Seal(nil, []byte("text"), nil)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := s.Open(nil, sealed, nil); err != nil || string(got) != "text" {
					t.Errorf("%q, %v", got, err)
					return
				}
			}
		})
	}
	for range 20 {
		k := NewDataKey(KindSeal)
		keys = append(keys, k)
		if err := r.Set(k.ID(), keys...); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
}

func TestSealAndOpenAllocateNothing(t *testing.T) {
	r, _ := newTestRing(t, 3)
	s := r.Scope("test v1", []byte("node"))
	plain, aad := make([]byte, 1024), make([]byte, 24)
	dst, out := make([]byte, 0, len(plain)+Overhead), make([]byte, 0, len(plain))
	allocs := testing.AllocsPerRun(100, func() {
		sealed, err := s.Seal(dst, plain, aad)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Open(out, sealed, aad); err != nil {
			t.Fatal(err)
		}
	})
	if allocs != 0 {
		t.Fatalf("%v allocations", allocs)
	}
}

func TestMAC(t *testing.T) {
	r, keys := newTestRing(t, 1)
	a, err := r.MAC("job id v1")
	if err != nil {
		t.Fatal(err)
	}
	sum := a.Sum([]byte("tenant"), []byte("key"))
	if sum != a.Sum([]byte("tenant"), []byte("key")) {
		t.Fatal("two sums of the same parts differ")
	}
	for name, other := range map[string][32]byte{
		"joined": a.Sum([]byte("tenantkey")), "split": a.Sum([]byte("tenan"), []byte("tkey")),
		"more": a.Sum([]byte("tenant"), []byte("key"), nil), "none": a.Sum(),
	} {
		if other == sum {
			t.Errorf("%s: different parts have the same sum", name)
		}
	}
	b, err := r.MAC("cache v1")
	if err != nil || b.Sum([]byte("tenant"), []byte("key")) == sum {
		t.Fatalf("another purpose has the same sum; %v", err)
	}
	// On another node, after a rotation.
	other := NewRing()
	k := NewDataKey(KindSeal)
	if err := other.Set(k.ID(), k, keys[0]); err != nil {
		t.Fatal(err)
	}
	c, err := other.MAC("job id v1")
	if err != nil || c.Sum([]byte("tenant"), []byte("key")) != sum {
		t.Fatalf("the sum differs on another node; %v", err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if a.Sum([]byte("tenant"), []byte("key")) != sum {
					t.Error("concurrent sums interfere with each other")
					return
				}
			}
		})
	}
	wg.Wait()
}

// Journals and ids contain these values, so they must never change.
const (
	goldenSealed = "02240502f97388482697af17a4e89ac2c98d18eb2b3bcd798d896268465f2f69adde88edeb6f612a72bf"
	golden       = `240502f973884826 6cb852e7e51f58f5 a8d3265582c5da3235b6460c518cbddbba448051dbe94543e0dff786670597bf "hello" <nil>`
)

func TestDerivationsNeverChange(t *testing.T) {
	seal, err := DataKeyFrom(KindSeal, bytes.Repeat([]byte{1}, keySize))
	if err != nil {
		t.Fatal(err)
	}
	mac, err := DataKeyFrom(KindMAC, bytes.Repeat([]byte{2}, keySize))
	if err != nil {
		t.Fatal(err)
	}
	r := NewRing()
	if err := r.Set(seal.ID(), seal, mac); err != nil {
		t.Fatal(err)
	}
	m, err := r.MAC("golden v1")
	if err != nil {
		t.Fatal(err)
	}
	sum := m.Sum([]byte("a"), []byte("bc"))
	sealed, err := hex.DecodeString(goldenSealed)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := r.Scope("golden v1", []byte("node")).Open(nil, sealed, []byte("place"))
	got := fmt.Sprintf("%s %s %x %q %v", seal.ID(), mac.ID(), sum, plain, err)
	if got != golden {
		t.Errorf("got  %s\nwant %s", got, golden)
	}
}

func TestWrapAndUnwrapDataKey(t *testing.T) {
	op, other := GenerateOperatorKey(), GenerateOperatorKey()
	for _, kind := range []Kind{KindSeal, KindMAC} {
		k := NewDataKey(kind)
		wrapped, err := k.Wrap(op, "cluster")
		if err != nil || len(wrapped) != keySize+Overhead {
			t.Fatalf("%d bytes, %v", len(wrapped), err)
		}
		if bytes.Contains(wrapped, k.material[:]) {
			t.Fatal("the wrapped key contains the plaintext key")
		}
		got, err := UnwrapDataKey(op, "cluster", k.ID(), kind, wrapped)
		if err != nil || got != k {
			t.Fatalf("unwrap: %v", err)
		}
		otherKind := map[Kind]Kind{KindSeal: KindMAC, KindMAC: KindSeal}[kind]
		for name, try := range map[string]struct {
			open func() (DataKey, error)
			want error
		}{
			"operator key": {func() (DataKey, error) { return UnwrapDataKey(other, "cluster", k.ID(), kind, wrapped) }, ErrWrongOperatorKey},
			"no key":       {func() (DataKey, error) { return UnwrapDataKey(OperatorKey{}, "cluster", k.ID(), kind, wrapped) }, ErrNoOperatorKey},
			"cluster":      {func() (DataKey, error) { return UnwrapDataKey(op, "cluster2", k.ID(), kind, wrapped) }, ErrDamaged},
			"id":           {func() (DataKey, error) { return UnwrapDataKey(op, "cluster", KeyID{1}, kind, wrapped) }, ErrDamaged},
			"kind":         {func() (DataKey, error) { return UnwrapDataKey(op, "cluster", k.ID(), otherKind, wrapped) }, ErrDamaged},
			"short":        {func() (DataKey, error) { return UnwrapDataKey(op, "cluster", k.ID(), kind, wrapped[:9]) }, ErrDamaged},
		} {
			if _, err := try.open(); !errors.Is(err, try.want) {
				t.Errorf("another %s: %v, want %v", name, err, try.want)
			}
		}
	}
}

func TestKeysDoNotPrint(t *testing.T) {
	k := NewDataKey(KindSeal)
	b, err := json.Marshal(struct{ Key DataKey }{k})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		fmt.Sprintf("%v %+v %#v %s", k, k, k, k), fmt.Sprintf("%v", struct{ Key DataKey }{k}), k.LogValue().String(), string(b),
	} {
		if strings.Contains(s, hex.EncodeToString(k.material[:])) || strings.Contains(s, fmt.Sprint(k.material)) {
			t.Errorf("printed: %s", s)
		}
	}
}

func TestFingerprintNamesTheOperatorKey(t *testing.T) {
	a, b := GenerateOperatorKey(), GenerateOperatorKey()
	if len(a.Fingerprint()) != 16 || a.Fingerprint() == b.Fingerprint() || (OperatorKey{}).Fingerprint() != "" {
		t.Fatalf("%q %q", a.Fingerprint(), b.Fingerprint())
	}
	if strings.Contains(hex.EncodeToString(a.material[:]), a.Fingerprint()) {
		t.Fatal("the fingerprint is a part of the key")
	}
}

func TestKeyIDText(t *testing.T) {
	id := NewDataKey(KindSeal).ID()
	b, err := json.Marshal(map[KeyID]KeyID{id: id})
	if err != nil {
		t.Fatal(err)
	}
	var back map[KeyID]KeyID
	if err := json.Unmarshal(b, &back); err != nil || back[id] != id {
		t.Fatalf("%s: %v", b, err)
	}
	for _, text := range []string{"", "00", strings.Repeat("0", 17), strings.Repeat("x", 16), strings.Repeat("0", 18)} {
		if _, err := ParseKeyID(text); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
}

func FuzzScopedOpen(f *testing.F) {
	r, _ := newTestRing(f, 2)
	s := r.Scope("test v1")
	sealed, err := s.Seal(nil, []byte("hello"), []byte("place"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{}, []byte{})
	f.Add(sealed, []byte("place"))
	f.Fuzz(func(t *testing.T, sealed, aad []byte) {
		plain, err := s.Open(nil, sealed, aad)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrUnknownKey) && !errors.Is(err, ErrNewerFormat) {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		if len(plain) != len(sealed)-Overhead {
			t.Fatalf("%d bytes of plaintext from %d", len(plain), len(sealed))
		}
	})
}

func BenchmarkScopedSeal(b *testing.B) {
	for _, size := range []int{64, 1024, 16384} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			r, _ := newTestRing(b, 2)
			s := r.Scope("bench v1", []byte("node"))
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				plain, aad := make([]byte, size), make([]byte, 24)
				dst := make([]byte, 0, size+Overhead)
				for pb.Next() {
					if _, err := s.Seal(dst, plain, aad); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}

func BenchmarkScopedOpen(b *testing.B) {
	r, _ := newTestRing(b, 2)
	s := r.Scope("bench v1", []byte("node"))
	aad := make([]byte, 24)
	sealed, err := s.Seal(nil, make([]byte, 1024), aad)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(1024)
	b.ReportAllocs()
	dst := make([]byte, 0, 1024)
	for b.Loop() {
		if _, err := s.Open(dst, sealed, aad); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMACSum(b *testing.B) {
	r, _ := newTestRing(b, 1)
	m, err := r.MAC("bench v1")
	if err != nil {
		b.Fatal(err)
	}
	tenant, body := []byte("tenant"), make([]byte, 1024)
	b.SetBytes(1024)
	b.ReportAllocs()
	for b.Loop() {
		m.Sum(tenant, body)
	}
}
