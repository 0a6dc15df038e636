package journal

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// filled makes a log with one stream of many small segments, ends it by the given
// function, and returns the acknowledged records.
func filled(t *testing.T, o Options, n int, end func(*Log)) []Record {
	t.Helper()
	l := mustOpen(t, o)
	id := streamOf(1)
	mustCreate(t, l, id)
	var all []Record
	for len(all) < n {
		records := []Record{started(1, strings.Repeat("x", 20+len(all))), started(2, "")}
		mustAppend(t, l, id, records...)
		all = append(all, records...)
	}
	end(l)
	return all
}

func closed(t *testing.T) func(*Log) { return func(l *Log) { mustClose(t, l) } }

// killed leaves the files as a killed process does.
func killed(*testing.T) func(*Log) {
	return func(l *Log) {
		_ = l.setFailed("be killed", errors.New("killed"))
		_ = l.Close()
	}
}

func segmentsOf(t *testing.T, o Options) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(o.Dir, "*", "*", "*.seg"))
	if err != nil || len(names) == 0 {
		t.Fatalf("segments %v: %v", names, err)
	}
	return names
}

// When any byte of any segment changes, all acknowledged records are there or the
// stream is reported as damaged.
func TestDamagedByteIsDetected(t *testing.T) {
	for name, end := range map[string]func(*testing.T) func(*Log){"closed": closed, "killed": killed} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t.TempDir())
			o.SegmentBytes = 1000
			acked := filled(t, o, 24, end(t))
			for _, segment := range segmentsOf(t, o) {
				whole, err := os.ReadFile(segment)
				if err != nil {
					t.Fatal(err)
				}
				step := 60
				if full() {
					step = 1
				}
				for at := rand.IntN(step); at < len(whole); at += 1 + rand.IntN(2*step) {
					copied := t.TempDir()
					if err := os.CopyFS(copied, os.DirFS(filepath.Dir(o.Dir))); err != nil {
						t.Fatal(err)
					}
					bad := bytes.Clone(whole)
					bad[at] ^= byte(1 + rand.IntN(255))
					rel, _ := filepath.Rel(filepath.Dir(o.Dir), segment)
					if err := os.WriteFile(filepath.Join(copied, rel), bad, 0o600); err != nil {
						t.Fatal(err)
					}
					damagedOrWhole(t, copied, acked)
				}
			}
		})
	}
}

func damagedOrWhole(t *testing.T, dir string, acked []Record) {
	t.Helper()
	l := mustOpen(t, testOptions(dir))
	defer mustClose(t, l)
	id := streamOf(1)
	e, ok := l.End(id)
	if !ok {
		t.Fatal("the stream is missing")
	}
	if got := max(e.Durable, e.Damaged); got != uint64(len(acked)) {
		t.Fatalf("%d records were acknowledged, End is %+v", len(acked), e)
	}
	got := recordsOf(t, l, id, 1)
	if len(got) != int(e.Durable) {
		t.Fatalf("%d records of %+v", len(got), e)
	}
	for i := range got {
		if !got[i].same(&acked[i]) || !bytes.Equal(got[i].Payload, acked[i].Payload) {
			t.Fatalf("record %d differs from what was written", i+1)
		}
	}
}

