package journal

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Receive writes frames of another node's stream, or of an own stream that is closed.
// They must be contiguous. It skips records that are held already, after comparing
// them. A stream that is not held must begin with seq 1. durable is the last durable
// record afterwards, also with an error.
//
// The error wraps ErrGap when records are missing before the given ones, ErrDiverged,
// ErrFrozen for a stream that takes Append, ErrFull, ErrFailed, ErrClosed,
// ErrTooManyStreams, ErrTooLarge beyond MaxAppend, or is one of NextFrame.
func (l *Log) Receive(ctx context.Context, id Stream, frames []byte) (durable uint64, err error) {
	records, buf, err := copyFrames(id, frames)
	if err != nil {
		return l.durableOf(id), err
	}
	if len(records) == 0 {
		return l.durableOf(id), l.usable()
	}
	s, err := l.find(id)
	if errors.Is(err, ErrNoStream) && records[0].Seq == 1 {
		if s, err = l.add(id, 1, 0, nil); errors.Is(err, ErrStreamExists) {
			s, err = l.find(id)
		}
	}
	if errors.Is(err, ErrNoStream) {
		err = fmt.Errorf("%w: %s is not held, and the given records begin with %d", ErrGap, id, records[0].Seq)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return l.durableOf(id), err
	}
	if err := l.beforeWrite(); err != nil {
		return l.durableOf(id), err
	}
	s.write.Lock()
	defer s.write.Unlock()
	err = l.receive(s, records, buf)
	return s.durable, err
}

func (l *Log) durableOf(id Stream) uint64 {
	e, _ := l.End(id)
	return e.Durable
}

// copyFrames checks frames and copies them, since the caller may reuse its buffer. The
// copy has space for a batch header in front.
func copyFrames(id Stream, frames []byte) ([]Record, []byte, error) {
	if len(frames) > MaxAppend {
		return nil, nil, fmt.Errorf("%w: %d bytes at once", ErrTooLarge, len(frames))
	}
	buf := make([]byte, batchHeaderSize+len(frames))
	copy(buf[batchHeaderSize:], frames)
	var records []Record
	for rest := buf[batchHeaderSize:]; len(rest) > 0; {
		var r Record
		var err error
		if r, rest, err = NextFrame(rest); err != nil {
			return nil, nil, fmt.Errorf("frame %d of %s: %w", len(records), id, err)
		}
		if r.Stream != id {
			return nil, nil, fmt.Errorf("%w: a record of %s among those of %s", ErrDamaged, r.Stream, id)
		}
		if n := len(records); n > 0 && r.Seq != records[n-1].Seq+1 {
			return nil, nil, fmt.Errorf("%w: %d of %s after %d", ErrGap, r.Seq, id, records[n-1].Seq)
		}
		r.Stream.Origin = id.Origin // share one string
		records = append(records, r)
	}
	return records, buf, nil
}

// receive does the work of Receive. The caller holds s.write.
func (l *Log) receive(s *stream, records []Record, buf []byte) error {
	if err := l.usable(); err != nil {
		return err
	}
	e := s.end()
	switch {
	case s.gone:
		return fmt.Errorf("%w: %s", ErrNoStream, s.id)
	case e.Own:
		return fmt.Errorf("%w: receive %s, which this process writes", ErrFrozen, s.id)
	case records[0].Seq > e.Durable+1:
		return fmt.Errorf("%w: %s is held up to %d, and the given records begin with %d", ErrGap, s.id, e.Durable, records[0].Seq)
	}
	held := 0
	for held < len(records) && records[held].Seq <= e.Durable {
		held++
	}
	if err := l.compare(s, records[:held]); err != nil {
		return err
	}
	if held == len(records) {
		return nil
	}
	if err := l.checkSpace(2); err != nil {
		return err
	}
	skip := 0
	for i := range records[:held] {
		skip += frameSize(&records[i])
	}
	records, buf = records[held:], buf[skip:] // the batch header overwrites the end of what is skipped
	if ahead, ok := l.clock.Observe(records[len(records)-1].Clock); !ok {
		l.metrics.ahead.Inc()
		if s.warned.IsZero() || time.Since(s.warned) > time.Minute {
			s.warned = time.Now()
			l.log.Warn("records come from a node whose clock is too far ahead; this node's clock does not follow it",
				"stream", s.id.String(), "ahead", ahead)
		}
	}
	return l.put(s, buf, records, &l.metrics.copies)
}

