package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func submission() Submission {
	return Submission{
		Tenant: "tenant", KeyID: "key", Models: []string{"a", "b\""}, Endpoint: "/v1/chat/completions", Model: "deepseek-chat",
		Durability: DurableSite, MinDurability: DurableNode, Priority: 5, Site: "east", RetryOf: "job_x", KeyHash: "abc",
		CreatedAt: time.Date(2026, 11, 22, 13, 0, 0, 123456789, time.UTC), ExpiresAt: time.Date(2026, 11, 23, 13, 0, 0, 0, time.UTC),
		Body: []byte(`{"model":"deepseek-chat"}`),
	}
}

func place() Record {
	return Record{Stream: streamOf(1), Job: JobID{1, 2}, Token: Token{3, 4}, Attempt: 5}
}

// TestHead checks that the head is the same from memory and from the disk.
func TestHead(t *testing.T) {
	ring, _ := keyringtest.New(t, 1)
	s := NewSealer(ring)
	r, v := place(), submission()
	r.Seq, v.KeyHash = 1, "hash"
	if err := s.SealSubmission(&r, &v); err != nil {
		t.Fatal(err)
	}
	frame, err := AppendFrame(nil, &r)
	if err != nil {
		t.Fatal(err)
	}
	read, _, err := NextFrame(frame)
	if err != nil || read.head != nil || r.head == nil {
		t.Fatalf("%v; the cached head is %v, after reading %v", err, r.head, read.head)
	}
	for name, rec := range map[string]*Record{"sealed": &r, "read": &read} {
		h, err := s.Head(rec)
		if err != nil || h.Tenant != v.Tenant || h.KeyHash != v.KeyHash || !h.ExpiresAt.Equal(v.ExpiresAt) {
			t.Errorf("%s: %+v, %v; want that of %+v", name, h, err, v)
		}
	}
	if err := s.SealOutcome(&r, &Outcome{Status: Failed}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Head(&r); !errors.Is(err, ErrDamaged) {
		t.Errorf("Head of an outcome: %v", err)
	}
}

func TestPayloadsRoundTrip(t *testing.T) {
	ring, _ := keyringtest.New(t, 1)
	s := NewSealer(ring)
	for _, size := range []int{0, 1, compressFrom - 1, compressFrom, 1 << 20} {
		for name, fill := range map[string]func([]byte){
			"zeros":  func([]byte) {},
			"random": func(b []byte) { _, _ = rand.NewChaCha8([32]byte{1}).Read(b) },
		} {
			body := make([]byte, size)
			fill(body)
			if size == 0 {
				body = nil
			}
			r, v := place(), submission()
			v.Body = body
			if err := s.SealSubmission(&r, &v); err != nil {
				t.Fatal(err)
			}
			got, err := s.OpenSubmission(&r)
			if err != nil || !bytes.Equal(got.Body, body) {
				t.Fatalf("%s of %d: %v, %d bytes", name, size, err, len(got.Body))
			}
			got.Body, v.Body = nil, nil // compared above: cmp takes seconds for a megabyte
			if diff := cmp.Diff(got, v); diff != "" {
				t.Fatalf("%s of %d: %s", name, size, diff)
			}
			if name == "zeros" && size > compressFrom && len(r.Payload) > size/10 {
				t.Errorf("%d zeros take %d bytes", size, len(r.Payload))
			}
			if len(r.Payload) > size+2000 {
				t.Errorf("%d bytes take %d", size, len(r.Payload))
			}
		}
	}
	r, o := place(), Outcome{Status: Failed, Code: 500, Error: `{"x":1}`, Site: "east", Epoch: 9, Adopted: true, Body: []byte("answer")}
	if err := s.SealOutcome(&r, &o); err != nil || r.Rank != Failed.Rank() || r.Kind != Finished {
		t.Fatalf("%+v: %v", r, err)
	}
	if got, err := s.OpenOutcome(&r); err != nil || cmp.Diff(got, o) != "" {
		t.Fatalf("%v %s", err, cmp.Diff(got, o))
	}
	if err := s.SealOutcome(&r, &Outcome{Status: Running}); err == nil {
		t.Fatal("an outcome with the status running was sealed")
	}
	r, d := place(), Delay{NotBefore: time.Unix(5, 0).UTC(), Error: "x"}
	if err := s.SealDelay(&r, &d); err != nil || r.Kind != Retrying {
		t.Fatal(err)
	}
	if got, err := s.OpenDelay(&r); err != nil || got != d {
		t.Fatalf("%+v: %v", got, err)
	}
	if _, err := s.OpenOutcome(&r); !errors.Is(err, ErrDamaged) {
		t.Fatalf("opening a delay as an outcome: %v", err)
	}
}

// A payload can only be opened in its place, complete, and with its digest.
func TestPayloadIsBoundToItsPlace(t *testing.T) {
	ring, _ := keyringtest.New(t, 1)
	s := NewSealer(ring)
	sealed, v := place(), submission()
	if err := s.SealSubmission(&sealed, &v); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Record){
		"job":         func(r *Record) { r.Job[3]++ },
		"origin":      func(r *Record) { r.Stream.Origin = "other" },
		"incarnation": func(r *Record) { r.Stream.Incarnation[0]++ },
		"generation":  func(r *Record) { r.Token.Generation++ },
		"index":       func(r *Record) { r.Token.Index++ },
		"attempt":     func(r *Record) { r.Attempt++ },
		"rank":        func(r *Record) { r.Rank++ },
		"digest":      func(r *Record) { r.Digest[0]++ },
		"payload":     func(r *Record) { r.Payload = bytes.Clone(r.Payload); r.Payload[len(r.Payload)-1]++ },
		"no payload":  func(r *Record) { r.Payload = nil },
	} {
		r := sealed
		change(&r)
		if _, err := s.OpenSubmission(&r); !errors.Is(err, keyring.ErrDamaged) && !errors.Is(err, ErrDamaged) {
			t.Errorf("with another %s: %v", name, err)
		}
	}
	r := sealed
	r.Seq, r.Clock = 99, 99 // these are set later and don't matter
	if _, err := s.OpenSubmission(&r); err != nil {
		t.Error(err)
	}
}

