package jobtable

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/notify"
)

// A table whose file is damaged goes on with an empty file, in the same process: its content
// exists in the journals and at other nodes. What found the damage, a call or a commit, waits
// until the committer has replaced the file, and is repeated. Then the table is Partial, so
// nobody takes a missing row for a job that does not exist. KeepFilled fills the file from the
// journals; the rows of other nodes come as for every partial table.

// damaged handles an error of a read that began while the file had that number. It returns
// nil when the read can be repeated, because there is another file. The caller holds no lock.
func (t *Table) damaged(what string, cause error, number uint64) error {
	if cause = asDamaged(cause); !isDamage(cause) {
		return cause
	}
	if !t.committing.Load() { // nobody can replace the file
		return t.setFailed(what, cause)
	}
	t.mu.Lock()
	if t.number.Load() == number && t.damage == nil {
		t.damage = fmt.Errorf("%s: %w", what, cause)
	}
	t.mu.Unlock()
	for {
		replaced := t.replaced.Next()
		if t.number.Load() != number {
			return nil
		}
		if !t.committing.Load() {
			return ErrClosed
		}
		notify.Wake(t.urgent)
		select {
		case <-replaced:
		case <-t.failed:
			return t.usable()
		}
	}
}

// isDamage reports whether an error is about the content of the file. A row of a format that
// is not known is damage too: Open refuses a file of a later version as a whole.
func isDamage(err error) bool { return errors.Is(err, ErrDamaged) || errors.Is(err, ErrNewerFormat) }

// found returns the damage that a read has found, if any.
func (t *Table) found() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.damage
}

// replaceFile goes on with an empty file. Rows of the overlay stay, and are written to it by
// the next commit. Only the committer calls it.
func (t *Table) replaceFile(cause error) error {
	began := time.Now()
	t.metrics.rebuilds.Inc()
	t.o.Logger.Error("the job table is damaged; going on with an empty file, which is filled from the journals and from other nodes", "err", cause)
	// A crash from here on: Open finds no file, or says ErrDamaged.
	if err := notePartial(t.o.Dir); err != nil {
		return err
	}
	t.now.State = boltfile.MarkDamaged
	if err := markFormat.Write(t.mark, t.now); err != nil {
		return err
	}
	// Before any row goes, so that a reader who misses one knows why.
	t.partial.Store(true)
	// No change is under way while all stripes are locked, and no transaction while the
	// file is: the overlay, the counts and the file change together.
	for i := range t.stripes {
		t.stripes[i].mu.Lock()
		defer t.stripes[i].mu.Unlock()
	}
	t.file.Lock()
	defer t.file.Unlock()
	go closeDamaged(t.db)
	_ = t.mark.Close() // what it says was written above
	t.db, t.mark = nil, nil
	if err := Discard(t.o.Dir); err != nil {
		return err
	}
	for i := range t.counts {
		t.counts[i].Store(0)
	}
	t.mu.Lock()
	clear(t.live)
	for _, p := range t.streams {
		p.durable = 0
	}
	t.rebuilding = true
	t.mu.Unlock()
	t.proven.Store(false)
	if err := t.openFile(); err != nil {
		return fmt.Errorf("make an empty %s: %w", filepath.Join(t.o.Dir, File), err)
	}
	for i := range t.stripes {
		for _, e := range t.stripes[i].entries {
			e.inFile = false
			t.recount(&state{}, &e.state)
		}
	}
	t.mu.Lock()
	t.number.Add(1)
	t.damage = nil
	t.mu.Unlock()
	t.replaced.Send()
	notify.Wake(t.refill)
	t.o.Logger.Warn("the job table has an empty file now", "took", time.Since(began))
	return nil
}

// closeDamaged closes a file whose content is damaged. bbolt may wait for ever for a
// transaction that it could not end.
func closeDamaged(db *bbolt.DB) {
	var err error
	defer boltfile.Contain(&err, false)
	err = db.Close() // the file is deleted: its error tells nothing
}

// Rebuilding reports whether the file is a new one that still lacks records of this node's
// journals. The table is Partial then, and SetWhole does nothing.
func (t *Table) Rebuilding() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rebuilding
}

// Journals are what KeepFilled reads.
type Journals interface {
	Ends() map[journal.Stream]journal.End
	End(s journal.Stream) (journal.End, bool)
	Replay(s journal.Stream, from uint64, fn func([]journal.Record) error) error
}

// KeepFilled fills the file with the records of all journals each time that it was replaced,
// until ctx ends. Records of journals that can't be read are left out: other nodes have them.
func (t *Table) KeepFilled(ctx context.Context, from Journals) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.refill:
		}
		if err := t.fillFrom(ctx, from); err != nil && ctx.Err() == nil {
			return fmt.Errorf("fill the job table from the journals: %w", err)
		}
	}
}

func (t *Table) fillFrom(ctx context.Context, from Journals) error {
	began, number := time.Now(), t.number.Load()
	for s, end := range from.Ends() {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := from.Replay(s, end.First, t.joinAll)
		if unusable := t.usable(); unusable != nil {
			return unusable
		}
		if err != nil && ctx.Err() == nil {
			t.o.Logger.Error("can't fill the job table from a journal; other nodes have to send its jobs", "stream", s.String(), "err", err)
		}
	}
	t.mu.Lock()
	if t.number.Load() != number {
		t.mu.Unlock()
		return nil // the file was replaced again meanwhile, and is filled again
	}
	for s := range t.streams {
		// Of a stream that is gone the file has nothing, until it has the rows of another node.
		if _, held := from.End(s); !held {
			delete(t.streams, s)
		}
	}
	t.rebuilding = false
	t.mu.Unlock()
	t.o.Logger.Warn("the job table has the records of this node's journals again", "took", time.Since(began), "jobs", t.Jobs())
	return t.flush(ctx)
}

// joinAll joins records that the table may have had before.
func (t *Table) joinAll(records []journal.Record) error {
	absent, err := t.absent(records)
	if err != nil {
		return err
	}
	for i := range records {
		if err := t.join(records[i].Job, records[i:i+1], absent.at(i)); err != nil {
			return err
		}
	}
	return nil
}
