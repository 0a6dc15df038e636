package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"

	"github.com/dsnode/dsnode/storage/keyring"
)

// A segment file is a header, and then batches back to back. The header is
//
//	"DSNJSEG\x00" (8) | format (1) | flags (1) | first seq (8) | incarnation (16) |
//	origin length (1) | origin | crc32c of all that (4)
//
// and a batch, which one write and one sync made durable, is a mark and frames:
//
//	mark (4) | crc32c (4) of stream, offset and seq | offset of the mark (8) | seq of the next frame (8)
//
// A batch is written only after the sync of the one before. So a good mark
// proves that everything in front of it was durable: what is unreadable there is
// damage, and what is unreadable with no mark behind it is a write that a crash
// cut short. The first byte tells a mark from a frame, whose length is below it.
const (
	segmentMagic  = "DSNJSEG\x00"
	segmentFormat = 1
	headerFixed   = len(segmentMagic) + 1 + 1 + 8 + 16 + 1
	maxHeader     = headerFixed + MaxOrigin + 4
	maxFileName   = 255

	markSize  = 4 + 4 + 8 + 8
	markMagic = 0xD5B0A7C1

	// flagBegins: the stream begins with this segment here; older ones are of no
	// use any more.
	flagBegins = 1

	// indexEvery is how many bytes lie between two entries of the sparse index.
	indexEvery = 64 << 10
)

// segment is what is known of one file. Its stream's mutex guards it.
type segment struct {
	path   string
	first  uint64 // the file's name
	last   uint64 // first-1 while it is empty
	size   int64  // up to the last durable frame
	clock  Clock  // of the last record
	index  []indexed
	sealed []sealedWith
}

// indexed says where a frame, or the mark before it, begins.
type indexed struct {
	seq    uint64
	offset int64
}

// sealedWith counts the payloads under one data key.
type sealedWith struct {
	key     keyring.KeyID
	records int64
}

// note takes a record at the offset into the accounts.
func (g *segment) note(r *Record, offset int64) {
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

// offsetOf is where to begin reading for seq.
func (g *segment) offsetOf(seq uint64) int64 {
	i, found := slices.BinarySearchFunc(g.index, seq, func(e indexed, seq uint64) int {
		switch {
		case e.seq < seq:
			return -1
		case e.seq > seq:
			return 1
		}
		return 0
	})
	if !found {
		i--
	}
	return g.index[i].offset
}

func segmentName(first uint64) string { return fmt.Sprintf("%020d.seg", first) }

// parseSegmentName gives false for files that are no segments.
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

func appendHeader(b []byte, s Stream, first uint64, flags byte) []byte {
	start := len(b)
	b = append(b, segmentMagic...)
	b = append(b, segmentFormat, flags)
	b = binary.BigEndian.AppendUint64(b, first)
	b = append(b, s.Incarnation[:]...)
	b = append(b, byte(len(s.Origin)))
	b = append(b, s.Origin...)
	return append(b[:start], appendSum(b[start:])...)
}

func appendSum(b []byte) []byte {
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// parseHeader reads the header at the start of b. The error is ErrShort,
// ErrDamaged or ErrNewerFormat.
func parseHeader(b []byte) (s Stream, first uint64, flags byte, size int, err error) {
	if len(b) < headerFixed {
		return s, 0, 0, 0, ErrShort
	}
	origin := int(b[headerFixed-1])
	size = headerFixed + origin + 4
	if string(b[:len(segmentMagic)]) != segmentMagic {
		return s, 0, 0, 0, fmt.Errorf("%w: no segment's header", ErrDamaged)
	}
	format := b[len(segmentMagic)]
	whole := len(b) >= size && crc32.Checksum(b[:size-4], castagnoli) == binary.BigEndian.Uint32(b[size-4:])
	switch {
	case format > segmentFormat && !damagedFormat(b, size):
		return s, 0, 0, 0, fmt.Errorf("%w: segment format %d", ErrNewerFormat, format)
	case len(b) < size:
		return s, 0, 0, 0, ErrShort
	case !whole || format != segmentFormat || origin == 0 || origin > MaxOrigin:
		return s, 0, 0, 0, fmt.Errorf("%w: header of a segment", ErrDamaged)
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

// damagedFormat says whether a header with another format byte is one of ours
// in which that byte was changed.
func damagedFormat(b []byte, size int) bool {
	if len(b) < size {
		return false
	}
	own := slices.Clone(b[:size])
	own[len(segmentMagic)] = segmentFormat
	return crc32.Checksum(own[:size-4], castagnoli) == binary.BigEndian.Uint32(own[size-4:])
}

func putMark(b []byte, s Stream, offset int64, seq uint64) {
	binary.BigEndian.PutUint32(b, markMagic)
	binary.BigEndian.PutUint64(b[8:], uint64(offset))
	binary.BigEndian.PutUint64(b[16:], seq)
	binary.BigEndian.PutUint32(b[4:], markSum(b, s))
}

func markSum(b []byte, s Stream) uint32 {
	sum := crc32.Checksum(b[8:markSize], castagnoli)
	sum = crc32.Update(sum, castagnoli, s.Incarnation[:])
	return crc32.Update(sum, castagnoli, []byte(s.Origin))
}

// isMark says whether b begins with what only a mark begins with.
func isMark(b []byte) bool {
	return len(b) >= 4 && binary.BigEndian.Uint32(b) == markMagic
}

// parseMark checks a mark that lies at the offset.
func parseMark(b []byte, s Stream, offset int64) (seq uint64, err error) {
	if len(b) < markSize {
		return 0, ErrShort
	}
	if uint64(offset) != binary.BigEndian.Uint64(b[8:]) || markSum(b, s) != binary.BigEndian.Uint32(b[4:]) {
		return 0, fmt.Errorf("%w: mark of a batch", ErrDamaged)
	}
	return binary.BigEndian.Uint64(b[16:]), nil
}

// walk reads frames of the stream from the offset to the end and calls fn with
// each one's offset and bytes, which are valid only inside. at is behind the
// last whole frame, or mark, and after an error where the trouble is. The error is ErrShort
// where the file ends within a frame, ErrDamaged, ErrNewerFormat, fn's or the disk's.
func walk(f io.ReaderAt, s Stream, at, end int64, fn func(at int64, frame []byte, r *Record) error) (int64, error) {
	w := window{f: f, at: at, end: end}
	for w.at < end {
		b, err := w.peek(markSize)
		if err != nil {
			return w.at, err
		}
		if isMark(b) {
			if _, err := parseMark(b, s, w.at); err != nil {
				return w.at, err
			}
			w.skip(markSize)
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
	buf     []byte // what was read and not skipped
}

const windowBytes = 1 << 20

// peek gives at least n bytes, or all that is left.
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
