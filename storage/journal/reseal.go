package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/dsnode/dsnode/storage/keyring"
)

// Carried returns how many records in segments are sealed with each data key. Such a key
// must not be dropped.
func (l *Log) Carried() map[keyring.KeyID]int64 {
	carried := map[keyring.KeyID]int64{}
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, s := range l.streams {
		s.mu.Lock()
		for _, g := range s.segments {
			for _, k := range g.sealed {
				carried[k.key] += k.records
			}
		}
		s.mu.Unlock()
	}
	return carried
}

// Reseal re-seals the payloads that are sealed with a key other than the ring's current
// one, a segment at a time. It closes a segment that is being written to first. It
// changes nothing else of the records. left is the number of records that it could not
// open. It is meant for the background: it reads and writes whole segments.
func (l *Log) Reseal(ctx context.Context, sealer *Sealer) (left int64, err error) {
	current, ok := sealer.ring.Current()
	if !ok {
		return 0, keyring.ErrNoDataKey
	}
	stale := func(g *segment) bool {
		return slices.ContainsFunc(g.sealed, func(k sealedWith) bool { return k.key != current && k.records > 0 })
	}
	l.mu.RLock()
	streams := l.all()
	l.mu.RUnlock()
	for _, s := range streams {
		s.mu.Lock()
		old := slices.DeleteFunc(slices.Clone(s.segments), func(g *segment) bool { return !stale(g) })
		s.mu.Unlock()
		for _, g := range old {
			if err := ctx.Err(); err != nil {
				return left, err
			}
			n, err := l.resealSegment(s, g, sealer)
			left += n
			if err != nil {
				return left, err
			}
		}
	}
	return left, nil
}

// resealSegment rewrites a segment. Its stream can be read and written meanwhile, but not
// trimmed.
func (l *Log) resealSegment(s *stream, g *segment, sealer *Sealer) (left int64, err error) {
	if l.space.aboveFloor(1) < g.size {
		return 0, fmt.Errorf("%w: re-seal %d MiB", ErrFull, g.size>>20)
	}
	if err := l.closeSegment(s, g); err != nil {
		return 0, err
	}
	s.prune.Lock()
	defer s.prune.Unlock()
	if err := l.usable(); err != nil {
		return 0, err
	}
	if l.trimmed(s, g) || s.isDropped() {
		return 0, nil
	}
	sealed, left, err := l.rewriteSealed(s, g, sealer)
	if err != nil {
		return 0, l.setFailed("re-seal "+g.path, err)
	}
	s.mu.Lock()
	g.sealed = sealed
	s.mu.Unlock()
	// The cached frames have the old seals; read from the file instead.
	l.tails.drop(s.id)
	if left > 0 {
		l.log.Warn("records are sealed with keys that this node does not know", "stream", s.id.String(), "records", left)
	}
	return left, nil
}

// closeSegment makes the stream's next records go to another segment.
func (l *Log) closeSegment(s *stream, g *segment) error {
	s.write.Lock()
	defer s.write.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	if s.gone || g != s.last() {
		return nil
	}
	if err := l.rotate(s); err != nil {
		return l.setFailed("close a segment", err)
	}
	return nil
}

func (l *Log) rewriteSealed(s *stream, g *segment, sealer *Sealer) (sealed []sealedWith, left int64, err error) {
	from, err := l.disk.open(g.path, os.O_RDONLY)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = from.Close() }() // only read from
	err = l.rewriteFile(g.path, func(to file) error {
		// Copy everything first: bytes between the frames stay as they are.
		if err := copyBytes(to, from, 0, g.size); err != nil {
			return err
		}
		_, err := walk(from, s.id, g.index[0].offset, g.size, func(at int64, frame []byte, r *Record) error {
			changed, err := sealer.Reseal(r)
			if errors.Is(err, keyring.ErrUnknownKey) {
				left++
				err = nil
			}
			if err != nil {
				return err
			}
			if len(r.Payload) > 0 {
				id, err := keyring.SealedWith(r.Payload)
				if err != nil {
					return err
				}
				sealed = count(sealed, id, 1)
			}
			if !changed {
				return nil
			}
			next, err := AppendFrame(nil, r)
			if err != nil {
				return err
			}
			if len(next) != len(frame) {
				return fmt.Errorf("%w: a re-sealed record has %d bytes, not %d", ErrDamaged, len(next), len(frame))
			}
			_, err = to.WriteAt(next, at)
			return err
		})
		return err
	})
	return sealed, left, err
}
