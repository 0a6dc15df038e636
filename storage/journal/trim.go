package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Trim lets go of the records below keepFrom, by whole segments: the last one
// stays always.
func (l *Log) Trim(id Stream, keepFrom uint64) error {
	s, err := l.find(id)
	if err != nil {
		return err
	}
	s.prune.Lock()
	defer s.prune.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	s.mu.Lock()
	if s.dropped {
		s.mu.Unlock()
		return fmt.Errorf("%w: %s", ErrNoStream, id)
	}
	n := 0
	for n < len(s.segments)-1 && s.segments[n].last < keepFrom {
		n++
	}
	old := s.segments[:n:n]
	s.segments = s.segments[n:]
	s.mu.Unlock()
	if n == 0 {
		return nil
	}
	l.moved.give()
	if err := l.removeSegments(s, old); err != nil {
		return l.setFailed("trim "+s.id.String(), err)
	}
	return nil
}

// removeSegments deletes files that are no part of the stream any more, the
// oldest first and each durably: a hole that a crash leaves would look like
// damage.
func (l *Log) removeSegments(s *stream, old []*segment) error {
	for _, g := range old {
		if err := l.disk.remove(g.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := l.disk.syncDir(s.dir); err != nil {
			return err
		}
		l.segments.Add(-1)
		l.bytes.Add(-g.size)
	}
	return nil
}

// Shrink brings the log back within BudgetBytes, if it can: it trims the segments
// with the oldest records first, those of which applied says that all is in the
// own table: the highest seq of the stream that is, durably. Who still
// lacks them needs a snapshot. It gives the streams that it trimmed, with what
// they begin with now.
func (l *Log) Shrink(applied func(Stream) uint64) (map[Stream]uint64, error) {
	trimmed := map[Stream]uint64{}
	for l.bytes.Load() > l.o.BudgetBytes {
		if err := l.usable(); err != nil {
			return trimmed, err
		}
		oldest, ok := l.oldest(applied)
		if !ok {
			break
		}
		upTo := oldest.last
		if err := l.Trim(oldest.stream, upTo+1); err != nil && !errors.Is(err, ErrNoStream) {
			return trimmed, err
		}
		trimmed[oldest.stream] = upTo + 1
		l.log.Warn("journal beyond its budget; a segment is gone that not everybody may have",
			"stream", oldest.stream.String(), "up_to", upTo)
	}
	return trimmed, nil
}

// beginning is the first segment of a stream.
type beginning struct {
	stream Stream
	last   uint64
	clock  Clock
}

// oldest gives the segment with the oldest records of those that may be trimmed.
func (l *Log) oldest(applied func(Stream) uint64) (best beginning, ok bool) {
	var all []beginning
	l.mu.RLock()
	for _, s := range l.streams {
		s.mu.Lock()
		if g := s.segments[0]; len(s.segments) > 1 {
			all = append(all, beginning{s.id, g.last, g.clock})
		}
		s.mu.Unlock()
	}
	l.mu.RUnlock()
	// Asked without a lock: the table may be asking us.
	for _, b := range all {
		if b.last <= applied(b.stream) && (!ok || b.clock < best.clock) {
			best, ok = b, true
		}
	}
	return best, ok
}

// droppedPrefix begins the name of a stream's directory that is being deleted.
const droppedPrefix = ".dropped-"

// Drop deletes a stream. Who asks for it afterwards gets ErrNoStream.
func (l *Log) Drop(id Stream) error {
	l.making.Lock()
	defer l.making.Unlock()
	s, err := l.find(id)
	if err != nil {
		return err
	}
	s.freeze(fmt.Errorf("%w: %s", ErrNoStream, id))
	s.write.Lock()
	defer s.write.Unlock()
	s.prune.Lock()
	defer s.prune.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	s.gone = true
	s.mu.Lock()
	s.dropped = true
	s.mu.Unlock()
	if err := l.removeStream(s); err != nil {
		return l.setFailed("drop "+id.String(), err)
	}
	l.log.Info("stream dropped", "stream", id.String())
	return nil
}

func (l *Log) removeStream(s *stream) error {
	if err := l.closeActive(s); err != nil {
		return err
	}
	// Away with the name first: half a stream would look damaged.
	parent := filepath.Dir(s.dir)
	aside := filepath.Join(parent, droppedPrefix+s.id.Incarnation.String())
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	if err := l.disk.rename(s.dir, aside); err != nil {
		return err
	}
	if err := l.disk.syncDir(parent); err != nil {
		return err
	}
	// And with what is known of it, should a stream of this name ever come again.
	if err := l.marks.free(s); err != nil {
		return err
	}
	l.mu.Lock()
	delete(l.streams, s.id)
	rest := l.all()
	l.mu.Unlock()
	if err := l.settle(rest); err != nil {
		return err
	}
	l.tails.drop(s.id)
	l.moved.give()
	s.mu.Lock()
	for _, g := range s.segments {
		l.segments.Add(-1)
		l.bytes.Add(-g.size)
	}
	s.mu.Unlock()
	return os.RemoveAll(aside)
}
