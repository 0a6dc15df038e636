package replication

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	holdsTimeout = 2 * time.Second
	holdsAgain   = 250 * time.Millisecond
)

// AwaitCaughtUp asks every living node what it holds, and blocks until this one
// holds as much, of all streams: what an earlier owner wrote of a stream's jobs
// stands in streams of its own. Nodes that cease to be heard are not waited for. A
// table that was made anew has to be whole. The error is that of ctx.
func (r *Replication) AwaitCaughtUp(ctx context.Context) error {
	told := map[string]map[journal.Stream]uint64{}
	for {
		changed := r.ledger.watch()
		_, living := r.members(func(m Member) bool { return m.Heard })
		r.askHolders(ctx, living, told)
		if r.caughtUp(living, told) && !r.opts.Table.Partial() {
			return nil
		}
		again := time.NewTimer(holdsAgain)
		select {
		case <-ctx.Done():
			again.Stop()
			return fmt.Errorf("catch up with other nodes: %w", ctx.Err())
		case <-changed:
			again.Stop()
		case <-again.C:
		}
	}
}

// caughtUp reports whether all living nodes have told what they held when they
// were asked, and this one holds it. Streams that were given up don't count.
func (r *Replication) caughtUp(living []Member, told map[string]map[journal.Stream]uint64) bool {
	own := r.opts.Log.Ends()
	for _, m := range living {
		if m.Node == r.opts.Self {
			continue
		}
		ends, asked := told[m.Node]
		if !asked {
			return false
		}
		for s, seq := range ends {
			if own[s].Durable < seq && (r.opts.Retired == nil || !r.opts.Retired(s)) {
				return false
			}
		}
	}
	return true
}

// askHolders asks each living node that has not told yet.
func (r *Replication) askHolders(ctx context.Context, living []Member, told map[string]map[journal.Stream]uint64) {
	answers := map[string]map[journal.Stream]uint64{}
	var mu sync.Mutex // guards answers
	var wg sync.WaitGroup
	for _, m := range living {
		if _, asked := told[m.Node]; asked || m.Node == r.opts.Self {
			continue
		}
		wg.Go(func() {
			held, err := r.holds(ctx, m.Node)
			if err != nil {
				r.opts.Logger.Debug("a node doesn't say what it holds", "peer", m.Node, "err", err)
				return
			}
			r.ledger.hear(m.Node, Marks{m.Node: {Epoch: held.Epoch, Ends: maps.Clone(held.Ends)}})
			mu.Lock()
			defer mu.Unlock()
			answers[m.Node] = held.Ends
		})
	}
	wg.Wait()
	maps.Copy(told, answers)
}

func (r *Replication) holds(ctx context.Context, node string) (Held, error) {
	ctx, cancel := context.WithTimeout(ctx, holdsTimeout)
	defer cancel()
	conn, err := r.opts.Dial(node)
	if err != nil {
		return Held{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	got, err := replicationpb.NewReplicationClient(conn).Holds(ctx, &replicationpb.HoldsRequest{Format: wireFormat})
	if err != nil {
		return Held{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	ends, err := readEnds(got.GetHeld())
	if err != nil {
		return Held{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	return Held{Epoch: got.GetEpoch(), Ends: ends}, nil
}

// Holds answers with what is on this node's disk.
func (s *server) Holds(ctx context.Context, q *replicationpb.HoldsRequest) (*replicationpb.HoldsResponse, error) {
	if _, err := s.caller(ctx, q.GetFormat()); err != nil {
		return nil, err
	}
	// The log knows before the ledger does, and never says too much.
	own := durable(s.r.opts.Log.Ends())
	s.r.ledger.setOwn(own)
	s.r.ledger.mu.Lock()
	defer s.r.ledger.mu.Unlock()
	return &replicationpb.HoldsResponse{Format: wireFormat, Held: wireEnds(own), Epoch: s.r.ledger.marks[s.r.opts.Self].Epoch}, nil
}
