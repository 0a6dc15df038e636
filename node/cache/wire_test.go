package cache

import (
	"bytes"
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
