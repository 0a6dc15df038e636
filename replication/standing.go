package replication

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

// standing is what a node says of its journals and its table.
type standing struct {
	epoch    uint64
	held     map[journal.Stream]uint64
	gone     map[journal.Stream]uint64 // what its table includes of streams that it doesn't hold
	partial  bool
	saysGone bool // false: an earlier version, gone is not known
	// writes are the streams of its own that it still writes. The others get no more records.
	writes     map[journal.Stream]bool
	saysWrites bool // false: an earlier version, writes is not known
	at         time.Duration
}

// tableHead is what a table's rows include, by what their sender says in front of them.
type tableHead struct {
	applied map[journal.Stream]uint64 // of the streams that the sender holds
	gone    map[journal.Stream]uint64 // of those that it no longer holds
	begins  map[journal.Stream]uint64 // the first record of each stream that it holds
}

func readTableHead(m *replicationpb.TableRows) (h tableHead, err error) {
	if h.applied, err = readEnds(m.GetApplied()); err != nil {
		return h, err
	}
	if h.gone, err = readEnds(m.GetGone()); err != nil {
		return h, err
	}
	h.begins, err = readEnds(m.GetBegins())
	return h, err
}

// askStandings asks nodes what they hold, all at once. Nodes that don't answer are missing.
func (r *Replication) askStandings(ctx context.Context, nodes []string) map[string]standing {
	answers := map[string]standing{}
	var mu sync.Mutex // guards answers
	var wg sync.WaitGroup
	for _, node := range nodes {
		wg.Go(func() {
			st, err := r.standing(ctx, node)
			if err != nil {
				r.opts.Logger.Debug("a node does not report what it holds", "peer", node, "err", err)
				return
			}
			r.tracker.merge(node, Watermarks{node: {Epoch: st.epoch, Ends: maps.Clone(st.held)}})
			mu.Lock()
			defer mu.Unlock()
			answers[node] = st
		})
	}
	wg.Wait()
	return answers
}

func (r *Replication) standing(ctx context.Context, node string) (standing, error) {
	ctx, cancel := context.WithTimeout(ctx, holdsTimeout)
	defer cancel()
	conn, err := r.opts.Dial(node)
	if err != nil {
		return standing{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	got, err := replicationpb.NewReplicationClient(conn).Holds(ctx, &replicationpb.HoldsRequest{Format: wireFormat})
	if err != nil {
		return standing{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	st := standing{
		epoch: got.GetEpoch(), partial: got.GetPartial(), saysGone: got.GetSaysGone(),
		writes: map[journal.Stream]bool{}, saysWrites: got.GetSaysWrites(),
	}
	if st.held, err = readEnds(got.GetHeld()); err == nil {
		st.gone, err = readEnds(got.GetGone())
	}
	if err != nil {
		return standing{}, fmt.Errorf("ask %s what it holds: %w", node, err)
	}
	for _, w := range got.GetWrites() {
		s, err := readStream(w)
		if err != nil {
			return standing{}, fmt.Errorf("ask %s what it writes: %w", node, err)
		}
		st.writes[s] = true
	}
	return st, nil
}

// Holds answers with what is on this node's disk.
func (s *server) Holds(ctx context.Context, q *replicationpb.HoldsRequest) (*replicationpb.HoldsResponse, error) {
	if _, err := s.caller(ctx, q.GetFormat()); err != nil {
		return nil, err
	}
	// Before the rest: a table that becomes complete meanwhile is reported as partial.
	partial := s.r.opts.Table.Partial()
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
	return &replicationpb.HoldsResponse{
		Format: wireFormat, Held: wireEnds(own), Epoch: s.r.tracker.epoch(s.r.opts.Self),
		Gone: wireEnds(s.r.gone()), SaysGone: true, Partial: partial, Writes: writes, SaysWrites: true,
	}, nil
}

// gone returns what the table includes of streams that this node doesn't hold.
func (r *Replication) gone() map[journal.Stream]uint64 {
	// In this order: the journal has a stream before the table has.
	all, held := r.opts.Table.AppliedAll(), r.opts.Log.Ends()
	gone := map[journal.Stream]uint64{}
	for s, seq := range all {
		if _, holds := held[s]; !holds && len(gone) < maxGone {
			gone[s] = seq
		}
	}
	return gone
}

// Table sends all rows of this node's table.
func (s *server) Table(q *replicationpb.TableRequest, stream grpc.ServerStreamingServer[replicationpb.TableRows]) error {
	if _, err := s.caller(stream.Context(), q.GetFormat()); err != nil {
		return err
	}
	ctx, leave, err := s.r.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	if err := s.r.awaitApplied(ctx); err != nil {
		return err
	}
	// Before the first row is read: later rows may include more, but not less.
	m := s.r.tableHead()
	after := journal.JobID{}
	for more := true; more; {
		var rows []byte
		if rows, after, more, err = s.r.opts.Table.Rows(after, pageBytes); err != nil {
			return status.Error(codes.Unavailable, fmt.Sprintf("read the table: %v", err))
		}
		if !pause(ctx, s.r.bulk.take(len(rows))) {
			return status.Error(codes.Unavailable, "the call was cancelled")
		}
		s.r.metrics.sent.Add(float64(len(rows)))
		for piece, more := range pieces(rows) {
			m.Rows, m.More = piece, more
			if err := stream.Send(m); err != nil {
				return err
			}
			m = &replicationpb.TableRows{Format: wireFormat}
		}
	}
	return nil
}

func (r *Replication) tableHead() *replicationpb.TableRows {
	m := &replicationpb.TableRows{Format: wireFormat, Partial: r.opts.Table.Partial(), Jobs: uint64(max(0, r.opts.Table.Jobs()))}
	// gone is read last: a stream that is dropped meanwhile is in one of the two at least.
	m.Applied, m.Gone = wireEnds(r.applied()), wireEnds(r.gone())
	begins := map[journal.Stream]uint64{}
	for s, e := range r.opts.Log.Ends() {
		begins[s] = e.First
	}
	m.Begins = wireEnds(begins)
	return m
}

// awaitApplied waits until the table includes all records that were durable when it was
// called. Otherwise a record that a peer trims because this node holds it could be missing
// from the rows.
func (r *Replication) awaitApplied(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, appliedWait)
	defer cancel()
	for s, seq := range durable(r.opts.Log.Ends()) {
		for r.opts.Table.Applied(s) < seq {
			if !pause(ctx, appliedAgain) {
				return status.Error(codes.Unavailable, "this node's table is behind its journals")
			}
		}
	}
	return nil
}
