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
	// maxPages bounds the pages that are on their way.
	maxPages = 4
	// maxRow bounds a page of one row: a row has at most four submissions and
	// three results.
	maxRow = 8 * (journal.MaxPayload + 1<<20)
	// snapshotPause is how long a source waits with the next snapshot when one
	// didn't cover all that was missing, because its table is behind its journals.
	snapshotPause = time.Second
)

// snapshot is the table as it is sent to a puller that lacks trimmed records.
// The puller joins it to what it has. It begins at the first row in each call;
// rows that come twice change nothing.
type snapshot struct {
	covers map[journal.Stream]uint64 // what was applied before the first row was read
	after  journal.JobID
	page   uint64
	held   uint64 // by the puller, of the pages
}

func (s *snapshot) acked(page uint64) { s.held = max(s.held, min(page, s.page)) }

// sendSnapshot sends the next page, if streams wait for one.
func (c *source) sendSnapshot(ctx context.Context) (did bool, slow time.Duration, err error) {
	c.mu.Lock()
	if c.shot == nil && c.out.waiting() {
		c.mu.Unlock()
		if c.r.opts.Table.Partial() {
			// It would claim to cover what it lacks. The puller asks others meanwhile.
			return false, snapshotPause, nil
		}
		covers := c.r.opts.Table.AppliedAll()
		c.mu.Lock()
		c.shot = &snapshot{covers: covers} // only this goroutine makes them
		c.r.metrics.snapshots.Inc()
		c.r.opts.Logger.Warn("a peer lacks records that are trimmed here; it gets the table", "peer", c.peer)
	}
	shot := c.shot
	if shot == nil || shot.page-shot.held >= maxPages || ctx.Err() != nil {
		c.mu.Unlock()
		return false, 0, nil
	}
	shot.page++
	c.mu.Unlock()

	rows, last, more, err := c.r.opts.Table.Rows(shot.after, pageBytes)
	if err != nil {
		return false, 0, status.Error(codes.Unavailable, fmt.Sprintf("read the table: %v", err))
	}
	shot.after = last
	slow = c.r.bulk.take(len(rows))
	c.r.metrics.sent.Add(float64(len(rows)))
	for len(rows) > maxPiece {
		piece := &replicationpb.SnapshotPage{Page: shot.page, Rows: rows[:maxPiece], More: true}
		if err := c.stream.Send(&replicationpb.PullResponse{Format: wireFormat, Snapshot: piece}); err != nil {
			return true, slow, err
		}
		rows = rows[maxPiece:]
	}
	page := &replicationpb.SnapshotPage{Page: shot.page, Rows: rows}
	if !more {
		c.mu.Lock()
		page.Last, page.Covers = true, wireEnds(c.out.covered(shot.covers))
		c.shot = nil
		if c.out.waiting() {
			slow = max(slow, snapshotPause)
		}
		c.mu.Unlock()
	}
	return true, slow, c.stream.Send(&replicationpb.PullResponse{Format: wireFormat, Snapshot: page})
}

// rowsIntake merges a snapshot's pages, apart from the records that go on
// arriving meanwhile.
type rowsIntake struct {
	c       *session
	partial []byte // of the page that comes in pieces; the receiver's alone
	pages   chan *replicationpb.SnapshotPage
}

func newRowsIntake(c *session) *rowsIntake {
	return &rowsIntake{c: c, pages: make(chan *replicationpb.SnapshotPage, maxPages)}
}

func (in *rowsIntake) take(p *replicationpb.SnapshotPage) error {
	if p == nil {
		return nil
	}
	if len(in.partial)+len(p.GetRows()) > maxRow {
		return fmt.Errorf("%w: a page of a snapshot", errFlooded)
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
		return fmt.Errorf("%w: %d pages of a snapshot", errFlooded, maxPages)
	}
}

// merge joins pages until the session ends.
func (in *rowsIntake) merge() error {
	c := in.c
	for {
		var p *replicationpb.SnapshotPage
		select {
		case <-c.ctx.Done():
			return nil
		case p = <-in.pages:
		}
		if len(p.GetRows()) > 0 {
			if err := in.awaitKeys(p.GetRows()); err != nil {
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
		c.merged(p.GetPage())
	}
}

// awaitKeys waits until this node can open all of some rows: what covers them is
// acknowledged like the records themselves.
func (in *rowsIntake) awaitKeys(rows []byte) error {
	c := in.c
	for {
		_, rest, err := c.r.openable(rows)
		if err != nil || len(rest) == 0 {
			return err
		}
		first, _, err := journal.NextFrame(rest)
		if err != nil {
			return err
		}
		if err := c.r.awaitKey(c.ctx, first.Stream, c.source, rest); err != nil {
			return err
		}
		rows = rest
	}
}

// cover goes on with the streams after what the snapshot held of them.
func (in *rowsIntake) cover(p *replicationpb.SnapshotPage) error {
	c := in.c
	covers, err := readEnds(p.GetCovers())
	if err != nil {
		return err
	}
	for s, through := range covers {
		if e, ok := c.r.opts.Log.End(s); ok && (e.Own || e.Durable >= through) {
			c.stored(s)
			continue
		}
		// In this order: a journal that goes on after records which the table doesn't
		// know would lose them.
		if err := c.r.opts.Table.SetApplied(c.ctx, s, through); err != nil {
			return fmt.Errorf("go on with stream %s after a snapshot: %w", s, err)
		}
		if err := c.r.opts.Log.ReceiveFrom(s, through+1); err != nil && !errors.Is(err, journal.ErrFrozen) {
			return fmt.Errorf("go on with stream %s after a snapshot: %w", s, err)
		}
		c.r.opts.Logger.Warn("a stream goes on after what came as rows of the table", "stream", s.String(), "source", c.source, "through", through)
		c.r.metrics.skipped.Inc()
		c.r.advanced(map[journal.Stream]uint64{s: through})
		c.stored(s)
	}
	return nil
}
