package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/storage/keyring"
)

// Entry is an answer as it leaves a node's memory: sealed. It is what stands in
// the shared tier and what goes from peer to peer.
type Entry struct {
	Key      Key
	StoredAt time.Time // to the millisecond
	Purge    uint64
	Sealed   []byte
}

// Size is about what the entry takes.
func (e Entry) Size() int { return len(e.Sealed) + entryHeader + len(e.Key) }

const (
	entryFormat = 1
	entryHeader = 1 + 8 + 8 // format, milliseconds, purges
	sealPurpose = "cache v1"
	placeSize   = 32 + 8 + 8
)

var errEntry = errors.New("not an entry of the cache")

// value is what stands in a shared tier under the key.
func (e Entry) value() []byte {
	return append(e.appendHeader(make([]byte, 0, entryHeader+len(e.Sealed))), e.Sealed...)
}

func (e Entry) appendHeader(b []byte) []byte {
	b = append(b, entryFormat)
	b = binary.BigEndian.AppendUint64(b, uint64(e.StoredAt.UnixMilli())) //nolint:gosec // after 1970
	return binary.BigEndian.AppendUint64(b, e.Purge)
}

// stampOf reads when a value was stored, from its beginning.
func stampOf(value []byte) (time.Time, bool) {
	if len(value) < entryHeader || value[0] != entryFormat {
		return time.Time{}, false
	}
	ms := binary.BigEndian.Uint64(value[1:])
	return time.UnixMilli(int64(ms)), ms <= 1<<50 //nolint:gosec // bounded with it
}

// parseEntry reads a value; Sealed stays a part of it.
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

// place is the additional data of the seal: an entry under another key, or with
// another age, does not open.
func place(k Key, at time.Time, purge uint64) []byte {
	b := append(make([]byte, 0, placeSize), k[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(at.UnixMilli())) //nolint:gosec // after 1970
	return binary.BigEndian.AppendUint64(b, purge)
}

func (c *Cache) seal(k Key, a *Answer) (Entry, error) {
	at := a.StoredAt.Truncate(time.Millisecond)
	sealed, err := c.sealer.Seal(nil, c.packer.pack(nil, a), place(k, at, a.Purge))
	if err != nil {
		return Entry{}, fmt.Errorf("seal an answer: %w", err)
	}
	return Entry{Key: k, StoredAt: at, Purge: a.Purge, Sealed: sealed}, nil
}

func (c *Cache) open(e Entry) (*Answer, error) {
	packed, err := c.sealer.Open(nil, e.Sealed, place(e.Key, e.StoredAt, e.Purge))
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
