package journal

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"

	"github.com/dsnode/dsnode/storage/keyring"
)

// A segment file is a header, followed by batches. The header is
//
//	"DSNJSEG\x00" (8) | format (1) | flags (1) | first seq (8) | incarnation (16) |
//	origin length (1) | origin | crc32c of all that (4)
//
// and a batch, which was made durable by one write and one sync, is a batch header and
// frames. The batch header is
//
//	magic (4) | crc32c (4) of stream, offset and seq | offset of this header (8) | seq of the next frame (8)
//
// A batch is written only after the sync of the previous one. So a valid batch header
// proves that everything in front of it was durable: an unreadable part in front of one
// is damage, and an unreadable part without one after it is a write that a crash
// interrupted. The first byte distinguishes a batch header from a frame, whose length is
// below it.
const (
	segmentMagic  = "DSNJSEG\x00"
	segmentFormat = 1
	headerFixed   = len(segmentMagic) + 1 + 1 + 8 + 16 + 1
	maxHeader     = headerFixed + MaxOrigin + 4
	maxFileName   = 255

	batchHeaderSize = 4 + 4 + 8 + 8
	batchMagic      = 0xD5B0A7C1

	// flagBegins: the stream restarts with this segment; older segments are obsolete.
	flagBegins = 1

	// indexEvery is the number of bytes between two entries of the sparse index.
	indexEvery = 64 << 10
)

// segment describes one file. The stream's mu guards it.
type segment struct {
	path   string
	first  uint64 // in the file's name
	last   uint64 // first-1 while it is empty
	size   int64  // up to the end of the last durable frame
	clock  Clock  // of the last record
	index  []indexed
	sealed []sealedWith
}

// indexed is where a frame, or the batch header in front of it, begins.
type indexed struct {
	seq    uint64
	offset int64
}

// sealedWith counts the payloads sealed with one data key.
type sealedWith struct {
	key     keyring.KeyID
	records int64
}

// add updates the segment for a record at the offset.
func (g *segment) add(r *Record, offset int64) {
	if len(g.index) == 0 || offset-g.index[len(g.index)-1].offset >= indexEvery {
		g.index = append(g.index, indexed{r.Seq, offset})
	}
	g.last, g.clock = r.Seq, r.Clock
	if len(r.Payload) > 0 {
		if id, err := keyring.SealedWith(r.Payload); err == nil {
			g.sealed = count(g.sealed, id, 1)
		}
	}
}

func count(all []sealedWith, id keyring.KeyID, n int64) []sealedWith {
	for i := range all {
		if all[i].key == id {
			all[i].records += n
			return all
		}
	}
	return append(all, sealedWith{id, n})
}

// offsetOf returns where to begin reading for seq.
func (g *segment) offsetOf(seq uint64) int64 {
	i, found := slices.BinarySearchFunc(g.index, seq, func(e indexed, seq uint64) int { return cmp.Compare(e.seq, seq) })
	if !found {
		i--
	}
	return g.index[i].offset
}

func segmentName(first uint64) string { return fmt.Sprintf("%020d.seg", first) }

// parseSegmentName returns false for the names of other files.
func parseSegmentName(name string) (first uint64, ok bool) {
	digits, found := strings.CutSuffix(name, ".seg")
	if !found || len(digits) != 20 {
		return 0, false
	}
	for _, c := range []byte(digits) {
		if c < '0' || c > '9' {
			return 0, false
		}
		first = first*10 + uint64(c-'0')
	}
	return first, first > 0
}

func segmentHeader(s Stream, first uint64, flags byte) []byte {
	b := append([]byte(segmentMagic), segmentFormat, flags)
	b = binary.BigEndian.AppendUint64(b, first)
	b = append(b, s.Incarnation[:]...)
	b = append(b, byte(len(s.Origin)))
	b = append(b, s.Origin...)
	return appendSum(b)
}

