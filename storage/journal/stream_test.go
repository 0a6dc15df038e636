package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// Appends, copies, reads and trims run concurrently: every reader sees the same order,
// without gaps, and only durable records.
func TestConcurrentUse(t *testing.T) {
	defer goleak.VerifyNone(t)
	o := testOptions(t.TempDir())
	o.SegmentBytes, o.TailBytes = 20_000, 10_000
	var told sync.Map // stream → *atomic.Uint64
	o.Durable = func(id Stream, records []Record) {
		v, _ := told.LoadOrStore(id, new(atomic.Uint64))
		last := v.(*atomic.Uint64)
		for i := range records {
			if !last.CompareAndSwap(records[i].Seq-1, records[i].Seq) {
				t.Errorf("%s: Options.Durable got %d after %d", id, records[i].Seq, last.Load())
			}
		}
	}
	dst := mustOpen(t, o)
	so := testOptions(t.TempDir())
	so.SegmentBytes, so.TailBytes = 20_000, 10_000
	src := mustOpen(t, so)
	own := streamOf(1)
	mustCreate(t, dst, own)
	mustCreate(t, src, copied)

	const writers, each = 8, 60
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for range each {
				for _, at := range []struct {
					l  *Log
					id Stream
				}{{dst, own}, {src, copied}} {
					r := []Record{started(byte(w), strings.Repeat("x", rand.IntN(300)))}
					last, err := at.l.Append(context.Background(), at.id, r)
					if err != nil {
						t.Error(err)
						return
					}
					if at.l != dst {
						continue
					}
					if v, ok := told.Load(at.id); !ok || v.(*atomic.Uint64).Load() < last {
						t.Errorf("%d was acknowledged before Options.Durable got it", last)
					}
				}
			}
		})
	}
	const total = writers * each
	// follow reads a stream to its end while it grows.
	follow := func(l *Log, id Stream, fn func(frames []byte, next uint64) error) {
		for from := uint64(1); from <= total; {
			changed := l.Changed()
			frames, next, err := l.Read(id, from, 2000)
			if errors.Is(err, ErrTrimmed) {
				e, _ := l.End(id)
				from = e.First
				continue
			}
			if err == nil && len(frames) > 0 {
				err = fn(frames, next)
			}
			if err != nil {
				t.Errorf("follow %s from %d: %v", id, from, err)
				return
			}
			if next == from {
				<-changed
			}
			from = next
		}
	}
	wg.Go(func() {
		follow(src, copied, func(frames []byte, next uint64) error {
			durable, err := dst.Receive(context.Background(), copied, bytes.Clone(frames))
			if err == nil && durable != next-1 {
				err = fmt.Errorf("durable is %d, want %d", durable, next-1)
			}
			return err
		})
	})
	for _, id := range []Stream{own, copied} {
		for range 2 {
			wg.Go(func() {
				for _, held := dst.End(id); !held; _, held = dst.End(id) {
					<-dst.Changed()
				}
				follow(dst, id, func(frames []byte, next uint64) error {
					if e, _ := dst.End(id); e.Durable < next-1 {
						return fmt.Errorf("read up to %d, but durable is %d", next-1, e.Durable)
					}
					for len(frames) > 0 {
						var err error
						if _, frames, err = NextFrame(frames); err != nil {
							return err
						}
					}
					if rand.IntN(4) == 0 {
						return dst.Trim(id, max(next, 50)-50)
					}
					return nil
				})
			})
		}
	}
	wg.Wait()
	for _, id := range []Stream{own, copied} {
		if e, _ := dst.End(id); e.Durable != total {
			t.Errorf("%s ends with %+v", id, e)
		}
	}
	mustClose(t, dst)
	mustClose(t, src)
	dst = mustOpen(t, o)
	if e, _ := dst.End(own); e.Durable != total {
		t.Errorf("after reopening: %+v", e)
	}
	mustClose(t, dst)
}

