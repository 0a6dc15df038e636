package jobtable

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/storage/journal"
)

// drawRecords draws records of one job with fields from few values, so that they
// collide.
func drawRecords(t *rapid.T, label string) []journal.Record {
	return rapid.SliceOfN(rapid.Custom(drawRecord), 0, 14).Draw(t, label)
}

func drawRecord(t *rapid.T) journal.Record {
	r := journal.Record{
		Stream:  journal.Stream{Origin: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "origin")},
		Seq:     rapid.Uint64Range(1, 5).Draw(t, "seq"),
		Clock:   journal.Clock(rapid.Uint64Range(1, 4).Draw(t, "clock")),
		Token:   journal.Token{Generation: 1, Index: rapid.Uint64Range(0, 2).Draw(t, "token")},
		Kind:    journal.Kind(rapid.IntRange(1, 5).Draw(t, "kind")),
		Attempt: rapid.Uint32Range(0, 2).Draw(t, "attempt"),
	}
	r.Stream.Incarnation[0] = byte(rapid.IntRange(1, 2).Draw(t, "incarnation"))
	if rapid.IntRange(0, 19).Draw(t, "deleted") == 0 {
		r.Kind = journal.Deleted
	}
	if r.Kind == journal.Finished {
		r.Rank = uint8(rapid.IntRange(1, 4).Draw(t, "rank"))
	}
	r.Digest[0] = byte(rapid.IntRange(0, 1).Draw(t, "digest"))
	r.Payload = []byte{r.Digest[0]}
	return r
}

func equal(a, b []journal.Record) bool {
	return slices.EqualFunc(a, b, func(x, y journal.Record) bool {
		return compare(&x, &y) == 0 && string(x.Payload) == string(y.Payload)
	})
}

func TestJoinIsASemilattice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := drawRecords(t, "a"), drawRecords(t, "b"), drawRecords(t, "c")
		before := slices.Clone(a)
		ab := Join(a, b)
		if !slices.EqualFunc(a, before, func(x, y journal.Record) bool { return compare(&x, &y) == 0 }) {
			t.Fatal("Join changed its argument")
		}
		if ba := Join(b, a); !equal(ab, ba) {
			t.Fatalf("not commutative:\n%v\n%v", ab, ba)
		}
		if x, y := Join(ab, c), Join(a, Join(b, c)); !equal(x, y) {
			t.Fatalf("not associative:\n%v\n%v", x, y)
		}
		if again := Join(ab, ab); !equal(again, ab) {
			t.Fatalf("not idempotent:\n%v\n%v", again, ab)
		}
		if !canonical(ab) || len(ab) > maxRecords {
			t.Fatalf("not canonical: %v", ab)
		}
		if again := Join(ab, b); len(ab) > 0 && &again[0] != &ab[0] {
			t.Fatal("Join made a new row although nothing was added")
		}
		// One by one, in any order, with repeats, as records arrive in practice.
		all := slices.Concat(a, b, a)
		order := rapid.Permutation(all).Draw(t, "order")
		var row []journal.Record
		for i := range order {
			row = Join(row, order[i:i+1])
		}
		if !equal(row, ab) {
			t.Fatalf("joined one by one:\n%v\njoined at once:\n%v", row, ab)
		}
	})
}

func TestJoinKeepsTheFirstOfEachCategory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := drawRecords(t, "all")
		row := Row{Join(all, nil)}
		best := func(c category) (best *journal.Record) {
			for i := range all {
				if categoryOf(all[i].Kind) == c && (best == nil || compare(&all[i], best) < 0) {
					best = &all[i]
				}
			}
			return best
		}
		if best(deleted) != nil {
			if !row.Deleted() || len(row.Records) != 1 {
				t.Fatalf("a deleted row has the records %v", row.Records)
			}
			return
		}
		for _, c := range []category{submitted, progress, finished, asked} {
			got, ok := row.first(c)
			want := best(c)
			if ok != (want != nil) || ok && compare(got, want) != 0 {
				t.Fatalf("category %d: %v, want %v", c, got, want)
			}
		}
	})
}

func TestRowNeverLeavesAFinalState(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var row Row
		final, gone := false, false
		for _, r := range drawRecords(t, "all") {
			row = Row{Join(row.Records, []journal.Record{r})}
			gone = gone || r.Kind == journal.Deleted
			final = final || r.Kind == journal.Finished
			if gone != row.Deleted() || final && !gone && !row.Status().Final() {
				t.Fatalf("after %v: %+v", r, row)
			}
		}
	})
}

// A record sealed with another key is the same record; the first payload stays.
func TestJoinKeepsTheFirstPayload(t *testing.T) {
	r := journal.Record{Kind: journal.Submitted, Seq: 1, Clock: 1, Stream: journal.Stream{Origin: "a"}}
	mine, other := r, r
	mine.Payload, other.Payload = []byte("mine"), []byte("other")
	got := Join([]journal.Record{mine}, []journal.Record{other})
	if len(got) != 1 || string(got[0].Payload) != "mine" {
		t.Errorf("joined %v", got)
	}
}