func appendSum(b []byte) []byte {
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// parseHeader decodes the header at the start of b. The error wraps ErrShort, ErrDamaged
// or ErrNewerFormat.
func parseHeader(b []byte) (s Stream, first uint64, flags byte, size int, err error) {
	if len(b) < headerFixed {
		return s, 0, 0, 0, ErrShort
	}
	origin := int(b[headerFixed-1])
	size = headerFixed + origin + 4
	if string(b[:len(segmentMagic)]) != segmentMagic {
		return s, 0, 0, 0, fmt.Errorf("%w: not the header of a segment", ErrDamaged)
	}
	format := b[len(segmentMagic)]
	whole := len(b) >= size && crc32.Checksum(b[:size-4], castagnoli) == binary.BigEndian.Uint32(b[size-4:])
	switch {
	case format > segmentFormat && !damagedFormat(b, size):
		return s, 0, 0, 0, fmt.Errorf("%w: segment format %d", ErrNewerFormat, format)
	case len(b) < size:
		return s, 0, 0, 0, ErrShort
	case !whole || format != segmentFormat || origin == 0 || origin > MaxOrigin:
		return s, 0, 0, 0, fmt.Errorf("%w: invalid header of a segment", ErrDamaged)
	}
	at := len(segmentMagic) + 1
	flags = b[at]
	first = binary.BigEndian.Uint64(b[at+1:])
	copy(s.Incarnation[:], b[at+9:])
	s.Origin = string(b[headerFixed : headerFixed+origin])
	if first == 0 {
		return s, 0, 0, 0, fmt.Errorf("%w: a segment that begins with 0", ErrDamaged)
	}
	return s, first, flags, size, nil
}

// damagedFormat reports whether the header is valid except for a changed format byte.
func damagedFormat(b []byte, size int) bool {
	if len(b) < size {
		return false
	}
	own := slices.Clone(b[:size])
	own[len(segmentMagic)] = segmentFormat
	return crc32.Checksum(own[:size-4], castagnoli) == binary.BigEndian.Uint32(own[size-4:])
}

func putBatchHeader(b []byte, s Stream, offset int64, seq uint64) {
	binary.BigEndian.PutUint32(b, batchMagic)
	binary.BigEndian.PutUint64(b[8:], uint64(offset))
	binary.BigEndian.PutUint64(b[16:], seq)
	binary.BigEndian.PutUint32(b[4:], batchSum(b, s))
}

func batchSum(b []byte, s Stream) uint32 {
	sum := crc32.Checksum(b[8:batchHeaderSize], castagnoli)
	sum = crc32.Update(sum, castagnoli, s.Incarnation[:])
	return crc32.Update(sum, castagnoli, []byte(s.Origin))
}

// isBatchHeader reports whether b begins like a batch header; no frame does.
func isBatchHeader(b []byte) bool {
	return len(b) >= 4 && binary.BigEndian.Uint32(b) == batchMagic
}

// checkBatchHeader checks the batch header at the offset.
func checkBatchHeader(b []byte, s Stream, offset int64) error {
	if len(b) < batchHeaderSize {
		return ErrShort
	}
	if uint64(offset) != binary.BigEndian.Uint64(b[8:]) || batchSum(b, s) != binary.BigEndian.Uint32(b[4:]) {
		return fmt.Errorf("%w: invalid header of a batch", ErrDamaged)
	}
	return nil
}

// walk reads frames of the stream from the offset to the end and calls fn with each one's
// offset and bytes, which are valid only during the call. It returns the offset after the
// last whole frame or batch header; with an error, the offset of the problem. The error
// wraps ErrShort where the file ends within a frame, ErrDamaged, ErrNewerFormat, or is
// that of fn or the disk.
func walk(f io.ReaderAt, s Stream, at, end int64, fn func(at int64, frame []byte, r *Record) error) (int64, error) {
	w := window{f: f, at: at, end: end}
	for w.at < end {
		b, err := w.peek(batchHeaderSize)
		if err != nil {
			return w.at, err
		}
		if isBatchHeader(b) {
			if err := checkBatchHeader(b, s, w.at); err != nil {
				return w.at, err
			}
			w.skip(batchHeaderSize)
			continue
		}
		if len(b) < frameHeader {
			return w.at, ErrShort
		}
		length := binary.BigEndian.Uint32(b)
		if length > maxBodyBytes {
			return w.at, fmt.Errorf("%w: a length of %d", ErrDamaged, length)
		}
		if b, err = w.peek(frameHeader + int(length)); err != nil {
			return w.at, err
		}
		r, rest, err := NextFrame(b)
		if err != nil {
			return w.at, err
		}
		if r.Stream != s {
			return w.at, fmt.Errorf("%w: a record of %s", ErrDamaged, r.Stream)
		}
		frame := b[:len(b)-len(rest)]
		if err := fn(w.at, frame, &r); err != nil {
			return w.at, err
		}
		w.skip(len(frame))
	}
	return w.at, nil
}

// window is a part of a file in memory that moves forward.
type window struct {
	f       io.ReaderAt
	at, end int64
	buf     []byte // read and not skipped
}

const windowBytes = 1 << 20

// peek returns at least n bytes, or all that is left.
func (w *window) peek(n int) ([]byte, error) {
	left := w.end - w.at
	if int64(n) > left {
		n = int(left)
	}
	if len(w.buf) >= n {
		return w.buf, nil
	}
	next := make([]byte, min(int64(max(n, windowBytes)), left))
	got := copy(next, w.buf)
	if _, err := w.f.ReadAt(next[got:], w.at+int64(got)); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%w: the file has become shorter", ErrDamaged)
		}
		return nil, err
	}
	w.buf = next
	return w.buf, nil
}

func (w *window) skip(n int) {
	w.buf = w.buf[n:]
	w.at += int64(n)
}
