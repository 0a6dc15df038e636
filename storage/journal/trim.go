package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Trim removes the records below keepFrom, by whole segments. The last segment always
// stays.
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
	l.changed.Send()
	if err := l.removeSegments(s, old); err != nil {
		return l.setFailed("trim "+s.id.String(), err)
	}
	return nil
}

// removeSegments deletes files that are no longer part of the stream, the oldest first and
// each durably: a hole left by a crash would look like damage.
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

// Shrink brings the log back within BudgetBytes, if possible. It trims the segments with
// the oldest records first, as long as they are applied: applied returns the last record
// of a stream that is durable in the own table. Peers that lack the trimmed records need a
// snapshot. It returns the streams that were trimmed, with their new first records.
func (l *Log) Shrink(applied func(Stream) uint64) (map[Stream]uint64, error) {
	trimmed := map[Stream]uint64{}
	for l.bytes.Load() > l.o.BudgetBytes {
		if err := l.usable(); err != nil {
			return trimmed, err
		}
		oldest, ok := l.oldestTrimmable(applied)
		if !ok {
			break
		}
		upTo := oldest.last
		if err := l.Trim(oldest.stream, upTo+1); err != nil && !errors.Is(err, ErrNoStream) {
			return trimmed, err
		}
		trimmed[oldest.stream] = upTo + 1
		l.log.Warn("journal over budget: removed a segment that some nodes may not have received",
			"stream", oldest.stream.String(), "up_to", upTo)
	}
	return trimmed, nil
}

// oldestSegment is the first segment of a stream.
type oldestSegment struct {
	stream Stream
	last   uint64
	clock  Clock
}

// oldestTrimmable returns the segment with the oldest records that may be trimmed.
func (l *Log) oldestTrimmable(applied func(Stream) uint64) (best oldestSegment, ok bool) {
	var all []oldestSegment
	l.mu.RLock()
	for _, s := range l.streams {
		s.mu.Lock()
		if g := s.segments[0]; len(s.segments) > 1 {
			all = append(all, oldestSegment{s.id, g.last, g.clock})
		}
		s.mu.Unlock()
	}
	l.mu.RUnlock()
	// Call applied without a lock: the table may be calling this log.
	for _, b := range all {
		if b.last <= applied(b.stream) && (!ok || b.clock < best.clock) {
			best, ok = b, true
		}
	}
	return best, ok
}

// droppedPrefix begins the name of a stream's directory while that is being deleted.
const droppedPrefix = ".dropped-"

// Drop deletes a stream. Later calls for it return ErrNoStream.
func (l *Log) Drop(id Stream) error {
	l.creating.Lock()
	defer l.creating.Unlock()
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
	// Rename first: a half-deleted stream would look damaged.
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
	// Clear its watermark and checkpoint too, in case a stream of this name is created again.
	if err := l.watermarks.free(s); err != nil {
		return err
	}
	l.mu.Lock()
	delete(l.streams, s.id)
	rest := l.all()
	l.mu.Unlock()
	if err := l.writeCheckpoint(rest); err != nil {
		return err
	}
	l.tails.drop(s.id)
	l.changed.Send()
	s.mu.Lock()
	for _, g := range s.segments {
		l.segments.Add(-1)
		l.bytes.Add(-g.size)
	}
	s.mu.Unlock()
	return os.RemoveAll(aside)
}
