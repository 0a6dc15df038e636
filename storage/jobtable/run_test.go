package jobtable

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Several streams are applied concurrently with reads and commits; the watcher
// is called with each job's changes in order.
func TestConcurrentUse(t *testing.T) {
	w := newWorld(t)
	table := start(t, w.options(t.TempDir()))
	const jobs = 200
	logs := []*log{w.log("a"), w.log("b"), w.log("c")}
	for i := range jobs {
		id := w.newID()
		for n, l := range logs {
			l.submit(id, journal.Submission{Tenant: "x"})
			for attempt := range uint32(3) {
				l.start(id, journal.Token{Generation: 1, Index: uint64(n)}, attempt+1)
			}
			l.finish(id, journal.Token{Generation: 1, Index: uint64(n)}, 3, journal.Outcome{Status: journal.Succeeded, Body: make([]byte, i)})
		}
	}
	var mu sync.Mutex
	heard := map[journal.JobID]Row{}
	changes := 0
	table.Watch(func(r Row) {
		mu.Lock()
		defer mu.Unlock()
		changes++
		// Each row includes the previous one.
		if before := heard[r.ID()]; !equal(Join(before.Records, r.Records), r.Records) {
			t.Errorf("the watcher was called with %v after %v", r, before)
		}
		heard[r.ID()] = r
	})
	stop := make(chan struct{})
	var reading, applying sync.WaitGroup
	reading.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			rows, _, err := table.List(Filter{Tenant: "x", Limit: 20})
			if err != nil {
				t.Errorf("List: %v", err)
				return
			}
			seen := map[journal.JobID]bool{}
			for _, r := range rows {
				if seen[r.ID()] {
					t.Errorf("job %s is listed twice", r.ID())
				}
				seen[r.ID()] = true
				now, ok, err := table.Get(r.ID())
				if err != nil || !ok || !equal(Join(r.Records, now.Records), now.Records) {
					t.Errorf("Get returned an older row: %v after %v (%v)", now, r, err)
				}
			}
			if _, err := table.digestsSince(0); err != nil {
				t.Errorf("Digests: %v", err)
			}
		}
	})
	// Commit continuously, so that rows change while they are written.
	reading.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := table.flush(t.Context()); err != nil {
				t.Errorf("flush: %v", err)
				return
			}
		}
	})
	for _, l := range logs {
		applying.Go(func() {
			for from := 0; from < len(l.all); from += 7 {
				table.Apply(l.stream, l.all[from:min(len(l.all), from+7)])
			}
		})
	}
	applying.Wait()
	close(stop)
	reading.Wait()
	table.check(t)
	if n := table.Counts()[journal.Succeeded]; n != jobs || len(heard) != jobs {
		t.Errorf("%d jobs succeeded, the watcher saw %d, want %d", n, len(heard), jobs)
	}
	for id, r := range heard {
		if now := table.get(t, id); !equal(now.Records, r.Records) {
			t.Errorf("the watcher's last row is %v, Get returned %v", r, now)
		}
	}
	if n := table.pending.Load(); n != 0 {
		t.Errorf("%d bytes are pending after everything is durable", n)
	}
	for _, l := range logs {
		if n := table.Applied(l.stream); n != l.seq {
			t.Errorf("applied %d of %d", n, l.seq)
		}
	}
}

// Apply keeps no reference to the caller's buffer.
func TestApplyCopies(t *testing.T) {
	w := newWorld(t)
	table := start(t, w.options(t.TempDir()))
	l := w.log("a")
	id := w.newID()
	r := l.submit(id, journal.Submission{Tenant: "x"})
	frame, err := journal.AppendFrame(nil, &r)
	if err != nil {
		t.Fatal(err)
	}
	payload := bytes.Clone(r.Payload)
	if r, _, err = journal.NextFrame(frame); err != nil { // as if received from a peer
		t.Fatal(err)
	}
	table.Apply(l.stream, []journal.Record{r})
	clear(frame)
	if sub, _ := table.get(t, id).Submitted(); !bytes.Equal(sub.Payload, payload) {
		t.Error("the payload changed with the caller's buffer")
	}
	table.check(t)
	if sub, _ := table.get(t, id).Submitted(); !bytes.Equal(sub.Payload, payload) {
		t.Error("the payload in the file changed with the caller's buffer")
	}
}