// A caller whose context ends while its records are written gets ErrUncertain.
func TestAppendCancelledWhileWriting(t *testing.T) {
	o, d := testOptions(t.TempDir()), newFaultDisk()
	l, err := open(o, d)
	if err != nil {
		t.Fatal(err)
	}
	id := streamOf(1)
	mustCreate(t, l, id)
	syncing, release := make(chan struct{}), make(chan struct{})
	d.failing(func(call, _ string) error {
		if call == "sync" {
			syncing <- struct{}{}
			<-release
		}
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	answer := make(chan error)
	go func() {
		_, err := l.Append(ctx, id, []Record{started(1, "")})
		answer <- err
	}()
	<-syncing
	if e, _ := l.End(id); e.Durable != 0 {
		t.Errorf("Durable is %d before the sync", e.Durable)
	}
	if frames, _, err := l.Read(id, 1, 1000); err != nil || len(frames) > 0 {
		t.Errorf("read before the sync: %d bytes, %v", len(frames), err)
	}
	cancel()
	if err := <-answer; !errors.Is(err, ErrUncertain) || !errors.Is(err, context.Canceled) {
		t.Errorf("Append returned %v", err)
	}
	d.failing(nil)
	close(release)
	mustClose(t, l)
	l = mustOpen(t, o)
	if e, _ := l.End(id); e.Durable != 1 {
		t.Errorf("%+v", e)
	}
}

// Appends that wait while a batch is being written share the next syncs.
func TestAppendsShareSyncs(t *testing.T) {
	o, d := testOptions(t.TempDir()), newFaultDisk()
	l, err := open(o, d)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, l)
	id := streamOf(1)
	mustCreate(t, l, id)
	syncing, release := make(chan struct{}, 1000), make(chan struct{})
	var syncs atomic.Int64
	d.failing(func(call, _ string) error {
		if call == "sync" {
			syncs.Add(1)
			syncing <- struct{}{}
			<-release
		}
		return nil
	})
	var wg sync.WaitGroup
	one := func() {
		if _, err := l.Append(context.Background(), id, []Record{started(1, "")}); err != nil {
			t.Error(err)
		}
	}
	wg.Go(one)
	<-syncing
	s, err := l.find(id)
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		wg.Go(one)
	}
	waiting := func() (n int) {
		s.queue.mu.Lock()
		defer s.queue.mu.Unlock()
		for _, b := range s.queue.batches {
			n += len(b.records)
		}
		return n
	}
	for waiting() < 100 {
		<-time.After(time.Millisecond)
	}
	close(release)
	wg.Wait()
	if n := syncs.Load(); n != 2 {
		t.Errorf("%d syncs for 1 + 100 appends", n)
	}
}

func TestQueueIsBounded(t *testing.T) {
	q := newQueue()
	big := []Record{{}}
	for range maxBatches {
		if _, _, err := q.add(context.Background(), big, batchBytes); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := q.add(ctx, big, batchBytes); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUncertain) {
		t.Fatalf("a full queue: %v", err)
	}
	go func() { close(q.next().done) }()
	if _, _, err := q.add(context.Background(), big, batchBytes); err != nil {
		t.Fatal(err)
	}
	q.close(ErrFrozen)
	if _, _, err := q.add(context.Background(), big, 1); !errors.Is(err, ErrFrozen) {
		t.Fatal(err)
	}
	for range maxBatches {
		if q.next() == nil {
			t.Fatal("a queued batch was lost")
		}
	}
	if q.next() != nil {
		t.Fatal("next returned more batches than were queued")
	}
}

func TestFreezeWritesQueuedRecords(t *testing.T) {
	l := mustOpen(t, testOptions(t.TempDir()))
	id := streamOf(1)
	mustCreate(t, l, id)
	if e, _ := l.End(id); !e.Own {
		t.Fatal("Own is false")
	}
	mustAppend(t, l, id, started(1, ""))
	if err := l.Freeze(id); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(context.Background(), id, []Record{started(1, "")}); !errors.Is(err, ErrFrozen) {
		t.Fatal(err)
	}
	awaitWritten(t, l, id)
	if e, _ := l.End(id); e != (End{First: 1, Durable: 1}) {
		t.Fatalf("%+v", e)
	}
}

