package journal

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/bits"
	"slices"
	"strings"
	"time"
)

var (
	// ErrDamaged means that bytes are not a record, or not the one that was written.
	ErrDamaged = errors.New("a journal record is damaged")
	// ErrNewerFormat means that a later version of dsnode wrote the record.
	ErrNewerFormat = errors.New("a journal record has a format that this version does not know")
	// ErrTooLarge means that a record exceeds MaxPayload or a name MaxOrigin.
	ErrTooLarge = errors.New("a journal record is too large")
)

// Bounds of one record.
const (
	MaxPayload = 24 << 20 // sealed
	MaxOrigin  = 128      // bytes of a node's name
	MaxExt     = 1 << 10  // bytes that a later format may add

	// readFormat is the newest format that can be read. It is one above the newest that
	// this version knows: a format only adds to Ext, and this version keeps Ext byte for
	// byte. So two consecutive versions can share a cluster, and a cluster can be
	// downgraded by one version. See DESIGN.md, Formats.
	readFormat  = knownFormat + 1
	knownFormat = 1
	// fixedBytes is the length of the body up to the variable parts: format, kind, rank,
	// seq, clock, job, digest, incarnation.
	fixedBytes   = 1 + 1 + 1 + 8 + 8 + 16 + 16 + 16
	maxBodyBytes = fixedBytes + 4*binary.MaxVarintLen64 + 1 + MaxOrigin + MaxExt + MaxPayload
	frameHeader  = 4 + 4 // length, crc32c of the body
)

// Incarnation is a random number of one run of a journal. Each start of a node writes
// under a new one, so that after a wiped disk or a restored image no sequence number is
// used for two different records.
type Incarnation [16]byte

func (i Incarnation) String() string { return hex.EncodeToString(i[:]) }

// ParseIncarnation parses what String returned.
func ParseIncarnation(text string) (Incarnation, error) {
	var i Incarnation
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(i) {
		return i, fmt.Errorf("incarnation %q is not 32 hex digits", text)
	}
	copy(i[:], b)
	return i, nil
}

// LogValue is the same as String.
func (i Incarnation) LogValue() slog.Value { return slog.StringValue(i.String()) }

// Stream names one append-only sequence of records: (origin node, incarnation).
type Stream struct {
	Origin      string
	Incarnation Incarnation
}

// String returns origin/incarnation, for use as one word.
func (s Stream) String() string { return s.Origin + "/" + s.Incarnation.String() }

// LogValue is the same as String. Without it a log in JSON would have the numbers of the
// bytes, as for the other names of this file.
func (s Stream) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Compare orders streams. The order has no meaning.
func (s Stream) Compare(o Stream) int {
	return cmp.Or(strings.Compare(s.Origin, o.Origin), slices.Compare(s.Incarnation[:], o.Incarnation[:]))
}

// Token fences an owner: (generation, index of the Raft entry that made it the owner).
// Index 0 is that of an island, a stream that no other node knows of.
type Token struct{ Generation, Index uint64 }

// Compare orders tokens; the higher one is the later owner.
func (t Token) Compare(o Token) int {
	return cmp.Or(cmp.Compare(t.Generation, o.Generation), cmp.Compare(t.Index, o.Index))
}

// Clock is a hybrid logical clock: 48 bits of Unix milliseconds and a counter of 16
// bits. Events that one node has seen in one order have clocks in that order, even if
// wall clocks differ.
type Clock uint64

// ClockAt returns the first clock of a millisecond.
func ClockAt(t time.Time) Clock { return Clock(t.UnixMilli()) << 16 }

// Time returns the wall-clock part.
func (c Clock) Time() time.Time { return time.UnixMilli(int64(c >> 16)).UTC() }

// JobID names a job on all nodes. Random ids begin with their time, so that the rows of
// one period are adjacent. The id of a job with an Idempotency-Key is an HMAC.
type JobID [16]byte

const jobPrefix = "job_"

// Append appends the text of String.
func (id JobID) Append(b []byte) []byte { return hex.AppendEncode(append(b, jobPrefix...), id[:]) }

func (id JobID) String() string {
	return string(id.Append(make([]byte, 0, len(jobPrefix)+2*len(id))))
}

// LogValue is the same as String.
func (id JobID) LogValue() slog.Value { return slog.StringValue(id.String()) }

// Compare orders ids. The order has no meaning.
func (id JobID) Compare(o JobID) int { return slices.Compare(id[:], o[:]) }

// ParseJobID parses what String returned.
func ParseJobID(text string) (JobID, error) {
	var id JobID
	digits, found := strings.CutPrefix(text, jobPrefix)
	b, err := hex.DecodeString(digits)
	if !found || err != nil || len(b) != len(id) {
		return id, fmt.Errorf("job id %q is not job_ and 32 hex digits", text)
	}
	copy(id[:], b)
	return id, nil
}

