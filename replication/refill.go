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
	refillAgain = time.Second
	// refillStall bounds how long a peer's rows stand still.
	refillStall = 30 * time.Second
	// appliedWait bounds how long a table may be behind its journals.
	appliedWait  = 10 * time.Second
	appliedAgain = 50 * time.Millisecond
)

var errPartial = status.Error(codes.Unavailable, "this node's table was damaged and is made anew")

// refill makes a table whole that was discarded; it ends at once for any other.
// The journals are applied before Run; rows of what they had trimmed stand in other
// nodes' tables alone. With all rows of one node whose table is whole and goes
// as far as what was trimmed here, it is whole. With those of every other member
// nobody has more, whatever was lost: that is what a lone node starts with.
//
// Digests would not do: under load no two nodes have applied the same for long,
// and nearly all buckets differ, each of which costs reading the whole table.
func (r *Replication) refill(ctx context.Context) error {
	f := refill{r: r, joined: map[string]bool{}, said: map[string]string{}}
	before := ""
	for r.opts.Table.Partial() {
		from, whole := f.join(ctx)
		others := f.others()
		now := fmt.Sprint(others)
		switch {
		case whole:
			r.opts.Logger.Warn("the job table that was damaged has all rows again", "from", from)
		// Twice: the first look after a start can be at members of long ago.
		case r.opts.Current() && f.all(others) && now == before:
			r.opts.Logger.Error("the job table that was damaged has what this node's journals and all other nodes hold; nobody can know whether older jobs are lost",
				"other_nodes", others)
		default:
			before = now
			if !pause(ctx, refillAgain) {
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

type refill struct {
	r      *Replication
	joined map[string]bool   // nodes whose rows are all here
	said   map[string]string // why those of a node are not
}

func (f *refill) others() []string {
	var others []string
	for _, m := range f.r.opts.Members() {
		if m.Node != f.r.opts.Self {
			others = append(others, m.Node)
		}
	}
	slices.Sort(others)
	return others
}

func (f *refill) all(others []string) bool {
	return !slices.ContainsFunc(others, func(node string) bool { return !f.joined[node] })
}

// join takes the tables of the nodes that are heard, until one of them was all
// that is needed.
func (f *refill) join(ctx context.Context) (from string, whole bool) {
	_, heard := f.r.members(func(m Member) bool { return m.Heard })
	for _, m := range heard {
		if m.Node == f.r.opts.Self {
			continue
		}
		whole, err := f.r.joinTable(ctx, m.Node, f.joined[m.Node])
		if err == nil {
			f.joined[m.Node] = true
		} else if ctx.Err() == nil && f.said[m.Node] != err.Error() {
			f.said[m.Node] = err.Error()
			f.r.opts.Logger.Warn("the rows that this node's job table lacks don't come; it is tried again", "peer", m.Node, "err", err)
		}
		if whole {
			return m.Node, true
		}
	}
	return "", false
}

// joinTable merges all rows of a peer's table, and says whether nothing can be
// missing then. When that can't be and the peer's rows were merged before, it
// leaves them.
func (r *Replication) joinTable(ctx context.Context, peer string, before bool) (whole bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stalled := time.AfterFunc(refillStall, cancel)
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
	whole = !m.GetPartial() && r.reaches(applied)
	if before && !whole {
		return false, nil
	}
	r.opts.Logger.Info("taking the rows of a peer's job table", "peer", peer, "enough", whole)
	var page []byte
	for {
		if page = append(page, m.GetRows()...); len(page) > maxRow {
			return false, fmt.Errorf("%w: a page of the table of %s", errFlooded, peer)
		}
		if !m.GetMore() && len(page) > 0 {
			if err := r.opts.Table.Merge(ctx, page); err != nil {
				return false, fmt.Errorf("merge rows of %s: %w", peer, err)
			}
			page = nil
		}
		stalled.Reset(refillStall)
		if m, err = stream.Recv(); errors.Is(err, io.EOF) {
			return whole, nil
		} else if err != nil {
			return false, fmt.Errorf("receive the table of %s: %w", peer, err)
		}
	}
}

// reaches reports whether a table that had applied so much holds all that was
// trimmed here.
func (r *Replication) reaches(applied map[journal.Stream]uint64) bool {
	for s, e := range r.opts.Log.Ends() {
		if e.First > applied[s]+1 && (r.opts.Retired == nil || !r.opts.Retired(s)) {
			return false
		}
	}
	return true
}

// Table gives all rows, of all that is on this node's disk.
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
	// Both before the first row is read: more may come in, nothing goes.
	m := &replicationpb.TableRows{Format: wireFormat, Applied: wireEnds(s.r.applied()), Partial: s.r.opts.Table.Partial()}
	after := journal.JobID{}
	for more := true; more; {
		var rows []byte
		if rows, after, more, err = s.r.opts.Table.Rows(after, pageBytes); err != nil {
			return status.Error(codes.Unavailable, fmt.Sprintf("read the table: %v", err))
		}
		if !pause(ctx, s.r.bulk.take(len(rows))) {
			return status.Error(codes.Unavailable, "the call was given up")
		}
		s.r.metrics.sent.Add(float64(len(rows)))
		for len(rows) > maxPiece {
			m.Rows, m.More, rows = rows[:maxPiece], true, rows[maxPiece:]
			if err := stream.Send(m); err != nil {
				return err
			}
			m = &replicationpb.TableRows{Format: wireFormat}
		}
		m.Rows, m.More = rows, false
		if err := stream.Send(m); err != nil {
			return err
		}
		m = &replicationpb.TableRows{Format: wireFormat}
	}
	return nil
}

// awaitApplied waits until the table has all that was on the disk when it was
// called: what a peer lets go because this node holds it must not be between the two.
func (r *Replication) awaitApplied(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, appliedWait)
	defer cancel()
	for s, seq := range durable(r.opts.Log.Ends()) {
		for r.opts.Table.Applied(s) < seq {
			if !pause(ctx, appliedAgain) {
				return status.Error(codes.Unavailable, "the table is behind the journals")
			}
		}
	}
	return nil
}
