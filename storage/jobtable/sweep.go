package jobtable

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
)

const (
	sweepEvery = time.Second
	sweepPage  = 1000 // rows read at once
)

// clock is the current time by the clock that records are stamped with.
func (t *Table) clock() time.Time { return t.o.Clock.Now().Time() }

func (t *Table) sweepLoop(ctx context.Context) error {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	var heads <-chan struct{} // closed when keys have changed since the last sweepHeads
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		tryHeads := heads == nil
		select {
		case <-heads:
			tryHeads = true
		default:
		}
		if tryHeads {
			heads = t.o.Ring.Changed()
			if err := t.sweepHeads(ctx); err != nil {
				return err
			}
		}
		if err := t.sweep(ctx); err != nil {
			return err
		}
	}
}

// sweep removes what is due: the content of jobs whose retention is over, ids whose
// job has expired, and records whose submission never arrived.
func (t *Table) sweep(ctx context.Context) error {
	now := t.clock()
	for _, class := range []struct {
		name byte
		to   time.Time // due up to this time
		what string
	}{
		{dueFinal, now.Add(-t.o.Retention()), "content"},
		{dueOrphan, now.Add(-orphanFor), "orphan"},
		{dueID, now, "id"},
	} {
		from := dueKey(class.name, 0, journal.JobID{})
		for from != nil && ctx.Err() == nil {
			var ids []journal.JobID
			var err error
			if ids, from, err = t.dueUpTo(class.name, from, class.to.UnixMilli()); err != nil {
				return err
			}
			for _, id := range ids {
				forgotten, err := t.forget(id, class.name, class.to.UnixMilli())
				if err != nil {
					return err
				}
				if forgotten {
					t.metrics.forgotten.WithLabelValues(class.what).Inc()
				}
			}
		}
	}
	return nil
}

// dueUpTo returns a page of the due rows of a class, and where the next page
// begins, nil after the last.
func (t *Table) dueUpTo(class byte, from []byte, to int64) (ids []journal.JobID, next []byte, err error) {
	err = t.read("look for due jobs", func(tx *bbolt.Tx) error {
		ids, next = nil, nil
		c := bucket(tx, indexDue).Cursor()
		for k, _ := c.Seek(from); len(k) > 0 && k[0] == class; k, _ = c.Next() {
			if len(k) != 1+8+16 {
				return fmt.Errorf("%w: a due entry of %d bytes", ErrDamaged, len(k))
			}
			if int64(binary.BigEndian.Uint64(k[1:])) > to {
				return nil
			}
			if len(ids) == sweepPage {
				next = bytes.Clone(k)
				return nil
			}
			ids = append(ids, journal.JobID(k[9:]))
		}
		return nil
	})
	return ids, next, err
}

// forget removes what is due of a row, if it still is due.
func (t *Table) forget(id journal.JobID, class byte, to int64) (forgotten bool, err error) {
	now := t.clock().UnixMilli()
	err = t.change(id, false, absenceUnknown, func(s state) (state, bool) {
		of, at, ok := s.due()
		if !ok || of != class || at > to {
			return s, false
		}
		forgotten = true
		if class != dueFinal {
			return state{}, true
		}
		until := s.idExpiry()
		if until <= now {
			return state{}, true
		}
		return state{at: s.at, idUntil: until}, true
	})
	return forgotten, err
}

// sweepHeads tries again to open the submissions that could not be opened.
func (t *Table) sweepHeads(ctx context.Context) error {
	from := dueKey(dueHead, 0, journal.JobID{})
	for from != nil && ctx.Err() == nil {
		var ids []journal.JobID
		var err error
		if ids, from, err = t.dueUpTo(dueHead, from, 0); err != nil {
			return err
		}
		for _, id := range ids {
			err := t.change(id, false, absenceUnknown, func(s state) (state, bool) {
				if s.head.known || len(s.submissions()) == 0 {
					return s, false
				}
				t.fillHead(id, &s)
				return s, s.head.known
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
