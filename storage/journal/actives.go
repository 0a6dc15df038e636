package journal

import (
	"errors"
	"slices"
	"sync"
)

// maxActive bounds the segments that are open for writing. Beyond it the one
// that was opened first is closed; its stream opens it again when it needs it.
const maxActive = 64

type actives struct {
	mu    sync.Mutex // guards order
	order []*stream  // with an open segment, the longest open first
}

// add counts a stream that has just opened its segment; the caller holds its
// write lock.
func (a *actives) add(s *stream) error {
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

// closeActive closes a stream's open segment; the caller holds its write lock.
func (l *Log) closeActive(s *stream) error {
	if s.active == nil {
		return nil
	}
	a := &l.actives
	a.mu.Lock()
	a.order = slices.DeleteFunc(a.order, func(o *stream) bool { return o == s })
	a.mu.Unlock()
	var err error
	if g := s.last(); s.allocated > g.size && l.Err() == nil {
		err = s.active.Truncate(g.size) // the zeros in front of nothing
	}
	err = errors.Join(err, s.active.Close())
	s.active = nil
	return err
}