func awaitWritten(t *testing.T, l *Log, id Stream) {
	t.Helper()
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		switch e, _ := l.End(id); {
		case !e.Writing:
			return
		case time.Now().After(until):
			t.Fatal("the stream is still written")
		}
	}
}

// A frozen stream counts as written until its queued records are on the disk: who sees
// that it is not written has seen its end.
func TestFrozenStreamIsWrittenToItsEnd(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, testOptions(dir))
	id := streamOf(1)
	mustCreate(t, l, id)
	s, err := l.find(id)
	if err != nil {
		t.Fatal(err)
	}
	s.write.Lock() // the disk is slow
	s.mu.Lock()
	q := s.queue
	s.mu.Unlock()
	records := []Record{started(1, ""), started(1, "")}
	for i := range records {
		records[i].Stream = id
	}
	b, _, err := q.add(t.Context(), records, 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Freeze(id); err != nil {
		t.Fatal(err)
	}
	if e, _ := l.End(id); e.Own || !e.Writing || e.Durable != 0 {
		t.Errorf("while records are queued: %+v", e)
	}
	s.write.Unlock()
	<-b.done
	awaitWritten(t, l, id)
	if e, _ := l.End(id); e.Durable != 2 {
		t.Errorf("at the end: %+v", e)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = mustOpen(t, testOptions(dir))
	if e, _ := l.End(id); e.Writing || e.Durable != 2 {
		t.Errorf("after a restart: %+v", e)
	}
}

func TestInvalidCallsAreRefused(t *testing.T) {
	ctx := context.Background()
	l := mustOpen(t, testOptions(t.TempDir()))
	id := streamOf(1)
	mustCreate(t, l, id)
	mustAppend(t, l, id, started(1, ""), started(1, ""))
	frame := func(seq uint64) []byte {
		r := copiedRecord(seq)
		b, err := AppendFrame(nil, &r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	two := append(frame(1), frame(2)...)
	if d, err := l.Receive(ctx, copied, two); d != 2 || err != nil {
		t.Fatal(d, err)
	}
	other := copiedRecord(2)
	other.Job[15]++
	diverged, err := AppendFrame(nil, &other)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(_ any, err error) error { return err }
	read := func(id Stream, from uint64) error {
		_, _, err := l.Read(id, from, 10)
		return err
	}
	for name, tt := range map[string]struct{ got, want error }{
		"create again":         {l.Create(ctx, id), ErrStreamExists},
		"no name":              {l.Create(ctx, Stream{}), ErrTooLarge},
		"append to none":       {answer(l.Append(ctx, streamOf(7), []Record{started(1, "")})), ErrNoStream},
		"append to a copy":     {answer(l.Append(ctx, copied, []Record{started(1, "")})), ErrFrozen},
		"append no record":     {answer(l.Append(ctx, id, []Record{{Kind: 99}})), ErrDamaged},
		"append too much":      {answer(l.Append(ctx, id, []Record{{Kind: Started, Payload: make([]byte, MaxPayload+1)}})), ErrTooLarge},
		"append too many":      {answer(l.Append(ctx, id, []Record{started(1, string(make([]byte, 20<<20))), started(1, string(make([]byte, 20<<20)))})), ErrTooLarge},
		"receive own":          {answer(l.Receive(ctx, id, nil)), nil},
		"receive a gap":        {answer(l.Receive(ctx, copied, frame(4))), ErrGap},
		"receive gaps":         {answer(l.Receive(ctx, copied, append(frame(3), frame(5)...))), ErrGap},
		"receive from 5":       {answer(l.Receive(ctx, Stream{"x", Incarnation{1}}, frame(5))), ErrDamaged},
		"receive another":      {answer(l.Receive(ctx, copied, diverged)), ErrDiverged},
		"receive half a frame": {answer(l.Receive(ctx, copied, frame(3)[:30])), ErrShort},
		"read none":            {read(streamOf(7), 1), ErrNoStream},
		"read behind the end":  {read(copied, 4), ErrGap},
		"read at the end":      {read(copied, 3), nil},
		"trim none":            {l.Trim(streamOf(7), 1), ErrNoStream},
		"drop none":            {l.Drop(streamOf(7)), ErrNoStream},
		"freeze none":          {l.Freeze(streamOf(7)), ErrNoStream},
	} {
		if !errors.Is(tt.got, tt.want) || tt.want == nil && tt.got != nil {
			t.Errorf("%s: %v, want %v", name, tt.got, tt.want)
		}
	}
	if err := l.Err(); err != nil {
		t.Fatal(err)
	}
	mustClose(t, l)
	mustClose(t, l)
	if err := read(id, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	if err := answer(l.Append(ctx, id, []Record{started(1, "")})); !errors.Is(err, ErrClosed) {
		t.Errorf("append after Close: %v", err)
	}
	if err := answer(l.Receive(ctx, copied, frame(3))); !errors.Is(err, ErrClosed) {
		t.Errorf("receive after Close: %v", err)
	}
}

func TestTooManyStreams(t *testing.T) {
	l, err := open(testOptions(t.TempDir()), newFaultDisk()) // it does not sync directories
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, l)
	for i := range MaxStreams {
		r := copiedRecord(1)
		r.Stream.Incarnation = Incarnation{1, byte(i >> 8), byte(i)}
		frame, err := AppendFrame(nil, &r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Receive(context.Background(), r.Stream, frame); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Create(context.Background(), streamOf(1)); !errors.Is(err, ErrTooManyStreams) {
		t.Fatal(err)
	}
	if n := len(l.openSegs.order); n > maxActive {
		t.Fatalf("%d files are open", n)
	}
}

// After a snapshot a copy begins in the middle; older records are removed.
func TestReceiveFrom(t *testing.T) {
	ctx := context.Background()
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	frames := func(from, to uint64) (b []byte) {
		for seq := from; seq <= to; seq++ {
			r := copiedRecord(seq)
			var err error
			if b, err = AppendFrame(b, &r); err != nil {
				t.Fatal(err)
			}
		}
		return b
	}
	if _, err := l.Receive(ctx, copied, frames(1, 10)); err != nil {
		t.Fatal(err)
	}
	if err := l.ReceiveFrom(copied, 5); err != nil {
		t.Fatal(err)
	}
	if e, _ := l.End(copied); e != (End{First: 1, Durable: 10}) {
		t.Fatalf("%+v", e)
	}
	if err := l.ReceiveFrom(copied, 100); err != nil {
		t.Fatal(err)
	}
	other := copied
	other.Incarnation[3]++
	if err := l.ReceiveFrom(other, 7); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Receive(ctx, copied, frames(100, 110)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if e, _ := l.End(copied); e != (End{First: 100, Durable: 110}) {
			t.Fatalf("%+v", e)
		}
		if e, _ := l.End(other); e != (End{First: 7, Durable: 6}) {
			t.Fatalf("%+v", e)
		}
		if _, _, err := l.Read(copied, 10, 1000); !errors.Is(err, ErrTrimmed) {
			t.Fatal(err)
		}
		// Records from before the copy's beginning are skipped.
		if d, err := l.Receive(ctx, copied, frames(90, 105)); d != 110 || err != nil {
			t.Fatal(d, err)
		}
		mustClose(t, l)
		l = mustOpen(t, o)
	}
}

// A crash after the new first segment was created, before the old ones were removed.
func TestReceiveFromInterruptedByACrash(t *testing.T) {
	o, d := testOptions(t.TempDir()), newFaultDisk()
	l, err := open(o, d)
	if err != nil {
		t.Fatal(err)
	}
	r := copiedRecord(1)
	frame, err := AppendFrame(nil, &r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Receive(context.Background(), copied, frame); err != nil {
		t.Fatal(err)
	}
	d.failing(failAll("remove", unix.EIO))
	if err := l.ReceiveFrom(copied, 100); !errors.Is(err, ErrFailed) {
		t.Fatal(err)
	}
	_ = l.Close()
	l = mustOpen(t, o)
	if e, _ := l.End(copied); e != (End{First: 100, Durable: 99}) {
		t.Fatalf("%+v", e)
	}
}

// Over budget the oldest segments are removed if they are applied.
func TestShrink(t *testing.T) {
	o := testOptions(t.TempDir())
	o.SegmentBytes, o.BudgetBytes = 1000, 6000
	l := mustOpen(t, o)
	a, b := streamOf(1), streamOf(2)
	mustCreate(t, l, a)
	mustCreate(t, l, b)
	for range 50 {
		mustAppend(t, l, a, started(1, strings.Repeat("x", 100)))
	}
	for range 20 {
		mustAppend(t, l, b, started(1, strings.Repeat("x", 100)))
	}
	none, err := l.Shrink(func(Stream) uint64 { return 0 })
	if err != nil || len(none) > 0 || l.bytes.Load() <= o.BudgetBytes {
		t.Fatalf("%v trimmed without being applied, %d bytes: %v", none, l.bytes.Load(), err)
	}
	got, err := l.Shrink(func(id Stream) uint64 {
		if id == a {
			return 30
		}
		return 1000
	})
	if err != nil || l.bytes.Load() > o.BudgetBytes {
		t.Fatalf("%d bytes left: %v", l.bytes.Load(), err)
	}
	ea, _ := l.End(a)
	if got[a] != ea.First || ea.First > 31 || ea.First < 2 {
		t.Fatalf("%v, %+v", got, ea)
	}
	before := l.bytes.Load()
	mustClose(t, l)
	l = mustOpen(t, o)
	if l.bytes.Load() != before {
		t.Fatalf("%d bytes, before %d", l.bytes.Load(), before)
	}
}

// The end of a stream is read from memory.
func TestTailIsReadFromMemory(t *testing.T) {
	o, d := testOptions(t.TempDir()), newFaultDisk()
	l, err := open(o, d)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, l)
	id := streamOf(1)
	mustCreate(t, l, id)
	mustAppend(t, l, id, started(1, "one"), started(2, "two"))
	mustAppend(t, l, id, started(3, "three"))
	d.failing(failAll("open", unix.EIO))
	if got := recordsOf(t, l, id, 2); len(got) != 2 {
		t.Fatalf("%d records", len(got))
	}
	d.failing(nil)
}

func TestTailsAreBounded(t *testing.T) {
	ts := tails{limit: 1000, chunks: map[Stream][]*chunk{}}
	for i := range uint64(100) {
		r := copiedRecord(i + 1)
		r.Payload = make([]byte, 100)
		for n := range byte(3) {
			r.Stream = streamOf(n)
			frame, err := AppendFrame(nil, &r)
			if err != nil {
				t.Fatal(err)
			}
			ts.add(r.Stream, r.Seq, r.Seq, frame)
			if ts.held > ts.limit {
				t.Fatalf("%d bytes are cached", ts.held)
			}
		}
		if i == 50 {
			ts.drop(streamOf(1))
		}
	}
	if _, next, ok := ts.read(streamOf(0), 100, 10); !ok || next != 101 {
		t.Fatalf("the last batch is not cached: %v %d", ok, next)
	}
	if _, _, ok := ts.read(streamOf(0), 3, 10); ok {
		t.Fatal("an old batch is still cached")
	}
	for n := range byte(3) {
		ts.drop(streamOf(n))
	}
	if ts.held != 0 || len(ts.chunks) != 0 {
		t.Fatalf("%d bytes are accounted for, but nothing is cached", ts.held)
	}
}

func TestStoreEpoch(t *testing.T) {
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	epoch := l.StoreEpoch()
	mustClose(t, l)
	l = mustOpen(t, o)
	if l.StoreEpoch() != epoch || epoch < uint64(time.Now().Add(-time.Hour).UnixMilli()) {
		t.Fatalf("%d, before %d", l.StoreEpoch(), epoch)
	}
	mustClose(t, l)
	if err := os.RemoveAll(o.Dir); err != nil {
		t.Fatal(err)
	}
	for uint64(time.Now().UnixMilli()) == epoch {
		<-time.After(time.Millisecond)
	}
	l = mustOpen(t, o)
	if l.StoreEpoch() <= epoch {
		t.Fatalf("%d, before %d", l.StoreEpoch(), epoch)
	}
}