func TestJoinDropsKindsOfLaterVersions(t *testing.T) {
	if got := Join(nil, []journal.Record{{Kind: 99, Seq: 1}}); len(got) != 0 {
		t.Errorf("joined %v", got)
	}
}

func TestRow(t *testing.T) {
	at := func(origin string, seq uint64, kind journal.Kind, index uint64, attempt uint32) journal.Record {
		return journal.Record{
			Stream: journal.Stream{Origin: origin}, Seq: seq, Clock: journal.Clock(seq), Kind: kind,
			Token: journal.Token{Generation: 1, Index: index}, Attempt: attempt,
		}
	}
	end := func(r journal.Record, s journal.Status) journal.Record {
		r.Kind, r.Rank = journal.Finished, s.Rank()
		return r
	}
	var (
		submit  = at("a", 1, journal.Submitted, 1, 0)
		again   = at("b", 9, journal.Submitted, 2, 0)
		start   = at("a", 2, journal.Started, 1, 1)
		retry   = at("a", 3, journal.Retrying, 1, 1)
		start2  = at("a", 4, journal.Started, 1, 2)
		adopted = at("b", 5, journal.Started, 7, 1)
		ask     = at("c", 6, journal.CancelAsked, 0, 0)
		gone    = at("c", 8, journal.Deleted, 0, 0)
	)
	for _, tt := range []struct {
		name     string
		records  []journal.Record
		status   journal.Status
		attempts uint32
		token    uint64
		accepted int
		late     int
	}{
		{"no records", nil, journal.Queued, 0, 0, 0, 0},
		{"submitted", []journal.Record{submit}, journal.Queued, 0, 0, 1, 0},
		{"submitted twice", []journal.Record{again, submit}, journal.Queued, 0, 0, 2, 0},
		{"started", []journal.Record{submit, start}, journal.Running, 1, 1, 1, 0},
		{"waits for a retry", []journal.Record{submit, retry, start}, journal.Queued, 1, 1, 1, 0},
		{"retried", []journal.Record{submit, start2, retry, start}, journal.Running, 2, 1, 1, 0},
		{"adopted", []journal.Record{submit, adopted, start2}, journal.Running, 1, 7, 1, 0},
		{"cancel asked, still running", []journal.Record{submit, start, ask}, journal.Running, 1, 1, 1, 0},
		{"succeeded", []journal.Record{submit, start, end(start, journal.Succeeded)}, journal.Succeeded, 1, 1, 1, 0},
		{"failed", []journal.Record{submit, start, end(start, journal.Failed)}, journal.Failed, 1, 1, 1, 0},
		{"cancelled", []journal.Record{submit, ask, end(start, journal.Cancelled)}, journal.Cancelled, 1, 1, 1, 0},
		{"expired while it waited", []journal.Record{submit, end(at("a", 5, 0, 1, 0), journal.Expired)}, journal.Expired, 0, 1, 1, 0},
		{"expired and succeeded in one attempt", []journal.Record{submit, end(start, journal.Expired), end(start, journal.Succeeded)}, journal.Succeeded, 1, 1, 1, 1},
		{"late result while the adopter executes", []journal.Record{submit, adopted, end(start, journal.Succeeded)}, journal.Succeeded, 1, 1, 1, 0},
		{"the adopter's result counts", []journal.Record{submit, end(adopted, journal.Failed), end(start, journal.Succeeded)}, journal.Failed, 1, 7, 1, 1},
		{"started after the end", []journal.Record{submit, end(start, journal.Failed), adopted}, journal.Failed, 1, 1, 1, 0},
		{"deleted", []journal.Record{submit, end(start, journal.Succeeded), gone, ask}, "", 0, 0, 0, 0},
		{"only started", []journal.Record{start}, journal.Running, 1, 1, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			row := Row{Join(nil, tt.records)}
			if got := row.Status(); got != tt.status {
				t.Errorf("status %q, want %q", got, tt.status)
			}
			if got := row.Attempts(); got != tt.attempts {
				t.Errorf("%d attempts, want %d", got, tt.attempts)
			}
			if current, _ := row.Current(); current.Token.Index != tt.token {
				t.Errorf("the current record has token %d, want %d", current.Token.Index, tt.token)
			}
			if got := len(row.AcceptedBy()); got != tt.accepted {
				t.Errorf("accepted by %d streams, want %d", got, tt.accepted)
			}
			if got := len(row.Late()); got != tt.late {
				t.Errorf("%d late results, want %d", got, tt.late)
			}
			if _, got := row.CancelAsked(); got != (slices.ContainsFunc(tt.records, func(r journal.Record) bool { return r.Kind == journal.CancelAsked }) && !row.Deleted()) {
				t.Errorf("cancel asked: %v", got)
			}
			if row.Deleted() != (tt.status == "") {
				t.Errorf("deleted: %v", row.Deleted())
			}
		})
	}
}
