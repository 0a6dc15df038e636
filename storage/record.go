package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/dsnode/dsnode/storage/keyring"
)

// A record is one sealed value together with its place:
//
//	crc32c of the place and all that follows (4) | format (1) | sealed bytes
//
// The place ("log" and index, "stable" and key, …) is the additional data of the
// seal. The checksum comes first so that a flipped bit in the format or in the
// key's id is also reported as damage.
const (
	recordFormat   = 1
	recordHeader   = 4 + 1
	recordOverhead = recordHeader + keyring.Overhead
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendRecord appends the record of plaintext at place to dst.
func appendRecord(dst []byte, s keyring.Sealer, plaintext, place []byte) []byte {
	start := len(dst)
	dst = append(dst, 0, 0, 0, 0, recordFormat)
	dst = s.Seal(dst, plaintext, place)
	binary.BigEndian.PutUint32(dst[start:], recordSum(dst[start:], place))
	return dst
}

// openRecord appends the plaintext of a record to dst. The error wraps
// ErrDamaged, ErrWrongKey or ErrNewerFormat.
func openRecord(dst []byte, s keyring.Sealer, record, place []byte) ([]byte, error) {
	if len(record) < recordOverhead {
		return nil, fmt.Errorf("%w: a record of %d bytes", ErrDamaged, len(record))
	}
	if binary.BigEndian.Uint32(record) != recordSum(record, place) {
		return nil, fmt.Errorf("%w: checksum", ErrDamaged)
	}
	if record[4] != recordFormat {
		return nil, fmt.Errorf("%w: record format %d", ErrNewerFormat, record[4])
	}
	plaintext, err := s.Open(dst, record[recordHeader:], place)
	if errors.Is(err, keyring.ErrDamaged) {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return plaintext, err
}

func recordSum(record, place []byte) uint32 {
	return crc32.Update(crc32.Checksum(place, castagnoli), castagnoli, record[4:])
}