func TestSealingNeedsKeys(t *testing.T) {
	s := NewSealer(keyring.NewRing())
	r, v := place(), submission()
	if err := s.SealSubmission(&r, &v); !errors.Is(err, keyring.ErrNoDataKey) {
		t.Fatal(err)
	}
	ring, _ := keyringtest.New(t, 1)
	s = NewSealer(ring)
	v.Body = make([]byte, MaxPayload)
	if err := s.SealSubmission(&r, &v); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
}

func TestResealKeepsPlaceAndDigest(t *testing.T) {
	ring, keys := keyringtest.New(t, 1)
	s := NewSealer(ring)
	r, v := place(), submission()
	if err := s.SealSubmission(&r, &v); err != nil {
		t.Fatal(err)
	}
	if changed, err := s.Reseal(&r); changed || err != nil {
		t.Fatalf("changed %v under the same key: %v", changed, err)
	}
	keys = keyringtest.Rotate(t, ring, keys)
	before := r
	if changed, err := s.Reseal(&r); !changed || err != nil {
		t.Fatal(err)
	}
	if r.Digest != before.Digest || len(r.Payload) != len(before.Payload) || bytes.Equal(r.Payload, before.Payload) {
		t.Fatal("Reseal changed more than the payload, or not the payload")
	}
	if err := ring.Set(keys[2].ID(), keys[0], keys[2]); err != nil {
		t.Fatal(err)
	}
	if got, err := s.OpenSubmission(&r); err != nil || cmp.Diff(got, v) != "" {
		t.Fatalf("%v %s", err, cmp.Diff(got, v))
	}
	if _, err := s.OpenSubmission(&before); !errors.Is(err, keyring.ErrUnknownKey) {
		t.Fatal(err)
	}
}

// encoding/json can decode the hand-written encoding.
func TestSubmissionIsJSON(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := func(name string) string {
			// encoding/json decodes invalid UTF-8 as U+FFFD.
			return strings.ToValidUTF8(rapid.String().Draw(t, name), "�")
		}
		v := Submission{
			Tenant: text("tenant"), KeyID: text("key"), Models: rapid.SliceOfN(rapid.String(), 0, 3).Draw(t, "models"),
			Endpoint: text("endpoint"), Model: text("model"), Durability: Durability(text("durability")),
			MinDurability: Durability(text("min")), Priority: rapid.Int().Draw(t, "priority"), Site: text("site"),
			CreatedAt: time.Unix(rapid.Int64Range(0, 1<<34).Draw(t, "created"), rapid.Int64Range(0, 1e9-1).Draw(t, "ns")).UTC(),
			ExpiresAt: time.Unix(rapid.Int64Range(0, 1<<34).Draw(t, "expires"), 0).UTC(), RetryOf: text("retry"), KeyHash: text("hash"),
		}
		if len(v.Models) == 0 {
			v.Models = nil
		}
		b, err := v.appendMeta(nil)
		if err != nil {
			t.Fatal(err)
		}
		var got Submission
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if d := cmp.Diff(got, v); d != "" {
			t.Fatal(d)
		}
	})
}

// FuzzPayload decodes arbitrary plaintext of a payload.
func FuzzPayload(f *testing.F) {
	ring, _ := keyringtest.New(f, 1)
	s := NewSealer(ring)
	f.Add([]byte{formRaw, 2, '{', '}', 'b'})
	f.Add([]byte{formRaw})
	f.Add([]byte{})
	f.Add(s.encoder.EncodeAll([]byte("\x02{}body"), []byte{formZstd}))
	f.Add([]byte{7, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		plain, err := s.unpack(b)
		if err == nil {
			var v Submission
			var body []byte
			body, err = decodePlain(plain, &v)
			if len(body) > maxPlaintext {
				t.Fatalf("a body of %d bytes", len(body))
			}
		}
		if err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
			t.Fatalf("unexpected kind of error: %v", err)
		}
	})
}
