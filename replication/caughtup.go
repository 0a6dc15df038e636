package replication

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	holdsTimeout = time.Second
	holdsAgain   = 100 * time.Millisecond
)

// awaitCaughtUp asks the living nodes themselves: marks may be late.
func (r *Replication) awaitCaughtUp(ctx context.Context, s journal.Stream) error {
	asked := map[string]bool{}
	for {
		changed := r.ledger.watch()
		_, living := r.members(func(m Member) bool { return m.Heard })
		all := r.askHolders(ctx, s, living, asked)
		if all {
			names := make([]string, 0, len(living))
			for _, m := range living {
				names = append(names, m.Node)
			}
			if r.CaughtUp(s, names) {
				return nil
			}
		}
		again := time.NewTimer(holdsAgain)
		select {
		case <-ctx.Done():
			again.Stop()
			return fmt.Errorf("catch up with stream %s: %w", s, ctx.Err())
		case <-changed:
			again.Stop()
		case <-again.C:
		}
	}
}

// askHolders asks each living node once and reports whether all have answered.
// What they say counts as their marks.
func (r *Replication) askHolders(ctx context.Context, s journal.Stream, living []Member, asked map[string]bool) bool {
	var mu sync.Mutex // guards asked
	var wg sync.WaitGroup
	for _, m := range living {
		if m.Node == r.opts.Self || asked[m.Node] {
			continue
		}
		wg.Go(func() {
			told, err := r.holds(ctx, m.Node, s)
			if err != nil {
				r.opts.Logger.Debug("a node doesn't say what it holds", "peer", m.Node, "stream", s, "err", err)
				return
			}
			r.ledger.hear(m.Node, told)
			mu.Lock()
			defer mu.Unlock()
			asked[m.Node] = true
		})
	}
	wg.Wait()
	for _, m := range living {
		if m.Node != r.opts.Self && !asked[m.Node] {
			return false
		}
	}
	return true
}

func (r *Replication) holds(ctx context.Context, node string, s journal.Stream) (Marks, error) {
	ctx, cancel := context.WithTimeout(ctx, holdsTimeout)
	defer cancel()
	conn, err := r.opts.Dial(node)
	if err != nil {
		return nil, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	got, err := replicationpb.NewReplicationClient(conn).Holds(ctx, &replicationpb.HoldsRequest{Format: wireFormat, Stream: wireStream(s)})
	if err != nil {
		return nil, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	return Marks{node: {Epoch: got.GetEpoch(), Ends: map[journal.Stream]uint64{s: got.GetSeq()}}}, nil
}

// Holds answers with what is on this node's disk.
func (s *server) Holds(ctx context.Context, q *replicationpb.HoldsRequest) (*replicationpb.HoldsResponse, error) {
	if _, err := s.caller(ctx, q.GetFormat()); err != nil {
		return nil, err
	}
	stream, err := readStream(q.GetStream())
	if err != nil {
		return nil, err
	}
	// The log knows before the ledger does, and never says too much.
	s.r.ledger.setOwn(durable(s.r.opts.Log.Ends()))
	s.r.ledger.mu.Lock()
	defer s.r.ledger.mu.Unlock()
	own := s.r.ledger.marks[s.r.opts.Self]
	return &replicationpb.HoldsResponse{Format: wireFormat, Seq: own.Ends[stream], Epoch: own.Epoch}, nil
}
