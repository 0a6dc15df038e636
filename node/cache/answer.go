package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Answer is a complete answer with status 200. It is immutable.
type Answer struct {
	// StoredAt is when the answer was complete, by the clock of the node that kept it.
	StoredAt time.Time
	// Purge is the number of purges that were agreed on before the upstream was
	// asked; see cluster.CachePurges.
	Purge       uint64
	ContentType string
	Stream      bool
	Body        []byte
	// Ends are the offsets in Body at which the events of a stream end, so that a
	// replay has the same chunks.
	Ends []int
}

// weight is about how many bytes of memory an answer takes.
func (a *Answer) weight() int { return len(a.Body) + 8*len(a.Ends) + 512 }

const (
	answerFormat = 1
	flagStream   = 1
	flagZstd     = 2
	// A shorter body gains nothing from compression.
	minCompressed = 512
	maxType       = 256
)

var errAnswer = errors.New("not a kept answer")

// packer encodes answers for the shared tier and decodes them. It is safe for
// concurrent use.
type packer struct {
	enc *zstd.Encoder
	dec *zstd.Decoder
	max int // bytes of an answer's body
}

func newPacker(most int) (*packer, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(256<<10), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, fmt.Errorf("make a compressor: %w", err)
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(4), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(uint64(most)+1))
	if err != nil {
		return nil, fmt.Errorf("make a decompressor: %w", err)
	}
	return &packer{enc: enc, dec: dec, max: most}, nil
}

// pack encodes an answer as
//
//	format (1) | flags (1) | type | ends as distances | size of the body | body
//
// where lengths, counts and distances are varints, and the body is compressed if a
// flag says so. StoredAt and Purge are in the entry's header instead.
func (p *packer) pack(a *Answer) []byte {
	flags := byte(0)
	if a.Stream {
		flags |= flagStream
	}
	if len(a.Body) >= minCompressed {
		flags |= flagZstd
	}
	dst := append([]byte(nil), answerFormat, flags)
	dst = binary.AppendUvarint(dst, uint64(len(a.ContentType)))
	dst = append(dst, a.ContentType...)
	dst = binary.AppendUvarint(dst, uint64(len(a.Ends)))
	last := 0
	for _, end := range a.Ends {
		dst = binary.AppendUvarint(dst, uint64(end-last)) //nolint:gosec // ends rise
		last = end
	}
	dst = binary.AppendUvarint(dst, uint64(len(a.Body)))
	if flags&flagZstd != 0 {
		return p.enc.EncodeAll(a.Body, dst)
	}
	return append(dst, a.Body...)
}

// unpack decodes what pack wrote. It checks every length before it uses it.
func (p *packer) unpack(b []byte) (*Answer, error) {
	if len(b) < 2 || b[0] != answerFormat || b[1]&^(flagStream|flagZstd) != 0 {
		return nil, errAnswer
	}
	a := &Answer{Stream: b[1]&flagStream != 0}
	packed := b[1]&flagZstd != 0
	b = b[2:]
	number := func(most int) (int, bool) {
		n, size := binary.Uvarint(b)
		if size <= 0 || n > uint64(most) { //nolint:gosec // most is positive
			return 0, false
		}
		b = b[size:]
		return int(n), true //nolint:gosec // just bounded
	}
	n, ok := number(min(maxType, len(b)))
	if !ok || n > len(b) {
		return nil, errAnswer
	}
	a.ContentType, b = string(b[:n]), b[n:]
	if n, ok = number(len(b)); !ok { // each end takes a byte at least
		return nil, errAnswer
	}
	if n > 0 {
		a.Ends = make([]int, n)
	}
	last := 0
	for i := range a.Ends {
		step, ok := number(p.max - last)
		if !ok {
			return nil, errAnswer
		}
		last += step
		a.Ends[i] = last
	}
	size, ok := number(p.max)
	if !ok || size < last || a.Stream && size != last {
		return nil, errAnswer
	}
	if !packed {
		if len(b) != size {
			return nil, errAnswer
		}
		a.Body = append([]byte(nil), b...)
		return a, nil
	}
	body, err := p.dec.DecodeAll(b, make([]byte, 0, size))
	if err != nil || len(body) != size {
		return nil, errAnswer
	}
	a.Body = body
	return a, nil
}
