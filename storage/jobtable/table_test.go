package jobtable

import (
	"context"
	"encoding/binary"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// world makes records like several nodes.
type world struct {
	t      testing.TB
	ring   *keyring.Ring
	keys   []keyring.DataKey
	sealer *journal.Sealer

	mu  sync.Mutex // guards now
	now time.Time
}

func newWorld(t testing.TB) *world {
	ring, keys := keyringtest.New(t, 1)
	return &world{t: t, ring: ring, keys: keys, sealer: journal.NewSealer(ring), now: time.UnixMilli(1_800_000_000_000)}
}

func (w *world) time() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

func (w *world) options(dir string) Options {
	return Options{Dir: dir, Sealer: w.sealer, Ring: w.ring, Now: w.time, Logger: slog.New(slog.DiscardHandler)}
}

// log is a stream that a test writes.
type log struct {
	w      *world
	stream journal.Stream
	seq    uint64
	clock  *journal.HLC
	all    []journal.Record
}

func (w *world) log(origin string) *log {
	var inc journal.Incarnation
	for i := range inc {
		inc[i] = byte(rand.Uint32())
	}
	return &log{w: w, stream: journal.Stream{Origin: origin, Incarnation: inc}, clock: journal.NewHLC(w.time, time.Hour)}
}

func (l *log) write(r journal.Record) journal.Record {
	l.seq++
	r.Stream, r.Seq, r.Clock = l.stream, l.seq, l.clock.Now()
	l.all = append(l.all, r)
	return r
}

func (l *log) submit(id journal.JobID, s journal.Submission) journal.Record {
	l.w.t.Helper()
	r := journal.Record{Stream: l.stream, Job: id, Token: journal.Token{Generation: 1}}
	if s.ExpiresAt.IsZero() {
		s.ExpiresAt = l.w.time().Add(24 * time.Hour)
	}
	if err := l.w.sealer.SealSubmission(&r, &s); err != nil {
		l.w.t.Fatal(err)
	}
	return l.write(r)
}

// fromDisk returns the record as another node, or a restarted one, has it, without a
// cached head.
func fromDisk(t testing.TB, r journal.Record) journal.Record {
	t.Helper()
	frame, err := journal.AppendFrame(nil, &r)
	if err != nil {
		t.Fatal(err)
	}
	if r, _, err = journal.NextFrame(frame); err != nil {
		t.Fatal(err)
	}
	return r
}

func (l *log) start(id journal.JobID, token journal.Token, attempt uint32) journal.Record {
	return l.write(journal.Record{Kind: journal.Started, Job: id, Token: token, Attempt: attempt})
}

func (l *log) finish(id journal.JobID, token journal.Token, attempt uint32, o journal.Outcome) journal.Record {
	l.w.t.Helper()
	r := journal.Record{Stream: l.stream, Job: id, Token: token, Attempt: attempt}
	if err := l.w.sealer.SealOutcome(&r, &o); err != nil {
		l.w.t.Fatal(err)
	}
	return l.write(r)
}

// newID makes an id that begins with the time.
func (w *world) newID() journal.JobID {
	var id journal.JobID
	binary.BigEndian.PutUint64(id[:], uint64(w.time().UnixMilli())<<16)
	binary.BigEndian.PutUint64(id[8:], rand.Uint64())
	return id
}

// running is a table on which Run is running.
type running struct {
	*Table
	end func()
}

// start opens a table and runs it. end stops it, and reports an error of Run.
func start(t testing.TB, o Options) *running {
	t.Helper()
	table, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- table.Run(ctx) }()
	for !table.committing.Load() {
		runtime.Gosched()
	}
	once := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if err := table.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	t.Cleanup(once)
	return &running{table, once}
}

func (r *running) check(t testing.TB) {
	t.Helper()
	if err := r.Check(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func (r *running) get(t testing.TB, id journal.JobID) Row {
	t.Helper()
	row, ok, err := r.Get(id)
	if err != nil || !ok {
		t.Fatalf("Get(%s) = %v, %v", id, ok, err)
	}
	return row
}

func TestJobLifeCycle(t *testing.T) {
	w := newWorld(t)
	o := w.options(t.TempDir())
	table := start(t, o)
	l := w.log("a")
	id := w.newID()
	token := journal.Token{Generation: 1, Index: 7}

	want := func(status journal.Status) {
		t.Helper()
		if got := table.get(t, id).Status(); got != status {
			t.Fatalf("status %q, want %q", got, status)
		}
		for _, tenant := range []string{"acme", "other"} {
			rows, more, err := table.List(Filter{Tenant: tenant, Status: []journal.Status{status}})
			if n := map[string]int{"acme": 1}[tenant]; err != nil || more || len(rows) != n {
				t.Fatalf("List of %s: %d rows, %v, %v; want %d", tenant, len(rows), more, err, n)
			}
		}
		if n := table.Counts()[status]; n != 1 {
			t.Fatalf("%d jobs are %s", n, status)
		}
	}
	apply := func(r journal.Record) { table.Apply(l.stream, []journal.Record{r}) }

	apply(l.submit(id, journal.Submission{Tenant: "acme", KeyHash: "k"}))
	want(journal.Queued)
	table.check(t) // and in the file
	want(journal.Queued)
	if n := table.LiveCounts()[l.stream]; n != 1 {
		t.Errorf("%d live jobs", n)
	}
	apply(l.start(id, token, 1))
	want(journal.Running)
	apply(l.finish(id, token, 1, journal.Outcome{Status: journal.Succeeded, Body: []byte("yes")}))
	want(journal.Succeeded)
	if ids, err := table.FindKey("k"); err != nil || len(ids) != 1 || ids[0] != id {
		t.Errorf("FindKey: %v, %v", ids, err)
	}
	table.check(t)
	if ids, err := table.FindKey("k"); err != nil || len(ids) != 1 || ids[0] != id {
		t.Errorf("FindKey: %v, %v", ids, err)
	}
	if n := table.Applied(l.stream); n != 3 {
		t.Errorf("applied %d of 3", n)
	}
	if n := len(table.LiveCounts()); n != 0 {
		t.Errorf("%d streams have live jobs", n)
	}
	table.end()

	table = start(t, o)
	want(journal.Succeeded)
	if table.Fresh() {
		t.Error("Fresh is true for an existing table")
	}
	if n := table.Applied(l.stream); n != 3 {
		t.Errorf("applied %d of 3 after a restart", n)
	}
	current, _ := table.get(t, id).Current()
	outcome, err := w.sealer.OpenOutcome(&current)
	if err != nil || string(outcome.Body) != "yes" {
		t.Errorf("outcome %q, %v", outcome.Body, err)
	}
	apply(l.write(journal.Record{Kind: journal.Deleted, Job: id}))
	if row := table.get(t, id); !row.Deleted() || row.Status() != "" {
		t.Errorf("a deleted job: %+v", row)
	}
	if n := table.Counts()[journal.Succeeded]; n != 0 {
		t.Errorf("%d succeeded jobs after the deletion", n)
	}
	table.check(t)
}
