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

// AwaitCaughtUp asks every living node what it holds, and blocks until this node holds as
// much, of all streams: an earlier owner of a stream has written records about its jobs to
// other streams. It does not wait for nodes that are no longer heard. A table that is being
// rebuilt must be whole first. The error is that of ctx.
func (r *Replication) AwaitCaughtUp(ctx context.Context) error {
	_, err := r.awaitReported(ctx)
	return err
}

// AwaitEnded blocks like AwaitCaughtUp. Then ended tells of which streams this node holds
// all that their origin will ever write to them: the origin was asked, and no longer writes
// them. It is false for streams of origins that are not heard.
func (r *Replication) AwaitEnded(ctx context.Context) (ended func(journal.Stream) bool, err error) {
	reported, err := r.awaitReported(ctx)
	if err != nil {
		return nil, err
	}
	return func(s journal.Stream) bool {
		of, asked := reported[s.Origin]
		return asked && of.saysWrites && !of.writes[s]
	}, nil
}

// report is what a node says it holds, and which of its own streams it still writes.
type report struct {
	Held
	writes     map[journal.Stream]bool
	saysWrites bool // false: a version that doesn't say
}

func (r *Replication) awaitReported(ctx context.Context) (map[string]report, error) {
	reported := map[string]report{}
	for {
		changed := r.tracker.changed.Next()
		_, living := r.members(func(m Member) bool { return m.Heard })
		r.askHolders(ctx, living, reported)
		if r.caughtUp(living, reported) && !r.opts.Table.Partial() {
			return reported, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("catch up with other nodes: %w", ctx.Err())
		case <-changed:
		case <-time.After(holdsAgain):
		}
	}
}

// NotFollowed are the living nodes whose journals this node has not followed to their end since
// its start.
func (r *Replication) NotFollowed() []string {
	var nodes []string
	for _, m := range r.opts.Members() {
		if m.Heard && m.Node != r.opts.Self {
			nodes = append(nodes, m.Node)
		}
	}
	return r.fresh.lacking(nodes)
}

// caughtUp reports whether all living nodes have reported what they hold, and this node
// holds it too. Retired streams don't count.
func (r *Replication) caughtUp(living []Member, reported map[string]report) bool {
	own := r.opts.Log.Ends()
	for _, m := range living {
		if m.Node == r.opts.Self {
			continue
		}
		of, asked := reported[m.Node]
		if !asked {
			return false
		}
		for s, seq := range of.Ends {
			if own[s].Durable < seq && !r.opts.Retired(s) {
				return false
			}
		}
	}
	return true
}

// askHolders asks the living nodes that have not answered yet.
func (r *Replication) askHolders(ctx context.Context, living []Member, reported map[string]report) {
	answers := map[string]report{}
	var mu sync.Mutex // guards answers
	var wg sync.WaitGroup
	for _, m := range living {
		if _, asked := reported[m.Node]; asked || m.Node == r.opts.Self {
			continue
		}
		wg.Go(func() {
			held, err := r.holds(ctx, m.Node)
			if err != nil {
				r.opts.Logger.Debug("a node does not report what it holds", "peer", m.Node, "err", err)
				return
			}
			r.tracker.merge(m.Node, Watermarks{m.Node: {Epoch: held.Epoch, Ends: maps.Clone(held.Ends)}})
			mu.Lock()
			defer mu.Unlock()
			answers[m.Node] = held
		})
	}
	wg.Wait()
	maps.Copy(reported, answers)
}

func (r *Replication) holds(ctx context.Context, node string) (report, error) {
	ctx, cancel := context.WithTimeout(ctx, holdsTimeout)
	defer cancel()
	conn, err := r.opts.Dial(node)
	if err != nil {
		return report{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	got, err := replicationpb.NewReplicationClient(conn).Holds(ctx, &replicationpb.HoldsRequest{Format: wireFormat})
	if err != nil {
		return report{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	ends, err := readEnds(got.GetHeld())
	if err != nil {
		return report{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	of := report{Held: Held{Epoch: got.GetEpoch(), Ends: ends}, writes: map[journal.Stream]bool{}, saysWrites: got.GetSaysWrites()}
	for _, w := range got.GetWrites() {
		s, err := readStream(w)
		if err != nil {
			return report{}, fmt.Errorf("ask %s what it writes: %w", node, err)
		}
		of.writes[s] = true
	}
	return of, nil
}

// Holds answers with what is on this node's disk.
func (s *server) Holds(ctx context.Context, q *replicationpb.HoldsRequest) (*replicationpb.HoldsResponse, error) {
	if _, err := s.caller(ctx, q.GetFormat()); err != nil {
		return nil, err
	}
	// The log is ahead of the tracker, but never of the disk.
	ends := s.r.opts.Log.Ends()
	own := durable(ends)
	var writes []*replicationpb.Stream
	for st, e := range ends {
		if e.Writing {
			writes = append(writes, wireStream(st))
		}
	}
	s.r.tracker.setOwn(own)
	s.r.tracker.mu.Lock()
	defer s.r.tracker.mu.Unlock()
	return &replicationpb.HoldsResponse{
		Format: wireFormat, Held: wireEnds(own), Epoch: s.r.tracker.marks[s.r.opts.Self].Epoch, Writes: writes, SaysWrites: true,
	}, nil
}