// When the last segment is truncated at any byte, and no checkpoint or watermark says
// what was acknowledged, a prefix of whole records is left.
func TestTruncationAtAnyByte(t *testing.T) {
	o := testOptions(t.TempDir())
	o.SegmentBytes = 1000
	acked := filled(t, o, 24, killed(t))
	for _, f := range []string{checkpointFile, watermarksFile} {
		if err := os.Remove(filepath.Join(o.Dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	names := segmentsOf(t, o)
	last := names[len(names)-1]
	info, err := os.Stat(last)
	if err != nil {
		t.Fatal(err)
	}
	before := uint64(1)
	for size := int64(0); size <= info.Size(); size += 11 {
		copied := t.TempDir()
		if err := os.CopyFS(copied, os.DirFS(filepath.Dir(o.Dir))); err != nil {
			t.Fatal(err)
		}
		rel, _ := filepath.Rel(filepath.Dir(o.Dir), last)
		if err := os.Truncate(filepath.Join(copied, rel), size); err != nil {
			t.Fatal(err)
		}
		l := mustOpen(t, testOptions(copied))
		e, ok := l.End(streamOf(1))
		if !ok || e.Damaged != 0 || e.Durable < before {
			t.Fatalf("truncated to %d bytes: %+v, but %d when it was shorter", size, e, before)
		}
		before = e.Durable
		got := recordsOf(t, l, streamOf(1), 1)
		if len(got) != int(e.Durable) || len(got) > 0 && !got[len(got)-1].same(&acked[len(got)-1]) {
			t.Fatalf("truncated to %d bytes: %d records", size, len(got))
		}
		mustClose(t, l)
	}
}

// Records received from a peer complete a damaged stream, and clear the damage.
func TestReceiveRepairsADamagedStream(t *testing.T) {
	o := testOptions(t.TempDir())
	o.SegmentBytes = 1000
	id := streamOf(1)
	acked := filled(t, o, 40, closed(t))
	peerDir := t.TempDir()
	if err := os.CopyFS(peerDir, os.DirFS(filepath.Dir(o.Dir))); err != nil {
		t.Fatal(err)
	}
	peer := mustOpen(t, testOptions(peerDir))

	names := segmentsOf(t, o)
	b, err := os.ReadFile(names[2])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(names[2], b, 0o600); err != nil {
		t.Fatal(err)
	}
	epoch := peer.StoreEpoch()
	for round := range 2 { // the damage is also known after a restart
		l := mustOpen(t, o)
		if l.StoreEpoch() <= epoch {
			t.Fatal("the store's epoch did not rise")
		}
		e, _ := l.End(id)
		if e.Damaged != uint64(len(acked)) || e.Durable == 0 || e.Durable >= e.Damaged {
			t.Fatalf("round %d: %+v", round, e)
		}
		seen := map[uint64]bool{}
		if err := l.Salvage(id, func(r *Record) error {
			if !r.same(&acked[r.Seq-1]) {
				t.Errorf("the salvaged record %d differs", r.Seq)
			}
			seen[r.Seq] = true
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if n := len(acked) - int(e.Durable); len(seen) < n-3 {
			t.Fatalf("%d of %d records were salvaged", len(seen), n)
		}
		mustClose(t, l)
	}
	l := mustOpen(t, o)
	defer mustClose(t, l)
	for {
		e, _ := l.End(id)
		frames, next, err := peer.Read(id, e.Durable+1, 500)
		if err != nil {
			t.Fatal(err)
		}
		if len(frames) == 0 {
			break
		}
		if durable, err := l.Receive(context.Background(), id, frames); err != nil || durable != next-1 {
			t.Fatalf("durable %d of %d: %v", durable, next-1, err)
		}
	}
	if e, _ := l.End(id); e.Damaged != 0 || e.Durable != uint64(len(acked)) {
		t.Fatalf("the damage was not cleared: %+v", e)
	}
	if aside, err := damagedFiles(filepath.Dir(names[0])); err != nil || len(aside) > 0 {
		t.Fatalf("files were left: %v %v", aside, err)
	}
}

// Damage in front of all records leaves an empty stream, which still exists.
func TestAcceptedLossEndsTheStream(t *testing.T) {
	o := testOptions(t.TempDir())
	o.SegmentBytes = 1000
	id := streamOf(1)
	acked := filled(t, o, 20, closed(t))
	if err := os.Truncate(segmentsOf(t, o)[0], 11); err != nil {
		t.Fatal(err)
	}
	l := mustOpen(t, o)
	if e, _ := l.End(id); e != (End{First: 1, Durable: 0, Damaged: uint64(len(acked))}) {
		t.Fatalf("%+v", e)
	}
	if err := l.AcceptLoss(id); err != nil {
		t.Fatal(err)
	}
	mustClose(t, l)
	l = mustOpen(t, o)
	if e, _ := l.End(id); e != (End{First: 1, Durable: 0}) {
		t.Fatalf("%+v", e)
	}
}

// A missing segment in the middle is damage too.
func TestMissingSegmentIsDetected(t *testing.T) {
	for _, which := range []int{1, -1} {
		o := testOptions(t.TempDir())
		o.SegmentBytes = 1000
		acked := filled(t, o, 40, closed(t))
		names := segmentsOf(t, o)
		if err := os.Remove(names[(which+len(names))%len(names)]); err != nil {
			t.Fatal(err)
		}
		damagedOrWhole(t, filepath.Dir(o.Dir), acked)
	}
}

// Damage that is found while the node runs stops it.
func TestDamageFoundByReadingFailsTheLog(t *testing.T) {
	o := testOptions(t.TempDir())
	o.SegmentBytes, o.TailBytes = 1000, 1
	id := streamOf(1)
	filled(t, o, 40, closed(t))
	l := mustOpen(t, o)
	name := segmentsOf(t, o)[1]
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	err = l.Replay(id, 1, func([]Record) error { return nil })
	if !errors.Is(err, ErrFailed) || !errors.Is(err, ErrDamaged) {
		t.Fatalf("replayed: %v", err)
	}
	<-l.Failed()
}

func TestNewerFormatsAreRefused(t *testing.T) {
	id := streamOf(1)
	header := segmentHeader(id, 1, 0)
	newer := bytes.Clone(header)
	newer[len(segmentMagic)]++
	newer = appendSum(newer[:len(newer)-4])
	frame, err := AppendFrame(nil, &Record{Stream: id, Seq: 1, Kind: Started, Job: JobID{1}, Format: readFormat + 1})
	if err != nil {
		t.Fatal(err)
	}
	store := appendSum(append(append([]byte(storeMagic), storeFormat+1), make([]byte, 24)...))
	for name, tt := range map[string]struct {
		path string
		data []byte
	}{
		"segment": {filepath.Join(escape(id.Origin), id.Incarnation.String(), segmentName(1)), newer},
		"record":  {filepath.Join(escape(id.Origin), id.Incarnation.String(), segmentName(1)), slices.Concat(header, frame)},
		"store":   {storeFile, store},
		"settled": {checkpointFile, []byte(`{"format":2}`)},
		"damage":  {filepath.Join(escape(id.Origin), id.Incarnation.String(), damageFile), []byte(`{"format":2}`)},
	} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t.TempDir())
			path := filepath.Join(o.Dir, tt.path)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, tt.data, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(o); !errors.Is(err, ErrNewerFormat) {
				t.Fatalf("opened: %v", err)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, tt.data) {
				t.Fatalf("the file was changed: %v", err)
			}
		})
	}
}

// A stream whose creation was interrupted, and so never reported, is removed.
func TestInterruptedCreationIsRemoved(t *testing.T) {
	id := streamOf(1)
	header := segmentHeader(id, 1, 0)
	for name, data := range map[string][]byte{"no file": nil, "empty": {}, "half a header": header[:20]} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t.TempDir())
			l := mustOpen(t, o)
			dir := l.dirOf(id)
			mustClose(t, l)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if data != nil {
				if err := os.WriteFile(filepath.Join(dir, segmentName(1)), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			l = mustOpen(t, o)
			if n := len(l.Ends()); n != 0 {
				t.Fatalf("%d streams", n)
			}
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("its directory still exists: %v", err)
			}
			mustCreate(t, l, id)
		})
	}
}

