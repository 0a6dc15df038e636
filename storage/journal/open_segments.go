package journal

import (
	"errors"
	"slices"
	"sync"
)

// maxActive bounds the segments that are open for writing. Beyond it, the one that
// was opened first is closed; its stream reopens it when needed.
const maxActive = 64

type openSegments struct {
	mu    sync.Mutex // guards order
	order []*stream  // streams with an open segment, the first opened first
}

// add registers a stream that has just opened its segment. The caller holds its
// write lock.
func (a *openSegments) add(s *stream) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.order = append(a.order, s)
	for i := 0; i < len(a.order) && len(a.order) > maxActive; {
		old := a.order[i]
		if old == s || !old.write.TryLock() { // it is being written to
			i++
			continue
		}
		err := old.active.Close()
		old.active = nil
		old.write.Unlock()
		a.order = slices.Delete(a.order, i, i+1)
		if err != nil {
			return err
		}
	}
	return nil
}

// closeActive closes a stream's open segment. The caller holds its write lock.
func (l *Log) closeActive(s *stream) error {
	if s.active == nil {
		return nil
	}
	a := &l.openSegs
	a.mu.Lock()
	a.order = slices.DeleteFunc(a.order, func(o *stream) bool { return o == s })
	a.mu.Unlock()
	var err error
	if g := s.last(); s.allocated > g.size && l.Err() == nil {
		err = s.active.Truncate(g.size) // remove the zeros written ahead
	}
	err = errors.Join(err, s.active.Close())
	s.active = nil
	return err
}