// Apply blocks without commits, so that memory stays bounded.
func TestApplyWaitsForCommits(t *testing.T) {
	w := newWorld(t)
	table, err := Open(w.options(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	l := w.log("a")
	const n = 3 * maxPending / (1 << 20)
	for range n {
		l.submit(w.newID(), journal.Submission{Body: make([]byte, 1<<20)})
	}
	for i := range l.all { // zstd compresses zeros to almost nothing
		l.all[i].Payload = append(l.all[i].Payload, make([]byte, 1<<20)...)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		table.Apply(l.stream, l.all)
	}()
	for table.pending.Load() < maxPending {
		select {
		case <-done:
			t.Fatal("Apply did not block")
		case <-time.After(time.Millisecond):
		}
	}
	for waiting := true; waiting; {
		if p := table.pending.Load(); p > maxPending+4<<20 {
			t.Fatalf("%d bytes are pending", p)
		}
		if err := table.commit(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-done:
			waiting = false
		case <-time.After(time.Millisecond):
		}
	}
	if got := table.Counts()[journal.Queued]; got != n {
		t.Errorf("%d jobs of %d", got, n)
	}
	if err := table.Close(); err != nil {
		t.Error(err)
	}
}

// A node that lost its table merges the rows of another node and then applies
// further records.
func TestRebuiltFromAnotherNode(t *testing.T) {
	w := newWorld(t)
	source := start(t, w.options(t.TempDir()))
	l, other := w.log("a"), w.log("b")
	for i := range 300 {
		id := w.newID()
		l.submit(id, journal.Submission{Tenant: fmt.Sprint(i % 3), Body: make([]byte, i)})
		if i%3 == 0 {
			other.finish(id, journal.Token{Generation: 1}, 1, journal.Outcome{Status: journal.Failed})
		}
	}
	source.Apply(l.stream, l.all)
	source.Apply(other.stream, other.all)
	source.check(t)

	o := w.options(t.TempDir())
	copied := start(t, o)
	applied := source.AppliedAll()
	for after, more := (journal.JobID{}), true; more; {
		var frames []byte
		var err error
		if frames, after, more, err = source.Rows(after, 10_000); err != nil {
			t.Fatal(err)
		}
		if err := copied.Merge(t.Context(), frames); err != nil {
			t.Fatal(err)
		}
		if n := copied.pending.Load(); n != 0 {
			t.Fatalf("%d bytes are pending after Merge", n)
		}
	}
	for s, seq := range applied {
		if err := copied.SetApplied(t.Context(), s, seq); err != nil {
			t.Fatal(err)
		}
	}
	compare := func() []byte {
		t.Helper()
		if a, b := source.AppliedAll(), copied.AppliedAll(); !maps.Equal(a, b) {
			t.Fatalf("the tables have applied %v and %v", a, b)
		}
		a, err := source.Digests()
		if err != nil {
			t.Fatal(err)
		}
		b, err := copied.Digests()
		if err != nil {
			t.Fatal(err)
		}
		var differ []byte
		for i := range a {
			if a[i] != b[i] {
				differ = append(differ, byte(i))
			}
		}
		return differ
	}
	if d := compare(); len(d) != 0 {
		t.Errorf("buckets %v differ", d)
	}
	next := l.submit(w.newID(), journal.Submission{})
	for _, table := range []*running{source, copied} {
		table.Apply(l.stream, []journal.Record{next})
		table.check(t)
	}
	if d := compare(); len(d) != 0 {
		t.Errorf("buckets %v differ after one more record", d)
	}
	if err := copied.Merge(t.Context(), []byte("no frames at all, but long enough")); !errors.Is(err, ErrDamaged) {
		t.Errorf("Merge of malformed frames: %v", err)
	}

	// A difference shows in its bucket, and merging that bucket repairs it.
	third := w.log("c")
	lost := third.write(journal.Record{Kind: journal.CancelAsked, Job: l.all[7].Job})
	if err := source.join(lost.Job, []journal.Record{lost}, absenceUnknown); err != nil {
		t.Fatal(err)
	}
	source.check(t)
	d := compare()
	if len(d) != 1 || d[0] != bucketOf(lost.Job) {
		t.Fatalf("buckets %v differ, want %d", d, bucketOf(lost.Job))
	}
	for after, more := (journal.JobID{}), true; more; {
		var frames []byte
		var err error
		if frames, after, more, err = source.Bucket(d[0], after, 2000); err != nil {
			t.Fatal(err)
		}
		if err := copied.Merge(t.Context(), frames); err != nil {
			t.Fatal(err)
		}
	}
	if d := compare(); len(d) != 0 {
		t.Errorf("buckets %v differ after the repair", d)
	}
	copied.end()
	copied = start(t, o)
	if a, b := source.AppliedAll(), copied.AppliedAll(); !maps.Equal(a, b) {
		t.Errorf("the tables have applied %v and %v after a restart", a, b)
	}
	copied.check(t)
}

func TestReseal(t *testing.T) {
	w := newWorld(t)
	table := start(t, w.options(t.TempDir()))
	l := w.log("a")
	for i := range 100 {
		id := w.newID()
		l.submit(id, journal.Submission{Tenant: "x", Body: []byte(fmt.Sprint(i))})
		l.finish(id, journal.Token{Generation: 1}, 1, journal.Outcome{Status: journal.Succeeded})
	}
	table.Apply(l.stream, l.all)
	from := w.keys[1].ID()
	carries := func(k keyring.KeyID) int64 {
		t.Helper()
		n, err := table.Carries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return n[k]
	}
	if n := carries(from); n != 200 {
		t.Fatalf("%d payloads are sealed with the key, want 200", n)
	}
	if err := table.Reseal(t.Context(), from); err == nil {
		t.Error("Reseal to the same key succeeded")
	}
	before, err := table.Digests()
	if err != nil {
		t.Fatal(err)
	}
	w.keys = keyringtest.Rotate(t, w.ring, w.keys)
	to := w.keys[2].ID()
	if err := table.Reseal(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	if a, b := carries(from), carries(to); a != 0 || b != 200 {
		t.Errorf("%d payloads are sealed with the old key, %d with the new one", a, b)
	}
	if after, err := table.Digests(); err != nil || after != before {
		t.Errorf("the digests changed (%v)", err)
	}
	table.check(t)

	// Without the old key everything can still be opened, also after a record arrives
	// again.
	if err := w.ring.Set(to, slices.Delete(slices.Clone(w.keys), 1, 2)...); err != nil {
		t.Fatal(err)
	}
	if err := table.join(l.all[0].Job, l.all[:1], absenceUnknown); err != nil {
		t.Fatal(err)
	}
	for i := range l.all {
		sub, _ := table.get(t, l.all[i].Job).Submitted()
		if _, err := w.sealer.OpenSubmission(&sub); err != nil {
			t.Fatal(err)
		}
	}
	if n := carries(from); n != 0 {
		t.Errorf("%d payloads are sealed with a dropped key", n)
	}

	// A payload that can't be opened makes Reseal return an error, not loop forever.
	lost := w.log("b")
	r := lost.submit(w.newID(), journal.Submission{})
	r.Payload[len(r.Payload)-1] ^= 1
	table.Apply(lost.stream, []journal.Record{r})
	w.keys = keyringtest.Rotate(t, w.ring, w.keys)
	if err := table.Reseal(t.Context(), to); !errors.Is(err, errStuck) {
		t.Errorf("Reseal of a damaged payload: %v", err)
	}
	if n := carries(to); n != 1 {
		t.Errorf("%d payloads are sealed with the key, want the damaged one", n)
	}
}

// The files contain no plaintext of a tenant, an Idempotency-Key or a body.
func TestNoPlaintextOnDisk(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	table := start(t, w.options(dir))
	l := w.log("a")
	id := w.newID()
	canary := []byte("canary-4711")
	table.Apply(l.stream, []journal.Record{
		l.submit(id, journal.Submission{Tenant: string(canary), KeyHash: string(canary), Model: string(canary), Body: canary}),
		l.finish(id, journal.Token{Generation: 1}, 1, journal.Outcome{Status: journal.Failed, Error: string(canary), Body: canary}),
	})
	table.end()
	wantAbsent(t, dir, canary)
}

// A watcher is not called with a job's second change while it handles the first.
func TestWatchersAreCalledInOrder(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	a, b := w.log("a"), w.log("b")
	id := w.newID()
	first, second := a.submit(id, journal.Submission{}), b.start(id, journal.Token{Generation: 1}, 1)
	var told []string
	var later sync.WaitGroup
	table.Watch(func(r Row) {
		if r.Status() == journal.Running {
			told = append(told, "second")
			return
		}
		later.Go(func() { table.apply(b, second) })
		for row, _, err := table.Get(id); row.Status() != journal.Running; row, _, err = table.Get(id) {
			if err != nil {
				t.Error(err)
				return
			}
			runtime.Gosched()
		}
		for range 10_000 { // the change is visible: give a wrong call time to happen
			runtime.Gosched()
		}
		told = append(told, "first")
	})
	table.apply(a, first)
	later.Wait()
	if !slices.Equal(told, []string{"first", "second"}) {
		t.Errorf("the watcher was called with %v", told)
	}
}