// Kind is what happened.
type Kind uint8

// The kinds of records. The numbers are on disk: never reuse one.
const (
	// Submitted accepts a job; the payload is a Submission.
	Submitted Kind = 1
	// Started begins attempt Attempt under Token; no payload.
	Started Kind = 2
	// Retrying ends an attempt that failed and may be repeated; the payload is a Delay.
	Retrying Kind = 3
	// Finished ends the job; the payload is an Outcome.
	Finished Kind = 4
	// CancelAsked is a client's request to cancel, written by the node that received it;
	// no payload.
	CancelAsked Kind = 5
	// Deleted hides the job permanently; no payload.
	Deleted Kind = 6
)

func (k Kind) known() bool { return k >= Submitted && k <= Deleted }

// Record is one entry of a journal. Everything but the payload is plaintext: numbers, the
// origin's name and a keyed digest. The payload is sealed with Place as additional
// data, so it can't be moved to another record.
type Record struct {
	Stream  Stream
	Seq     uint64 // from 1, without gaps within a stream
	Clock   Clock
	Token   Token // of the owner that wrote it; in a Submitted, of the stream's creation
	Kind    Kind
	Job     JobID
	Attempt uint32 // from 1; 0 for kinds without
	// Rank of a Finished orders the outcomes of one attempt, and is its status in a form
	// that needs no key; see Status.Rank. 0 for the other kinds.
	Rank uint8
	// Digest is the first half of an HMAC over Place and the plaintext. It does not change
	// when the payload is re-sealed with another key.
	Digest  [16]byte
	Payload []byte // sealed; empty for kinds without
	// Format is the format in which the record was written; 0: the one that this version
	// writes. Ext holds what formats above knownFormat add.
	Format uint8
	Ext    []byte

	// head of a Submitted that was sealed in this process; it is not written.
	head *Head
}

// Sealed reports whether the payload was sealed in this process as a submission. Then it
// has its own memory of the exact size, and is not part of a buffer that was read or
// received.
func (r *Record) Sealed() bool { return r.head != nil }

// Place is the additional data of the payload's seal. It does not include Seq and Clock,
// which are only known when the record is written.
func (r *Record) Place() []byte {
	b := make([]byte, 0, 64+len(r.Stream.Origin))
	b = append(b, "job record v1\x00"...)
	b = append(b, byte(r.Kind), r.Rank)
	b = append(b, r.Job[:]...)
	b = append(b, r.Stream.Incarnation[:]...)
	b = binary.AppendUvarint(b, uint64(r.Attempt))
	b = binary.AppendUvarint(b, r.Token.Generation)
	b = binary.AppendUvarint(b, r.Token.Index)
	return append(b, r.Stream.Origin...)
}

// A frame is
//
//	length of body (4) | crc32c of body (4) | body
//
// and the body, big-endian,
//
//	format (1) | kind (1) | rank (1) | seq (8) | clock (8) | job (16) | digest (16) | incarnation (16)
//	| token generation | token index | attempt (uvarints) | origin length (1) | origin
//	| length of ext (uvarint) | ext | payload
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// AppendFrame appends the record as it is encoded on disk and on the wire.
func AppendFrame(dst []byte, r *Record) ([]byte, error) {
	if len(r.Payload) > MaxPayload || len(r.Stream.Origin) > MaxOrigin || len(r.Ext) > MaxExt {
		return dst, fmt.Errorf("%w: %d bytes of payload, origin of %d bytes, ext of %d bytes", ErrTooLarge,
			len(r.Payload), len(r.Stream.Origin), len(r.Ext))
	}
	format, ext := r.Format, r.Ext
	if format == 0 {
		format, ext = writeFormat, writeExt
	}
	start := len(dst)
	dst = append(dst, make([]byte, frameHeader)...)
	dst = append(dst, format, byte(r.Kind), r.Rank)
	dst = binary.BigEndian.AppendUint64(dst, r.Seq)
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.Clock))
	dst = append(dst, r.Job[:]...)
	dst = append(dst, r.Digest[:]...)
	dst = append(dst, r.Stream.Incarnation[:]...)
	dst = binary.AppendUvarint(dst, r.Token.Generation)
	dst = binary.AppendUvarint(dst, r.Token.Index)
	dst = binary.AppendUvarint(dst, uint64(r.Attempt))
	dst = append(dst, byte(len(r.Stream.Origin)))
	dst = append(dst, r.Stream.Origin...)
	dst = binary.AppendUvarint(dst, uint64(len(ext)))
	dst = append(dst, ext...)
	dst = append(dst, r.Payload...)
	body := dst[start+frameHeader:]
	binary.BigEndian.PutUint32(dst[start:], uint32(len(body)))
	binary.BigEndian.PutUint32(dst[start+4:], crc32.Checksum(body, castagnoli))
	return dst, nil
}

