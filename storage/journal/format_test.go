package journal

import (
	"bytes"
	"errors"
	"testing"
)

// A record in the next version's format is read and kept byte for byte, so that two
// consecutive versions can share a cluster.
func TestNextFormatIsReadAndKept(t *testing.T) {
	r := Record{
		Stream: streamOf(1), Seq: 7, Clock: 9, Kind: Started, Job: JobID{1}, Attempt: 2,
		Format: knownFormat + 1, Ext: []byte("what this version does not know"), Payload: []byte("p"),
	}
	frame, err := AppendFrame(nil, &r)
	if err != nil {
		t.Fatal(err)
	}
	if len(frame) != frameSize(&r) {
		t.Errorf("frameSize returned %d, the frame has %d bytes", frameSize(&r), len(frame))
	}
	got, rest, err := NextFrame(frame)
	if err != nil || len(rest) != 0 {
		t.Fatalf("%v, %d bytes left", err, len(rest))
	}
	if got.Format != r.Format || !bytes.Equal(got.Ext, r.Ext) || !bytes.Equal(got.Payload, r.Payload) {
		t.Fatalf("read as %+v", got)
	}
	if again, err := AppendFrame(nil, &got); err != nil || !bytes.Equal(again, frame) {
		t.Fatalf("encoded as %x, was %x: %v", again, frame, err)
	}
	r.Format = readFormat + 1
	if frame, err = AppendFrame(nil, &r); err != nil {
		t.Fatal(err)
	}
	if _, _, err := NextFrame(frame); !errors.Is(err, ErrNewerFormat) {
		t.Fatalf("two versions ahead: %v", err)
	}
	r.Ext = make([]byte, MaxExt+1)
	if _, err := AppendFrame(nil, &r); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("an ext of %d bytes: %v", len(r.Ext), err)
	}
}
