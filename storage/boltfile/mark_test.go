package boltfile

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

var testMark = MarkFormat{Magic: "DSTEMARK", Extra: 3}

func TestMarkIsReadBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mark")
	if m, ok, err := testMark.Read(path); ok || err != nil {
		t.Fatalf("without a file: %+v %v", m, err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for txid := range uint64(3) {
		want := Mark{State: MarkOpen, Store: [16]byte{7, 15: 9}, Txid: txid, Extra: "abc"}
		if err := testMark.Write(f, want); err != nil {
			t.Fatal(err)
		}
		if m, ok, err := testMark.Read(path); m != want || !ok || err != nil {
			t.Fatalf("read %+v (%v, %v), want %+v", m, ok, err, want)
		}
	}
	if err := f.Truncate(20); err != nil {
		t.Fatal(err)
	}
	if m, ok, err := testMark.Read(path); ok || err != nil {
		t.Errorf("a torn mark was read as %+v, error %v", m, err)
	}
	if err := errors.Join(f.Close(), testMark.Write(f, Mark{})); err == nil {
		t.Error("writing to a closed file succeeded")
	}
}

func TestMarkAllows(t *testing.T) {
	m := Mark{Store: [16]byte{1}, Txid: 5}
	for _, tt := range []struct {
		name string
		now  Mark
		want error
	}{
		{"the same transaction", m, nil},
		{"a later transaction", Mark{Store: m.Store, Txid: 6}, nil},
		{"an earlier transaction", Mark{Store: m.Store, Txid: 4}, ErrDamaged},
		{"another file", Mark{Store: [16]byte{2}, Txid: 6}, ErrDamaged},
	} {
		if err := m.Allows(tt.now); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
}

func FuzzParseMark(f *testing.F) {
	f.Add([]byte{})
	f.Add(testMark.Append(nil, Mark{State: MarkClosed, Txid: 7, Extra: "xyz"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, ok := testMark.Parse(b); ok && !bytes.Equal(testMark.Append(nil, m), b) {
			t.Fatalf("%+v is encoded differently from what it was parsed from", m)
		}
	})
}
