package replication

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	rebuildRetry = time.Second
	// rebuildStall bounds the time without any rows from a peer.
	rebuildStall = 30 * time.Second
	// appliedWait bounds the wait for a table that is behind its journals.
	appliedWait  = 10 * time.Second
	appliedAgain = 50 * time.Millisecond
)

var errPartial = status.Error(codes.Unavailable, "this node's table was damaged and is being rebuilt")

// rebuildTable completes a table that was discarded; for any other it returns at once.
// The journals were applied before Run. The rows of records that they had trimmed exist
// only in other nodes' tables. The table is whole when it has all rows of one node whose
// table is whole and includes everything that was trimmed here. With the rows of every
// other member it has all that still exists, even if records were lost; that is the case
// of a node without peers.
//
// Comparing digests is not enough: under load two nodes rarely have applied the same
// records, and nearly all buckets differ, each of which costs reading the whole table.
func (r *Replication) rebuildTable(ctx context.Context) error {
	f := rebuild{r: r, joined: map[string]bool{}, lastErrors: map[string]string{}}
	before := ""
	for r.opts.Table.Partial() {
		from, whole := f.join(ctx)
		others := f.others()
		now := fmt.Sprint(others)
		switch {
		case whole:
			r.opts.Logger.Warn("the job table has been rebuilt and is complete", "from", from)
		// Check twice: right after a start, Members may be an old list.
		case r.opts.Current() && f.allJoined(others) && now == before:
			r.opts.Logger.Error("the job table has been rebuilt from this node's journals and all other nodes; older jobs may be lost",
				"other_nodes", others)
		default:
			before = now
			if !pause(ctx, rebuildRetry) {
				return nil
			}
			continue
		}
		if err := r.opts.Table.SetWhole(); err != nil {
			return err
		}
	}
	return nil
}

type rebuild struct {
	r          *Replication
	joined     map[string]bool   // nodes whose rows have all been merged
	lastErrors map[string]string // by node; to log each error once
}

func (f *rebuild) others() []string {
	var others []string
	for _, m := range f.r.opts.Members() {
		if m.Node != f.r.opts.Self {
			others = append(others, m.Node)
		}
	}
	slices.Sort(others)
	return others
}

func (f *rebuild) allJoined(others []string) bool {
	return !slices.ContainsFunc(others, func(node string) bool { return !f.joined[node] })
}

// join merges the tables of the nodes that are heard, until one of them makes this
// node's table whole.
func (f *rebuild) join(ctx context.Context) (from string, whole bool) {
	_, heard := f.r.members(func(m Member) bool { return m.Heard })
	for _, m := range heard {
		if m.Node == f.r.opts.Self {
			continue
		}
		whole, err := f.r.joinTable(ctx, m.Node, f.joined[m.Node])
		if err == nil {
			f.joined[m.Node] = true
		} else if ctx.Err() == nil && f.lastErrors[m.Node] != err.Error() {
			f.lastErrors[m.Node] = err.Error()
			f.r.opts.Logger.Warn("can't get the job table of a peer for the rebuild; retrying", "peer", m.Node, "err", err)
		}
		if whole {
			return m.Node, true
		}
	}
	return "", false
}

// joinTable merges all rows of a peer's table, and reports whether this node's table is
// whole then. It skips a peer that can't achieve that and whose rows were merged before.
func (r *Replication) joinTable(ctx context.Context, peer string, before bool) (whole bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stalled := time.AfterFunc(rebuildStall, cancel)
	defer stalled.Stop()
	conn, err := r.opts.Dial(peer)
	if err != nil {
		return false, fmt.Errorf("ask %s for its table: %w", peer, err)
	}
	stream, err := replicationpb.NewReplicationClient(conn).Table(ctx, &replicationpb.TableRequest{Format: wireFormat})
	if err != nil {
		return false, fmt.Errorf("ask %s for its table: %w", peer, err)
	}
	m, err := stream.Recv()
	if err != nil {
		return false, fmt.Errorf("ask %s for its table: %w", peer, err)
	}
	applied, err := readEnds(m.GetApplied())
	if err != nil {
		return false, fmt.Errorf("table of %s: %w", peer, err)
	}
	whole = !m.GetPartial() && r.coversTrimmed(applied)
	if before && !whole {
		return false, nil
	}
	r.opts.Logger.Info("receiving the rows of a peer's job table", "peer", peer, "enough", whole)
	var page []byte
	for {
		if page = append(page, m.GetRows()...); len(page) > maxRow {
			return false, fmt.Errorf("%w: a page of the table of %s", errWindowExceeded, peer)
		}
		if !m.GetMore() && len(page) > 0 {
			if err := r.opts.Table.Merge(ctx, page); err != nil {
				return false, fmt.Errorf("merge rows of %s: %w", peer, err)
			}
			page = nil
		}
		stalled.Reset(rebuildStall)
		if m, err = stream.Recv(); errors.Is(err, io.EOF) {
			return whole, nil
		} else if err != nil {
			return false, fmt.Errorf("receive the table of %s: %w", peer, err)
		}
	}
}

// coversTrimmed reports whether a table that has applied these records includes everything
// that was trimmed on this node.
func (r *Replication) coversTrimmed(applied map[journal.Stream]uint64) bool {
	for s, e := range r.opts.Log.Ends() {
		if e.First > applied[s]+1 && !r.opts.Retired(s) {
			return false
		}
	}
	return true
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
	m := &replicationpb.TableRows{Format: wireFormat, Applied: wireEnds(s.r.applied()), Partial: s.r.opts.Table.Partial()}
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
