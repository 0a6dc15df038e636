package journal

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
)

// Read returns frames of a stream from a seq on, one after the other as encoded by
// AppendFrame: at least one, and no more than maxBytes unless the first alone is
// larger. next is the seq after them. No frames and next = from means that there are no
// more yet. The caller must not change the bytes.
//
// The error wraps ErrTrimmed, ErrGap when from is beyond the end, ErrNoStream,
// ErrFailed (also when damage is found now) or ErrClosed.
func (l *Log) Read(id Stream, from uint64, maxBytes int) (frames []byte, next uint64, err error) {
	s, err := l.find(id)
	if err != nil {
		return nil, from, err
	}
	return l.read(s, from, maxBytes)
}

func (l *Log) read(s *stream, from uint64, maxBytes int) (frames []byte, next uint64, err error) {
	from = max(from, 1)
	if frames, next, ok := l.tails.read(s.id, from, maxBytes); ok {
		return frames, next, nil
	}
	for {
		s.mu.Lock()
		switch first := s.segments[0].first; {
		case from < first:
			s.mu.Unlock()
			return nil, from, fmt.Errorf("%w: %s begins with %d", ErrTrimmed, s.id, first)
		case from > s.durable+1:
			s.mu.Unlock()
			return nil, from, fmt.Errorf("%w: %s ends with %d", ErrGap, s.id, s.durable)
		case from == s.durable+1:
			s.mu.Unlock()
			return nil, from, nil
		}
		i, found := slices.BinarySearchFunc(s.segments, from, func(g *segment, seq uint64) int { return cmp.Compare(g.first, seq) })
		if !found {
			i--
		}
		g := s.segments[i]
		path, at, end := g.path, g.offsetOf(from), g.size
		s.mu.Unlock()

		frames, next, err := l.readSegment(s.id, path, at, end, from, maxBytes)
		if errors.Is(err, fs.ErrNotExist) && l.trimmed(s, g) {
			continue // trimmed since; the next round returns ErrTrimmed
		}
		if err != nil && s.isDropped() {
			return nil, from, fmt.Errorf("%w: %s", ErrNoStream, s.id)
		}
		if err != nil {
			return nil, from, l.setFailed("read "+path, err)
		}
		return frames, next, nil
	}
}

// trimmed reports whether a segment was removed from its stream.
func (l *Log) trimmed(s *stream, g *segment) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !slices.Contains(s.segments, g)
}

var errEnough = errors.New("enough was read")

func (l *Log) readSegment(id Stream, path string, at, end int64, from uint64, maxBytes int) (frames []byte, next uint64, err error) {
	f, err := l.disk.open(path, os.O_RDONLY)
	if err != nil {
		return nil, from, err
	}
	defer func() { _ = f.Close() }() // only read from
	next = from
	_, err = walk(f, id, at, end, func(_ int64, frame []byte, r *Record) error {
		switch {
		case r.Seq < from:
			return nil
		case r.Seq != next:
			return fmt.Errorf("%w: record %d where %d was expected", ErrDamaged, r.Seq, next)
		case len(frames) > 0 && len(frames)+len(frame) > maxBytes:
			return errEnough
		}
		frames = append(frames, frame...)
		next++
		return nil
	})
	switch {
	case errors.Is(err, errEnough):
		err = nil
	case errors.Is(err, ErrShort):
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	case err == nil && len(frames) == 0:
		err = fmt.Errorf("%w: record %d is not in its segment", ErrDamaged, from)
	}
	return frames, next, err
}

// Replay calls fn with the records of a stream from a seq on, in order, up to what was
// durable when it began. fn may keep them. It stops at an error of fn.
func (l *Log) Replay(id Stream, from uint64, fn func([]Record) error) error {
	s, err := l.find(id)
	if err != nil {
		return err
	}
	for end := s.end().Durable; from <= end; {
		frames, next, err := l.read(s, from, windowBytes)
		if err != nil {
			return err
		}
		var records []Record
		for len(frames) > 0 {
			var r Record
			if r, frames, err = NextFrame(frames); err != nil {
				return l.setFailed("read "+id.String(), err)
			}
			r.Stream.Origin = id.Origin
			records = append(records, r)
		}
		if err := fn(records); err != nil {
			return err
		}
		from = next
	}
	return nil
}

// tails caches the recent frames of all streams in memory; the oldest are evicted first.
type tails struct {
	limit int64

	mu     sync.Mutex // guards what follows
	held   int64
	order  []*chunk
	chunks map[Stream][]*chunk
}

// chunk is one batch. Its bytes never change.
type chunk struct {
	stream      Stream
	first, last uint64
	frames      []byte // nil after drop
}

func (t *tails) add(id Stream, first, last uint64, frames []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := &chunk{id, first, last, frames}
	t.chunks[id] = append(t.chunks[id], c)
	t.order = append(t.order, c)
	t.held += int64(len(frames))
	for t.held > t.limit && len(t.order) > 0 {
		old := t.order[0]
		t.order[0] = nil
		t.order = t.order[1:]
		if old.frames == nil {
			continue
		}
		t.held -= int64(len(old.frames))
		rest := t.chunks[old.stream]
		rest[0] = nil
		if rest = rest[1:]; len(rest) == 0 {
			delete(t.chunks, old.stream)
		} else {
			t.chunks[old.stream] = rest
		}
	}
}

// drop removes a stream's frames.
func (t *tails) drop(id Stream) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.chunks[id] {
		t.held -= int64(len(c.frames))
		c.frames = nil
	}
	delete(t.chunks, id)
}

// read is Read from memory; false when not all frames are cached.
func (t *tails) read(id Stream, from uint64, maxBytes int) (frames []byte, next uint64, ok bool) {
	t.mu.Lock()
	all := t.chunks[id]
	i, _ := slices.BinarySearchFunc(all, from, func(c *chunk, seq uint64) int {
		switch {
		case c.last < seq:
			return -1
		case c.first > seq:
			return 1
		}
		return 0
	})
	var parts [][]byte
	bytes := 0
	for _, c := range all[i:] {
		if len(parts) == 0 && c.first > from {
			break
		}
		parts = append(parts, c.frames)
		if bytes += len(c.frames); bytes > maxBytes+len(c.frames) {
			break
		}
	}
	var first uint64
	if len(parts) > 0 {
		first = all[i].first
	}
	t.mu.Unlock()
	if len(parts) == 0 {
		return nil, from, false
	}
	for ; first < from; first++ {
		parts[0] = parts[0][lengthOf(parts[0]):]
	}
	next = from
	for _, part := range parts {
		n := 0
		for n < len(part) {
			size := lengthOf(part[n:])
			if len(frames)+n+size > maxBytes && len(frames)+n > 0 {
				break
			}
			n += size
			next++
		}
		if frames == nil {
			frames = part[:n:n] // no copy in the common case
		} else {
			frames = append(frames, part[:n]...)
		}
		if n < len(part) {
			break
		}
	}
	return frames, next, true
}
