package journal

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"
)

func FuzzNextFrame(f *testing.F) {
	for _, r := range []Record{
		{Stream: streamOf(1), Seq: 1, Kind: Started, Job: JobID{1}},
		{Stream: streamOf(2), Seq: 1 << 60, Clock: 5, Kind: Finished, Rank: 4, Attempt: 9, Token: Token{1 << 40, 300}, Payload: []byte("p")},
		{Stream: streamOf(3), Seq: 3, Kind: Deleted, Format: readFormat, Ext: []byte("ext")},
	} {
		b, err := AppendFrame(nil, &r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)-1])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, rest, err := NextFrame(b)
		if err != nil {
			if !errors.Is(err, ErrShort) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		used := b[:len(b)-len(rest)]
		if frameSize(&r) != len(used) || lengthOf(used) != len(used) {
			t.Fatalf("frameSize %d, lengthOf %d of %d bytes", frameSize(&r), lengthOf(used), len(used))
		}
		if again, err := AppendFrame(nil, &r); err != nil || !bytes.Equal(again, used) {
			t.Fatalf("%x was decoded and encoded as %x: %v", used, again, err)
		}
	})
}

func FuzzSegmentHeader(f *testing.F) {
	good := segmentHeader(streamOf(1), 7, flagBegins)
	f.Add(good)
	f.Add(good[:20])
	f.Add([]byte(segmentMagic + "\x02"))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, first, flags, size, err := parseHeader(b)
		if err != nil {
			if !errors.Is(err, ErrShort) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		if again := segmentHeader(id, first, flags); !bytes.Equal(again, b[:size]) {
			t.Fatalf("%x was decoded and encoded as %x", b[:size], again)
		}
	})
}

// FuzzSegment reads files with arbitrary content: reading ends, and returns only records
// of the stream.
func FuzzSegment(f *testing.F) {
	id := streamOf(1)
	file := segmentHeader(id, 1, 0)
	for seq := range uint64(3) {
		mark := make([]byte, batchHeaderSize)
		putBatchHeader(mark, id, int64(len(file)), seq+1)
		file = append(file, mark...)
		r := started(1, "payload")
		r.Stream, r.Seq = id, seq+1
		var err error
		if file, err = AppendFrame(file, &r); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(file, 3)
	f.Add(file[:len(file)-3], 70)
	f.Fuzz(func(t *testing.T, b []byte, from int) {
		if from < 0 || from > len(b) {
			return
		}
		end, err := walk(bytes.NewReader(b), id, int64(from), int64(len(b)), func(at int64, frame []byte, r *Record) error {
			if r.Stream != id || !bytes.Equal(frame, b[at:at+int64(len(frame))]) {
				t.Fatalf("record %+v at %d", r, at)
			}
			return nil
		})
		if err == nil && end != int64(len(b)) {
			t.Fatalf("reading ended at %d of %d without an error", end, len(b))
		}
		at, found, err := nextBatchHeader(bytes.NewReader(b), id, int64(from), int64(len(b)))
		if err != nil || found && !isBatchHeader(b[at:]) {
			t.Fatalf("a batch header at %d: %v", at, err)
		}
	})
}

func FuzzStoreFile(f *testing.F) {
	f.Add(appendSum(append(append([]byte(storeMagic), storeFormat), make([]byte, 24)...)))
	f.Add([]byte(storeMagic + "\x02"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := parseStore(b); err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
			t.Fatalf("unexpected kind of error: %v", err)
		}
	})
}

// A batch header is found at any offset, also across two windows.
func TestNextBatchHeaderAcrossWindows(t *testing.T) {
	id := streamOf(1)
	for _, at := range []int{0, 5, windowBytes - batchHeaderSize, windowBytes - 3, windowBytes - 1, windowBytes, windowBytes + 7, 2*windowBytes - 9} {
		b := bytes.Repeat([]byte{0xD5, 0xB0, 0xA7}, windowBytes) // many beginnings of a header
		putBatchHeader(b[at:], id, int64(at), 1)
		got, found, err := nextBatchHeader(bytes.NewReader(b), id, 0, int64(len(b)))
		if err != nil || !found || got != int64(at) {
			t.Errorf("the batch header at %d was found at %d (%v): %v", at, got, found, err)
		}
		if _, found, _ := nextBatchHeader(bytes.NewReader(b), id, int64(at)+1, int64(len(b))); found {
			t.Errorf("a batch header was found after %d", at)
		}
	}
}

func TestEscapeIsOneToOne(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringN(1, 40, MaxOrigin).Draw(t, "name")
		file := escape(name)
		if bytes.ContainsAny([]byte(file), "/\x00") || file[0] == '.' {
			t.Fatalf("%q was escaped as %q", name, file)
		}
		if back, ok := unescape(file); !ok || back != name {
			t.Fatalf("%q was escaped as %q and unescaped as %q", name, file, back)
		}
	})
}