// ErrShort means that the bytes end within a frame: more may follow, or a crash cut it
// off.
var ErrShort = errors.New("a journal record is incomplete")

// NextFrame decodes the record at the start of b and returns what follows it. The payload
// points into b. The error wraps ErrShort, ErrDamaged or ErrNewerFormat.
func NextFrame(b []byte) (r Record, rest []byte, err error) {
	if len(b) < frameHeader {
		return r, b, ErrShort
	}
	length := binary.BigEndian.Uint32(b)
	if length < fixedBytes+4 || length > maxBodyBytes {
		return r, b, fmt.Errorf("%w: a length of %d", ErrDamaged, length)
	}
	if uint64(len(b)) < frameHeader+uint64(length) {
		return r, b, ErrShort
	}
	body := b[frameHeader : frameHeader+length]
	if crc32.Checksum(body, castagnoli) != binary.BigEndian.Uint32(b[4:]) {
		return r, b, fmt.Errorf("%w: checksum", ErrDamaged)
	}
	if body[0] == 0 || body[0] > readFormat {
		return r, b, fmt.Errorf("%w: %d", ErrNewerFormat, body[0])
	}
	if r, err = decodeBody(body); err != nil {
		return Record{}, b, err
	}
	return r, b[frameHeader+length:], nil
}

func decodeBody(body []byte) (r Record, err error) {
	r.Format, r.Kind, r.Rank = body[0], Kind(body[1]), body[2]
	r.Seq = binary.BigEndian.Uint64(body[3:])
	r.Clock = Clock(binary.BigEndian.Uint64(body[11:]))
	copy(r.Job[:], body[19:])
	copy(r.Digest[:], body[35:])
	copy(r.Stream.Incarnation[:], body[51:])
	rest := body[fixedBytes:]
	var attempt uint64
	for _, field := range []*uint64{&r.Token.Generation, &r.Token.Index, &attempt} {
		v, n := binary.Uvarint(rest)
		if n <= 0 || n != uvarintSize(v) { // a record has only one encoding
			return r, fmt.Errorf("%w: a malformed number", ErrDamaged)
		}
		*field, rest = v, rest[n:]
	}
	r.Attempt = uint32(attempt)
	if len(rest) == 0 || int(rest[0]) > len(rest)-1 {
		return r, fmt.Errorf("%w: origin", ErrDamaged)
	}
	origin := int(rest[0])
	r.Stream.Origin, rest = string(rest[1:1+origin]), rest[1+origin:]
	ext, n := binary.Uvarint(rest)
	if n <= 0 || n != uvarintSize(ext) || ext > MaxExt || ext > uint64(len(rest)-n) {
		return r, fmt.Errorf("%w: ext", ErrDamaged)
	}
	r.Ext, r.Payload = rest[n:uint64(n)+ext], rest[uint64(n)+ext:]
	if len(r.Ext) == 0 {
		r.Ext = nil
	}
	if len(r.Payload) == 0 {
		r.Payload = nil
	}
	if uint64(r.Attempt) != attempt || len(r.Payload) > MaxPayload || origin > MaxOrigin {
		return r, fmt.Errorf("%w: a field is out of its range", ErrDamaged)
	}
	return r, r.check()
}

// lengthOf returns the length of the whole frame at the start of b, which was checked
// before.
func lengthOf(b []byte) int { return frameHeader + int(binary.BigEndian.Uint32(b)) }

// frameSize returns the length of the frame that AppendFrame makes.
func frameSize(r *Record) int {
	ext := r.Ext
	if r.Format == 0 {
		ext = writeExt
	}
	return frameHeader + fixedBytes + uvarintSize(r.Token.Generation) + uvarintSize(r.Token.Index) +
		uvarintSize(uint64(r.Attempt)) + 1 + len(r.Stream.Origin) + uvarintSize(uint64(len(ext))) + len(ext) + len(r.Payload)
}

func uvarintSize(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

// check reports whether the record can be written and read again.
func (r *Record) check() error {
	switch {
	case len(r.Payload) > MaxPayload || len(r.Stream.Origin) > MaxOrigin || len(r.Ext) > MaxExt:
		return fmt.Errorf("%w: %d bytes of payload, origin of %d bytes", ErrTooLarge, len(r.Payload), len(r.Stream.Origin))
	case !r.Kind.known(), r.Rank > maxRank, (r.Rank > 0) != (r.Kind == Finished), r.Seq == 0, r.Stream.Origin == "":
		return fmt.Errorf("%w: a field is out of its range", ErrDamaged)
	}
	return nil
}
