package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/storage/keyring"
)

// Entry is a sealed answer: the form that is in a shared tier and that nodes send to
// each other.
type Entry struct {
	Key      Key
	StoredAt time.Time // to the millisecond
	Purge    uint64
	Sealed   []byte
}

// Size is about how many bytes the entry takes.
func (e Entry) Size() int { return len(e.Sealed) + entryHeader + len(e.Key) }

const (
	entryFormat = 1
	entryHeader = 1 + 8 + 8 // format, milliseconds, purges
	sealPurpose = "cache v1"
)

var errEntry = errors.New("not an entry of the cache")

// value is what a shared tier holds under the key:
//
//	format (1) | StoredAt in milliseconds (8) | Purge (8) | Sealed
//
// with big-endian integers.
func (e Entry) value() []byte {
	return append(e.appendHeader(make([]byte, 0, entryHeader+len(e.Sealed))), e.Sealed...)
}

func (e Entry) appendHeader(b []byte) []byte {
	b = append(b, entryFormat)
	b = binary.BigEndian.AppendUint64(b, uint64(e.StoredAt.UnixMilli())) //nolint:gosec // after 1970
	return binary.BigEndian.AppendUint64(b, e.Purge)
}

// stampOf reads StoredAt from the beginning of a value.
func stampOf(value []byte) (time.Time, bool) {
	if len(value) < entryHeader || value[0] != entryFormat {
		return time.Time{}, false
	}
	ms := binary.BigEndian.Uint64(value[1:])
	return time.UnixMilli(int64(ms)), ms <= 1<<50 //nolint:gosec // bounded with it
}

// parseEntry reads a value. Sealed stays a part of it.
func parseEntry(k Key, value []byte) (Entry, error) {
	at, ok := stampOf(value)
	if !ok || len(value) < entryHeader+keyring.Overhead {
		return Entry{}, errEntry
	}
	return Entry{
		Key: k, StoredAt: at,
		Purge: binary.BigEndian.Uint64(value[9:]), Sealed: value[entryHeader:],
	}, nil
}

// AppendTo appends the entry as nodes send it to each other: its key, then value.
func (e Entry) AppendTo(b []byte) []byte {
	b = append(b, e.Key[:]...)
	return append(b, e.value()...)
}

// DecodeEntry reads what AppendTo wrote. Sealed stays a part of b. Only opening the
// entry tells whether it is genuine.
func DecodeEntry(b []byte) (Entry, error) {
	var k Key
	if len(b) < len(k) {
		return Entry{}, errEntry
	}
	copy(k[:], b)
	return parseEntry(k, b[len(k):])
}

// additionalData goes into the seal, so that an entry does not open under another key,
// with another age or another purge count.
func additionalData(k Key, at time.Time, purge uint64) []byte {
	b := append(make([]byte, 0, len(k)+8+8), k[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(at.UnixMilli())) //nolint:gosec // after 1970
	return binary.BigEndian.AppendUint64(b, purge)
}

func (c *Cache) seal(k Key, a *Answer) (Entry, error) {
	at := a.StoredAt.Truncate(time.Millisecond)
	sealed, err := c.sealer.Seal(nil, c.packer.pack(a), additionalData(k, at, a.Purge))
	if err != nil {
		return Entry{}, fmt.Errorf("seal an answer: %w", err)
	}
	return Entry{Key: k, StoredAt: at, Purge: a.Purge, Sealed: sealed}, nil
}

func (c *Cache) open(e Entry) (*Answer, error) {
	packed, err := c.sealer.Open(nil, e.Sealed, additionalData(e.Key, e.StoredAt, e.Purge))
	if err != nil {
		return nil, fmt.Errorf("open an answer: %w", err)
	}
	a, err := c.packer.unpack(packed)
	if err != nil {
		return nil, err
	}
	a.StoredAt, a.Purge = e.StoredAt, e.Purge
	return a, nil
}