// compare checks that the given records equal the ones held, in everything but the
// seal. Trimmed records can't be compared.
func (l *Log) compare(s *stream, given []Record) error {
	for len(given) > 0 {
		frames, _, err := l.read(s, given[0].Seq, windowBytes)
		if errors.Is(err, ErrTrimmed) {
			given = given[1:]
			continue
		}
		if err != nil {
			return err
		}
		for len(frames) > 0 && len(given) > 0 {
			var held Record
			if held, frames, err = NextFrame(frames); err != nil {
				return l.setFailed("read "+s.id.String(), err)
			}
			if !given[0].same(&held) {
				l.metrics.diverged.Inc()
				l.log.Error("two different records have the same place in a stream; was a disk copied, or an image restored?",
					"stream", s.id.String(), "seq", held.Seq)
				return fmt.Errorf("%w: %s at %d", ErrDiverged, s.id, held.Seq)
			}
			given = given[1:]
		}
	}
	return nil
}

// same reports whether two records are equal, whatever key seals their payload.
func (r *Record) same(o *Record) bool {
	a, b := *r, *o
	a.Payload, b.Payload = nil, nil
	return a.Stream == b.Stream && a.Seq == b.Seq && a.Clock == b.Clock && a.Token == b.Token && a.Kind == b.Kind &&
		a.Job == b.Job && a.Attempt == b.Attempt && a.Rank == b.Rank && a.Digest == b.Digest
}

// ReceiveFrom makes a copy of a stream that begins with first, because a snapshot of the
// table covers the records before it. Records held already are removed, unless they
// reach at least to first-1: then it does nothing.
func (l *Log) ReceiveFrom(id Stream, first uint64) error {
	if first == 0 {
		return fmt.Errorf("%w: a stream begins with 1", ErrGap)
	}
	s, err := l.find(id)
	if errors.Is(err, ErrNoStream) {
		_, err = l.add(id, first, flagBegins, nil)
		if !errors.Is(err, ErrStreamExists) {
			return err
		}
		s, err = l.find(id)
	}
	if err != nil {
		return err
	}
	s.write.Lock()
	defer s.write.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	e := s.end()
	switch {
	case s.gone:
		return fmt.Errorf("%w: %s", ErrNoStream, id)
	case e.Own:
		return fmt.Errorf("%w: receive %s, which this process writes", ErrFrozen, id)
	case e.Durable+1 >= first:
		return nil
	}
	if err := l.restartAt(s, first); err != nil {
		return l.setFailed("restart a stream after a snapshot", err)
	}
	return nil
}

// restartAt replaces all segments by one empty segment.
func (l *Log) restartAt(s *stream, first uint64) error {
	s.prune.Lock()
	defer s.prune.Unlock()
	if err := l.closeActive(s); err != nil {
		return err
	}
	g, f, err := l.newSegment(s, first, flagBegins)
	if err != nil {
		return err
	}
	s.active, s.allocated = f, g.size
	if err := l.openSegs.add(s); err != nil {
		return err
	}
	s.mu.Lock()
	old := s.segments
	s.segments, s.durable = []*segment{g}, first-1
	healed := s.damaged != 0 && s.durable >= s.damaged
	s.mu.Unlock()
	l.tails.drop(s.id)
	l.changed.Send()
	if healed {
		if err := l.clearDamage(s); err != nil {
			return err
		}
	}
	l.log.Warn("stream restarted after a snapshot", "stream", s.id.String(), "first", first)
	return l.removeSegments(s, old)
}
