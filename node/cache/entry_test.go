package cache

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/storage/keyring"
)

func FuzzEntryOnTheWire(f *testing.F) {
	e := Entry{Key: Key{1, 2}, StoredAt: time.UnixMilli(1_800_000_000_000), Purge: 7, Sealed: bytes.Repeat([]byte{9}, keyring.Overhead+5)}
	f.Add(e.AppendTo(nil))
	f.Add(e.AppendTo(nil)[:40])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := DecodeEntry(b)
		if err != nil {
			return
		}
		if again := e.AppendTo(nil); !bytes.Equal(again, b) {
			t.Fatalf("%x was read, %x written", b, again)
		}
	})
}

func FuzzUnpack(f *testing.F) {
	p, err := newPacker(1 << 20)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p.pack(streamed("data: a\n\n", "data: [DONE]\n\n")))
	f.Add(p.pack(plainAnswer(strings.Repeat("word ", 500))))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := p.unpack(b)
		if err != nil {
			return
		}
		again, err := p.unpack(p.pack(a))
		if err != nil || !bytes.Equal(a.Body, again.Body) || !slices.Equal(a.Ends, again.Ends) || a.Stream != again.Stream || a.ContentType != again.ContentType {
			t.Fatalf("%v: %+v became %+v", err, a, again)
		}
	})
}

func FuzzParseEntry(f *testing.F) {
	f.Add(entry(1, time.UnixMilli(1_790_000_000_000), 100).value())
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parseEntry(Key{}, b)
		if err == nil && !bytes.Equal(e.value(), b) {
			t.Fatalf("%x became %x", b, e.value())
		}
	})
}
