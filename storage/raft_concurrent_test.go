package storage

import (
	"errors"
	"testing"

	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
)

// Raft appends from its main loop while its replication reads, its snapshot loop
// compacts, and votes are stored.
func TestConcurrentAppendReadCompactAndVote(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	s := openRaft(t, t.TempDir())
	const last = 600
	mustStore(t, s, entry(1, 1))
	done := make(chan struct{})
	var g errgroup.Group
	g.Go(func() error {
		defer close(done)
		for i := uint64(2); i <= last; i += 3 {
			if err := s.StoreLogs(entriesFrom(i, i+2, 1)); err != nil {
				return err
			}
		}
		return nil
	})
	// during repeats do until the appending ends.
	during := func(do func(first, last uint64) error) {
		g.Go(func() error {
			for {
				select {
				case <-done:
					return nil
				default:
				}
				e := *s.entries.Load()
				if err := do(e.first, e.last); err != nil {
					return err
				}
			}
		})
	}
	for range 2 {
		during(func(first, last uint64) error {
			for i := first; i <= last; i++ {
				var l raft.Log
				err := s.GetLog(i, &l)
				if errors.Is(err, raft.ErrLogNotFound) && i < s.entries.Load().last {
					continue // compacted meanwhile
				}
				if err != nil {
					return err
				}
				if !sameEntry(&l, entry(i, 1)) {
					return errors.New("another entry than was stored")
				}
			}
			return nil
		})
	}
	during(func(first, last uint64) error {
		if last-first < 100 {
			return nil
		}
		return s.DeleteRange(first, first+20)
	})
	during(func(_, last uint64) error { return s.SetUint64([]byte("CurrentTerm"), last) })
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if s.entries.Load().last < last {
		t.Fatal("the last entry was not stored")
	}
	closeRaft(t, s)
}
