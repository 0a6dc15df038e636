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
// The head ends where the sealed answer begins, so that opening a file reads only heads.
// The seal tells whether an answer is damaged. Integers are big-endian.
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
	b = append(b, 0, 0, 0, 0) // the CRC
	b = binary.BigEndian.AppendUint32(b, uint32(len(e.Sealed)))
	b = append(b, e.Key[:]...)
	b = e.appendHeader(b)
	binary.BigEndian.PutUint32(b[from:], crc32.Checksum(b[from+4:], castagnoli))
	return append(b, e.Sealed...)
}

// record is the content of a record's head.
type record struct {
	key      Key
	storedAt int64 // milliseconds
	size     int64 // of the head and the sealed answer
}

// parseRecord reads the head at the beginning of b.
func parseRecord(b []byte) (record, error) {
	if len(b) < recordHead || binary.BigEndian.Uint32(b) != crc32.Checksum(b[4:recordHead], castagnoli) {
		return record{}, errDamaged
	}
	at, ok := stampOf(b[recordValue:recordHead])
	if !ok {
		return record{}, errDamaged
	}
	return record{
		key: Key(b[recordValue-len(Key{}) : recordValue]), storedAt: at.UnixMilli(),
		size: int64(recordHead) + int64(binary.BigEndian.Uint32(b[4:])),
	}, nil
}

// scanRecords calls found for each record of a segment of size bytes. It ignores an
// incomplete record at the end, which a killed process may leave.
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

// recordKey is the first part of a key, for the indexes. Two keys practically never share
// it, since keys are HMACs; if they do, one of them is a miss, because get compares the
// whole key of the record.
type recordKey uint64

func (k Key) record() recordKey { return recordKey(binary.BigEndian.Uint64(k[:])) }

// recordPlace is where a record is in its segment. It is small, since there are millions of
// them in memory.
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

// openSegment opens or creates a file and indexes its records.
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
		err = f.Truncate(s.size) // cuts off an incomplete record
	}
	if err != nil {
		_ = f.Close() // nothing was written
		return nil, err
	}
	return s, nil
}

// remove closes and deletes the file. A concurrent read works or fails with os.ErrClosed.
func (s *segment) remove() { _, _ = s.file.Close(), os.Remove(s.file.Name()) }
