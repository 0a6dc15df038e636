package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func testOptions(dir string) Options {
	return Options{
		Dir:        filepath.Join(dir, "journal"),
		Clock:      NewHLC(time.Now, 10*time.Minute),
		Logger:     slog.New(slog.DiscardHandler),
		Registerer: prometheus.NewRegistry(),
		FreeFloor:  -1,
	}
}

func mustOpen(t testing.TB, o Options) *Log {
	t.Helper()
	o.Registerer = prometheus.NewRegistry()
	l, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() }) // a test that checks the error has closed it
	return l
}

func mustClose(t testing.TB, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func streamOf(n byte) Stream {
	return Stream{Origin: fmt.Sprintf("node-%d", n), Incarnation: Incarnation{15: n}}
}

func mustCreate(t testing.TB, l *Log, id Stream) {
	t.Helper()
	if err := l.Create(context.Background(), id); err != nil {
		t.Fatal(err)
	}
}

// started makes a record with an arbitrary payload: the journal never opens payloads.
func started(job byte, payload string) Record {
	r := Record{Kind: Started, Job: JobID{job}, Attempt: 1, Token: Token{1, 300}}
	if payload != "" {
		r.Payload = []byte(payload)
	}
	return r
}

func mustAppend(t testing.TB, l *Log, id Stream, records ...Record) uint64 {
	t.Helper()
	last, err := l.Append(context.Background(), id, records)
	if err != nil {
		t.Fatal(err)
	}
	return last
}

// recordsOf reads all records of a stream from a seq on.
func recordsOf(t fataler, l *Log, id Stream, from uint64) []Record {
	t.Helper()
	var all []Record
	for {
		frames, next, err := l.Read(id, from, 1000)
		if err != nil {
			t.Fatalf("read %s from %d: %v", id, from, err)
		}
		if next == from {
			return all
		}
		for len(frames) > 0 {
			var r Record
			if r, frames, err = NextFrame(frames); err != nil {
				t.Fatal(err)
			}
			if r.Seq != from {
				t.Fatalf("record %d, want %d", r.Seq, from)
			}
			from++
			all = append(all, r)
		}
		if from != next {
			t.Fatalf("the frames end with %d, next is %d", from-1, next)
		}
	}
}

func TestAppendedRecordsAreReadAfterReopening(t *testing.T) {
	o := testOptions(t.TempDir())
	var mu sync.Mutex
	var heard []uint64
	o.Durable = func(_ Stream, records []Record) {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range records {
			heard = append(heard, r.Seq)
		}
	}
	l := mustOpen(t, o)
	id := streamOf(1)
	mustCreate(t, l, id)
	changed := l.Changed()
	records := []Record{started(1, "one"), started(2, ""), started(3, "three")}
	if last := mustAppend(t, l, id, records...); last != 3 {
		t.Fatalf("last seq %d", last)
	}
	select {
	case <-changed:
	default:
		t.Fatal("Options.Durable was not called")
	}
	if records[0].Seq != 1 || records[2].Seq != 3 || records[2].Clock <= records[0].Clock {
		t.Fatalf("Append did not set the caller's records: %+v", records)
	}
	got := recordsOf(t, l, id, 1)
	mustClose(t, l)

	l = mustOpen(t, o)
	again := recordsOf(t, l, id, 1)
	if len(again) != 3 || len(heard) != 3 || heard[2] != 3 {
		t.Fatalf("%d records, Options.Durable got %v", len(again), heard)
	}
	for i := range again {
		if !again[i].same(&got[i]) || !bytes.Equal(again[i].Payload, got[i].Payload) {
			t.Fatalf("record %d is %+v, want %+v", i, again[i], got[i])
		}
	}
	if _, err := l.Append(context.Background(), id, records); !errors.Is(err, ErrFrozen) {
		t.Fatalf("append to an old incarnation: %v", err)
	}
}

func TestReceiveCopiesFrames(t *testing.T) {
	src, dst := mustOpen(t, testOptions(t.TempDir())), mustOpen(t, testOptions(t.TempDir()))
	id := streamOf(1)
	mustCreate(t, src, id)
	for i := range 10 {
		mustAppend(t, src, id, started(byte(i), "payload"))
	}
	frames, next, err := src.Read(id, 1, 1<<20)
	if err != nil || next != 11 {
		t.Fatalf("next %d: %v", next, err)
	}
	half := len(frames) / 2
	for half%(len(frames)/10) != 0 {
		half++
	}
	for _, part := range [][]byte{frames[:half], frames, frames[half:]} {
		if _, err := dst.Receive(context.Background(), id, part); err != nil {
			t.Fatal(err)
		}
	}
	copied, _, err := dst.Read(id, 1, 1<<20)
	if err != nil || !bytes.Equal(copied, frames) {
		t.Fatalf("the copy differs: %v", err)
	}
	if _, err := src.Receive(context.Background(), id, frames); !errors.Is(err, ErrFrozen) {
		t.Fatalf("receive into an own stream: %v", err)
	}
	other := streamOf(2)
	if _, err := dst.Receive(context.Background(), other, frames); !errors.Is(err, ErrDamaged) {
		t.Fatalf("receive frames of another stream: %v", err)
	}
}

func TestOpenCreatesAStore(t *testing.T) {
	o := testOptions(t.TempDir())
	mustClose(t, mustOpen(t, o))
	if _, err := os.Stat(filepath.Join(o.Dir, storeFile)); err != nil {
		t.Fatal(err)
	}
}

// In a directory that was deleted or replaced nothing is accepted, since no later process
// would find it. When it vanishes during a write, nobody is told that the record is safe.
func TestNothingIsAcceptedInADirectoryThatIsGone(t *testing.T) {
	o := testOptions(t.TempDir())
	var mu sync.Mutex
	gone, after := false, 0
	o.Intact = func() error {
		mu.Lock()
		defer mu.Unlock()
		if after > 0 {
			after--
			return nil
		}
		if gone {
			return errors.New("deleted")
		}
		return nil
	}
	set := func(g bool, n int) { mu.Lock(); defer mu.Unlock(); gone, after = g, n }
	l := mustOpen(t, o)
	own, copied := streamOf(1), streamOf(2)
	mustCreate(t, l, own)
	if _, err := l.Append(t.Context(), own, []Record{started(1, "a")}); err != nil {
		t.Fatal(err)
	}
	set(true, 0)
	if _, err := l.Append(t.Context(), own, []Record{started(2, "b")}); !errors.Is(err, ErrReplaced) || !Refused(err) {
		t.Errorf("append: %v", err)
	}
	if err := l.Create(t.Context(), copied); !errors.Is(err, ErrReplaced) {
		t.Errorf("create: %v", err)
	}
	r := started(3, "c")
	r.Stream, r.Seq, r.Clock = copied, 1, 1
	frame, err := AppendFrame(nil, &r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Receive(t.Context(), copied, frame); !errors.Is(err, ErrReplaced) {
		t.Errorf("receive: %v", err)
	}
	set(true, 1) // it is there before the write, and not afterwards
	if _, err := l.Append(t.Context(), own, []Record{started(4, "d")}); !errors.Is(err, ErrUncertain) || !errors.Is(err, ErrReplaced) {
		t.Errorf("append during which the directory vanished: %v", err)
	}
	set(false, 0)
	if _, err := l.Append(t.Context(), own, []Record{started(5, "e")}); err != nil || l.Err() != nil {
		t.Errorf("append when the directory is back: %v, %v", err, l.Err())
	}
}
