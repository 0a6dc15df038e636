package jobtable

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// A row's value in the file is
//
//	format (1) | flags (1) | fields of the flags, in their order | crc32c of all that (4) | frames
//
// The fields are derived on this node and never leave it. The frames are the row's
// records in canonical order, with their own checksums, as in the journals.
const (
	valueFormat = 1

	flagHead      = 1  // tenant (16) | expires, ms (uvarint)
	flagKey       = 2  // key (16)
	flagAt        = 4  // clock of the first submission (8)
	flagFirstSeen = 8  // ms (uvarint)
	flagIDUntil   = 16 // ms (uvarint)
	flagsAll      = flagHead | flagKey | flagAt | flagFirstSeen | flagIDUntil
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// state is a row and what was derived from it. Its records are never changed in
// place. The zero state means that nothing is known of the job.
type state struct {
	records   []journal.Record
	head      head
	at        journal.Clock // of the first submission; kept after that is removed, for cursors
	firstSeen int64         // ms; of a row without a submission
	idUntil   int64         // ms; how long the id is kept of a job whose retention is over
}

// head holds the parts of a submission that the indexes need.
type head struct {
	known   bool
	tenant  [16]byte
	key     [16]byte // of Submission.KeyHash; zero without one
	expires int64    // ms
}

func (s *state) empty() bool { return len(s.records) == 0 && s.idUntil == 0 }

// row returns the state as readers see it.
func (s *state) row(id journal.JobID) Row {
	if s.idUntil > 0 {
		return Row{[]journal.Record{{Kind: journal.Deleted, Job: id}}}
	}
	return Row{s.records}
}

// submissions returns the records from which the head is read.
func (s *state) submissions() []journal.Record {
	n := 0
	for n < len(s.records) && s.records[n].Kind == journal.Submitted {
		n++
	}
	return s.records[:n]
}

// with returns the state after joining records; changed is false if they add nothing.
func (s *state) with(records []journal.Record, now time.Time) (next state, changed bool) {
	if s.idUntil > 0 {
		return *s, false // a late copy does not restore the job
	}
	joined := Join(s.records, records)
	if len(joined) == len(s.records) && (len(joined) == 0 || &joined[0] == &s.records[0]) {
		return *s, false
	}
	next = state{records: joined, head: s.head, at: s.at}
	subs := next.submissions()
	if len(subs) == 0 {
		next.head = head{}
		if !next.row(joined[0].Job).Deleted() {
			next.firstSeen = s.firstSeen
			if next.firstSeen == 0 {
				next.firstSeen = now.UnixMilli()
			}
		}
		return next, true
	}
	next.at = subs[0].Clock
	if !slices.EqualFunc(subs, s.submissions(), func(a, b journal.Record) bool { return compare(&a, &b) == 0 }) {
		next.head = head{}
	}
	return next, true
}

// size is about how much memory the state takes.
func (s *state) size() int64 {
	n := int64(256)
	for i := range s.records {
		n += 200 + int64(len(s.records[i].Payload))
	}
	return n
}

func appendValue(dst []byte, s *state) ([]byte, error) {
	start := len(dst)
	dst = append(dst, valueFormat, 0)
	var flags byte
	if s.head.known {
		flags |= flagHead
		dst = append(dst, s.head.tenant[:]...)
		dst = binary.AppendUvarint(dst, uint64(s.head.expires))
		if s.head.key != [16]byte{} {
			flags |= flagKey
			dst = append(dst, s.head.key[:]...)
		}
	}
	if s.at > 0 {
		flags |= flagAt
		dst = binary.BigEndian.AppendUint64(dst, uint64(s.at))
	}
	if s.firstSeen > 0 {
		flags |= flagFirstSeen
		dst = binary.AppendUvarint(dst, uint64(s.firstSeen))
	}
	if s.idUntil > 0 {
		flags |= flagIDUntil
		dst = binary.AppendUvarint(dst, uint64(s.idUntil))
	}
	dst[start+1] = flags
	dst = binary.BigEndian.AppendUint32(dst, crc32.Checksum(dst[start:], castagnoli))
	return appendFrames(dst, s.records)
}

func appendFrames(dst []byte, records []journal.Record) ([]byte, error) {
	var err error
	for i := range records {
		if dst, err = journal.AppendFrame(dst, &records[i]); err != nil {
			return nil, err
		}
	}
	return dst, nil
}

// parseValue decodes a row's value; payloads point into it. A nil value is the zero
// state. The error wraps ErrDamaged or ErrNewerFormat.
func parseValue(id journal.JobID, value []byte) (state, error) {
	if value == nil {
		return state{}, nil
	}
	s, frames, err := parseFields(value)
	if err == nil {
		s.records, err = parseFrames(frames)
	}
	if err == nil && s.empty() {
		err = fmt.Errorf("%w: a row without content", ErrDamaged)
	}
	for i := range s.records {
		if s.records[i].Job != id {
			err = fmt.Errorf("%w: a record of job %s", ErrDamaged, s.records[i].Job)
		}
	}
	if err != nil {
		return state{}, fmt.Errorf("row of job %s: %w", id, err)
	}
	return s, nil
}

// parseFields decodes a value up to its frames.
func parseFields(value []byte) (s state, frames []byte, err error) {
	if len(value) < 6 {
		return s, nil, fmt.Errorf("%w: a row of %d bytes", ErrDamaged, len(value))
	}
	if value[0] != valueFormat || value[1]&^flagsAll != 0 {
		return s, nil, fmt.Errorf("%w: row format %d, flags %x", ErrNewerFormat, value[0], value[1])
	}
	flags, rest := value[1], value[2:]
	short := false
	take := func(n int) []byte {
		if short = short || len(rest) < n; short {
			return make([]byte, n)
		}
		b := rest[:n]
		rest = rest[n:]
		return b
	}
	number := func() int64 {
		v, n := binary.Uvarint(rest)
		if short = short || n <= 0; short {
			return 0
		}
		rest = rest[n:]
		return int64(v)
	}
	if flags&flagHead != 0 {
		s.head.known = true
		copy(s.head.tenant[:], take(16))
		s.head.expires = number()
	}
	if flags&flagKey != 0 {
		copy(s.head.key[:], take(16))
	}
	if flags&flagAt != 0 {
		s.at = journal.Clock(binary.BigEndian.Uint64(take(8)))
	}
	if flags&flagFirstSeen != 0 {
		s.firstSeen = number()
	}
	if flags&flagIDUntil != 0 {
		s.idUntil = number()
	}
	covered := value[:len(value)-len(rest)]
	sum := binary.BigEndian.Uint32(take(4))
	if short || crc32.Checksum(covered, castagnoli) != sum || s.firstSeen < 0 || s.idUntil < 0 || s.head.expires < 0 {
		return s, nil, fmt.Errorf("%w: the fields of a row are malformed", ErrDamaged)
	}
	return s, rest, nil
}

// parseFrames decodes frames back to back; payloads point into b.
func parseFrames(b []byte) ([]journal.Record, error) {
	if len(b) == 0 {
		return nil, nil
	}
	records := make([]journal.Record, 0, 4)
	for len(b) > 0 {
		r, rest, err := journal.NextFrame(b)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		records, b = append(records, r), rest
	}
	return records, nil
}
