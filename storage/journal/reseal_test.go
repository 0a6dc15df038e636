package journal

import (
	"context"
	"testing"

	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// After a key rotation and Reseal no record is sealed with the old key, and the records
// are otherwise unchanged.
func TestReseal(t *testing.T) {
	ring, keys := keyringtest.New(t, 1)
	sealer := NewSealer(ring)
	o := testOptions(t.TempDir())
	o.SegmentBytes = 3000
	l := mustOpen(t, o)
	id := streamOf(1)
	mustCreate(t, l, id)
	submit := func() {
		t.Helper()
		r, v := Record{Stream: id, Job: JobID{1}}, submission()
		if err := sealer.SealSubmission(&r, &v); err != nil {
			t.Fatal(err)
		}
		mustAppend(t, l, id, r, started(1, ""))
	}
	for range 20 {
		submit()
	}
	before := recordsOf(t, l, id, 1)
	keys = keyringtest.Rotate(t, ring, keys)
	submit()
	if c := l.Carried(); c[keys[1].ID()] != 20 || c[keys[2].ID()] != 1 {
		t.Fatalf("carried: %v", c)
	}
	if left, err := l.Reseal(context.Background(), sealer); left != 0 || err != nil {
		t.Fatalf("%d left: %v", left, err)
	}
	submit()
	if err := ring.Set(keys[2].ID(), keys[0], keys[2]); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if c := l.Carried(); c[keys[1].ID()] != 0 || c[keys[2].ID()] != 22 {
			t.Fatalf("carried: %v", c)
		}
		after := recordsOf(t, l, id, 1)
		if len(after) != 44 {
			t.Fatalf("%d records", len(after))
		}
		for i := range after {
			if i < len(before) && !after[i].same(&before[i]) {
				t.Fatalf("record %d has changed", i+1)
			}
			if after[i].Kind != Submitted {
				continue
			}
			if _, err := sealer.OpenSubmission(&after[i]); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, l)
		l = mustOpen(t, o)
	}
	// Records sealed with an unknown key stay as they are.
	if err := ring.Set(keys[1].ID(), keys[0], keys[1]); err != nil {
		t.Fatal(err)
	}
	if left, err := l.Reseal(context.Background(), sealer); left != 22 || err != nil {
		t.Fatalf("%d left: %v", left, err)
	}
	if c := l.Carried(); c[keys[2].ID()] != 22 {
		t.Fatalf("carried: %v", c)
	}
}
