package replication

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	pageBytes = 512 << 10
	// maxPages bounds the unacknowledged pages.
	maxPages = 4
	// maxRow bounds a page with one row: a row has at most four submissions and three
	// results.
	maxRow = 8 * (journal.MaxPayload + 1<<20)
	// snapshotPause is how long a sender waits for its table to catch up with its journals
	// when a snapshot did not cover all missing records.
	snapshotPause = time.Second
)

// snapshot is the table as it is sent to a puller that lacks trimmed records. The puller
// merges it into its own table. Each call begins with the first row; merging a row again
// changes nothing.
type snapshot struct {
	covers map[journal.Stream]uint64 // the table's AppliedAll before the first row was read
	after  journal.JobID
	page   uint64
	held   uint64 // last page that the puller has acknowledged
}

func (s *snapshot) acked(page uint64) { s.held = max(s.held, min(page, s.page)) }

// sendSnapshot sends the next page if streams wait for a snapshot.
func (c *sender) sendSnapshot(ctx context.Context) (did bool, slow time.Duration, err error) {
	c.mu.Lock()
	if c.snapshot == nil && c.queue.anyParked() && !c.noSnapshots {
		c.mu.Unlock()
		if c.r.opts.Table.Partial() {
			// This table lacks rows that its AppliedAll includes. The puller asks other nodes.
			return false, snapshotPause, nil
		}
		covers := c.r.opts.Table.AppliedAll()
		c.mu.Lock()
		c.snapshot = &snapshot{covers: covers} // only this goroutine sets it
		c.r.metrics.snapshots.Inc()
		c.r.opts.Logger.Warn("a peer lacks records that are trimmed here; sending it a table snapshot", "peer", c.peer)
	}
	snap := c.snapshot
	if snap == nil || snap.page-snap.held >= maxPages || ctx.Err() != nil {
		c.mu.Unlock()
		return false, 0, nil
	}
	snap.page++
	c.mu.Unlock()

	rows, last, more, err := c.r.opts.Table.Rows(snap.after, pageBytes)
	if err != nil {
		return false, 0, status.Error(codes.Unavailable, fmt.Sprintf("read the table: %v", err))
	}
	snap.after = last
	slow = c.r.bulk.take(len(rows))
	c.r.metrics.sent.Add(float64(len(rows)))
	for piece, continues := range pieces(rows) {
		page := &replicationpb.SnapshotPage{Page: snap.page, Rows: piece, More: continues}
		if !continues && !more {
			c.mu.Lock()
			page.Last, page.Covers = true, wireEnds(c.queue.resumeAfter(snap.covers))
			c.snapshot = nil
			if c.queue.anyParked() {
				slow = max(slow, snapshotPause)
			}
			c.mu.Unlock()
		}
		if err := c.stream.Send(&replicationpb.PullResponse{Format: wireFormat, Snapshot: page}); err != nil {
			return true, slow, err
		}
	}
	return true, slow, nil
}

// rowReceiver merges the pages of snapshots, concurrently with the records that arrive.
type rowReceiver struct {
	c       *pullSession
	partial []byte // of a page in several messages; only the receiving goroutine uses it
	pages   chan *replicationpb.SnapshotPage
}

func (in *rowReceiver) take(p *replicationpb.SnapshotPage) error {
	if p == nil {
		return nil
	}
	if len(in.partial)+len(p.GetRows()) > maxRow {
		return fmt.Errorf("%w: a page of a snapshot", errWindowExceeded)
	}
	if p.GetMore() || len(in.partial) > 0 {
		in.partial = append(in.partial, p.GetRows()...)
		if p.GetMore() {
			return nil
		}
		p.Rows, in.partial = in.partial, nil
	}
	select {
	case in.pages <- p:
		return nil
	default:
		return fmt.Errorf("%w: %d pages of a snapshot", errWindowExceeded, maxPages)
	}
}

// merge merges pages until the session ends.
func (in *rowReceiver) merge() error {
	c := in.c
	for {
		var p *replicationpb.SnapshotPage
		select {
		case <-c.ctx.Done():
			return nil
		case p = <-in.pages:
		}
		if len(p.GetRows()) > 0 {
			if err := c.r.awaitKeys(c.ctx, c.source, p.GetRows()); err != nil {
				return err
			}
			if err := c.r.opts.Table.Merge(c.ctx, p.GetRows()); err != nil {
				return fmt.Errorf("merge a page of a snapshot: %w", err)
			}
		}
		if p.GetLast() {
			if err := in.cover(p); err != nil {
				return err
			}
		}
		c.acknowledgePage(p.GetPage())
	}
}

// awaitKeys waits until this node can open all of the rows, as for records: the rows are
// acknowledged like the records that they cover.
func (r *Replication) awaitKeys(ctx context.Context, source string, rows []byte) error {
	for {
		_, rest, err := r.openable(rows)
		if err != nil || len(rest) == 0 {
			return err
		}
		first, _, err := journal.NextFrame(rest)
		if err != nil {
			return err
		}
		if err := r.awaitKey(ctx, first.Stream, source, rest); err != nil {
			return err
		}
		rows = rest
	}
}

// cover continues the streams after the records that the snapshot covers.
func (in *rowReceiver) cover(p *replicationpb.SnapshotPage) error {
	c := in.c
	covers, err := readEnds(p.GetCovers())
	if err != nil {
		return err
	}
	for s, through := range covers {
		if e, ok := c.r.opts.Log.End(s); ok && (e.Own || e.Durable >= through) {
			c.acknowledge(s)
			continue
		}
		// In this order: if the journal continued after records that the table doesn't have,
		// they would be lost.
		if err := c.r.opts.Table.SetApplied(c.ctx, s, through); err != nil {
			return fmt.Errorf("resume stream %s after a snapshot: %w", s, err)
		}
		if err := c.r.opts.Log.ReceiveFrom(s, through+1); err != nil && !errors.Is(err, journal.ErrFrozen) {
			return fmt.Errorf("resume stream %s after a snapshot: %w", s, err)
		}
		c.r.opts.Logger.Warn("a stream resumes after records that arrived as rows of a table snapshot", "stream", s.String(), "source", c.source, "through", through)
		c.r.metrics.skipped.Inc()
		c.r.advanced(map[journal.Stream]uint64{s: through})
		c.acknowledge(s)
	}
	return nil
}
