package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
)

// A segment file is a sequence of records:
//
//	CRC-32C of the rest of the head (4) | bytes sealed (4) | key (32) | Entry.value
//
// The head ends where the sealed answer begins: opening a file reads no answers.
// The seal itself tells whether an answer is damaged.
const (
	recordValue = 4 + 4 + len(Key{})
	recordHead  = recordValue + entryHeader
)

var (
	errDamaged = errors.New("not a record")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

func appendRecord(b []byte, e Entry) []byte {
	from := len(b)
	b = append(b, 0, 0, 0, 0) // the sum
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Sealed)))
	b = append(b, e.Key[:]...)
	b = e.appendHeader(b)
	binary.LittleEndian.PutUint32(b[from:], crc32.Checksum(b[from+4:], castagnoli))
	return append(b, e.Sealed...)
}

// record is what the head of a record says.
type record struct {
	key      Key
	storedAt int64 // milliseconds
	size     int64 // of the head and the sealed answer
}

// parseRecord reads the head at the beginning of b.
func parseRecord(b []byte) (record, error) {
	if len(b) < recordHead || binary.LittleEndian.Uint32(b) != crc32.Checksum(b[4:recordHead], castagnoli) {
		return record{}, errDamaged
	}
	at, ok := stampOf(b[recordValue:recordHead])
	if !ok {
		return record{}, errDamaged
	}
	return record{
		key: Key(b[recordValue-len(Key{}) : recordValue]), storedAt: at.UnixMilli(),
		size: int64(recordHead) + int64(binary.LittleEndian.Uint32(b[4:])),
	}, nil
}

// scanRecords gives all records of a segment of so many bytes to found. It ignores an
// incomplete one at the end: a process that was killed while it wrote leaves that.
func scanRecords(in io.ReaderAt, size int64, found func(r record, offset int64)) error {
	b := make([]byte, recordHead)
	for at := int64(0); size-at >= int64(recordHead); {
		if _, err := in.ReadAt(b, at); err != nil {
			return fmt.Errorf("read at %d: %w", at, err)
		}
		r, err := parseRecord(b)
		if err != nil || at > math.MaxUint32 {
			return fmt.Errorf("at %d: %w", at, errDamaged)
		}
		if r.size > size-at {
			return nil
		}
		found(r, at)
		at += r.size
	}
	return nil
}

// recordKey is the part of a key that an index has. Keys are HMACs, so two of them
// practically never share it; whoever reads a record compares the whole key.
type recordKey uint64

func (k Key) record() recordKey { return recordKey(binary.LittleEndian.Uint64(k[:])) }

// recordPlace is where a record is in its segment. It is small, since a full tier has
// millions of them in memory.
type recordPlace struct{ offset, size uint32 }

// segment is one file of the embedded tier and the index of its records.
type segment struct {
	file   *os.File
	made   int64 // milliseconds
	newest int64 // StoredAt of the newest record, milliseconds
	size   int64
	index  map[recordKey]recordPlace
}

func (s *segment) add(r record, offset int64) {
	s.index[r.key.record()] = recordPlace{uint32(offset), uint32(r.size)}
	s.newest = max(s.newest, r.storedAt)
	s.size = offset + r.size
}

// openSegment opens a file and indexes what it holds. One that does not exist is made.
func openSegment(path string, made int64) (*segment, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	s := &segment{file: f, made: made, index: map[recordKey]recordPlace{}}
	info, err := f.Stat()
	if err == nil {
		err = scanRecords(f, info.Size(), s.add)
	}
	if err == nil {
		err = f.Truncate(s.size) // an incomplete record; the next one takes its place
	}
	if err != nil {
		_ = f.Close() // it is only removed
		return nil, err
	}
	return s, nil
}

// remove deletes the file. A read that is under way ends first or fails with
// os.ErrClosed.
func (s *segment) remove() { _, _ = s.file.Close(), os.Remove(s.file.Name()) }
