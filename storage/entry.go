package storage

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
)

// A log entry, before it is sealed, is
//
//	format (1) | flags (1) | type (1) | index | index of the previous entry | term |
//	time appended, Unix nanoseconds (8, if flagged) | length of data | data | extensions
//
// Numbers without a size are unsigned varints; the extensions are the rest.
// The index of the previous entry shows a reader whether entries are missing in
// between: raft leaves gaps on purpose after it installed a snapshot, so a gap
// alone proves nothing. It is 0 for the first entry of an empty log.
const (
	entryFormat   = 1
	entryFlagTime = 1 << 0
	// Three bytes, three varints, the time, the length.
	maxEntryHeader = 3 + 3*binary.MaxVarintLen64 + 8 + binary.MaxVarintLen64
)

// maxEntry bounds data and extensions of one entry. The agreed state is a few MB,
// and commands are far smaller.
const maxEntry = 32 << 20

func entrySize(l *raft.Log) int { return maxEntryHeader + len(l.Data) + len(l.Extensions) }

func appendEntry(dst []byte, l *raft.Log, before uint64) []byte {
	var flags byte
	if !l.AppendedAt.IsZero() {
		flags |= entryFlagTime
	}
	dst = append(dst, entryFormat, flags, byte(l.Type))
	dst = binary.AppendUvarint(dst, l.Index)
	dst = binary.AppendUvarint(dst, before)
	dst = binary.AppendUvarint(dst, l.Term)
	if flags&entryFlagTime != 0 {
		dst = binary.BigEndian.AppendUint64(dst, uint64(l.AppendedAt.UnixNano()))
	}
	dst = binary.AppendUvarint(dst, uint64(len(l.Data)))
	dst = append(dst, l.Data...)
	return append(dst, l.Extensions...)
}

// decodeEntry fills l from b and returns the index of the previous entry. Data and
// Extensions of l point into b; empty ones are nil. On error l is unchanged; the
// error wraps ErrDamaged or ErrNewerFormat.
func decodeEntry(b []byte, l *raft.Log) (before uint64, err error) {
	if len(b) < 3 {
		return 0, fmt.Errorf("%w: an entry of %d bytes", ErrDamaged, len(b))
	}
	if b[0] != entryFormat || b[1]&^entryFlagTime != 0 {
		return 0, fmt.Errorf("%w: log entry format %d, flags %x", ErrNewerFormat, b[0], b[1])
	}
	flags := b[1]
	out := raft.Log{Type: raft.LogType(b[2])}
	b = b[3:]
	for _, field := range []*uint64{&out.Index, &before, &out.Term} {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return 0, fmt.Errorf("%w: a number of an entry", ErrDamaged)
		}
		*field, b = v, b[n:]
	}
	if flags&entryFlagTime != 0 {
		if len(b) < 8 {
			return 0, fmt.Errorf("%w: an entry's time", ErrDamaged)
		}
		out.AppendedAt = time.Unix(0, int64(binary.BigEndian.Uint64(b)))
		b = b[8:]
	}
	size, n := binary.Uvarint(b)
	if n <= 0 || size > uint64(len(b)-n) {
		return 0, fmt.Errorf("%w: an entry's length", ErrDamaged)
	}
	b = b[n:]
	if size > 0 {
		out.Data = b[:size:size]
	}
	if rest := b[size:]; len(rest) > 0 {
		out.Extensions = rest[:len(rest):len(rest)]
	}
	*l = out
	return before, nil
}