// A stream whose files were all deleted had records: it is damaged, not forgotten. One that
// was dropped is forgotten, also if a crash interrupted that.
func TestDeletedStreamIsDamaged(t *testing.T) {
	for name, remove := range map[string]func(dir string) error{
		"its directory": os.RemoveAll,
		"its segments": func(dir string) error {
			names, err := filepath.Glob(filepath.Join(dir, "*.seg"))
			for _, n := range names {
				err = errors.Join(err, os.Remove(n))
			}
			return err
		},
		"its origin's directory": func(dir string) error { return os.RemoveAll(filepath.Dir(dir)) },
	} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t.TempDir())
			acked := filled(t, o, 10, closed(t))
			id := streamOf(1)
			before := mustOpen(t, o)
			frames, _, err := before.Read(id, 1, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			mustClose(t, before)
			if err := remove(filepath.Join(o.Dir, escape(id.Origin), id.Incarnation.String())); err != nil {
				t.Fatal(err)
			}
			for range 2 { // again after a restart
				l := mustOpen(t, o)
				e, known := l.End(id)
				if want := uint64(len(acked)); !known || e.Durable != 0 || e.Damaged != want {
					t.Fatalf("%+v, known %v; want damage up to %d", e, known, want)
				}
				mustClose(t, l)
			}
			l := mustOpen(t, o)
			if _, err := l.Receive(t.Context(), id, frames); err != nil {
				t.Fatal(err)
			}
			if e, _ := l.End(id); e.Damaged != 0 || e.Durable != uint64(len(acked)) {
				t.Errorf("after the records came back: %+v", e)
			}
			mustClose(t, l)
		})
	}
	t.Run("a drop that a crash interrupted", func(t *testing.T) {
		o := testOptions(t.TempDir())
		filled(t, o, 10, closed(t))
		id := streamOf(1)
		dir := filepath.Join(o.Dir, escape(id.Origin))
		if err := os.Rename(filepath.Join(dir, id.Incarnation.String()), filepath.Join(dir, droppedPrefix+id.Incarnation.String())); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			l := mustOpen(t, o)
			if _, known := l.End(id); known {
				t.Error("the stream is there")
			}
			mustClose(t, l)
		}
	})
}
