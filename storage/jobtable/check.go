package jobtable

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
)

// Check reads the whole table and verifies it: every row is canonical, every index
// has exactly the entries of the rows, and counts, seals and digests match the rows.
// The error wraps ErrDamaged.
//
// It makes everything durable first and then reads in one transaction; a commit that
// grows the file waits meanwhile. It takes some microseconds per row.
func (t *Table) Check(ctx context.Context) error {
	if err := t.flush(ctx); err != nil {
		return err
	}
	return asDamaged(t.view(func(tx *bbolt.Tx) error { return checkTables(ctx, tx) }))
}

func checkTables(ctx context.Context, tx *bbolt.Tx) error {
	all := newBatch()
	var entries [tables]int
	err := bucket(tx, tableRows).ForEach(func(k, v []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if len(k) != len(journal.JobID{}) {
			return fmt.Errorf("%w: a row's key is %x", ErrDamaged, k)
		}
		id := journal.JobID(k)
		s, err := parseValue(id, v)
		if err != nil {
			return err
		}
		if err := checkRow(&s); err != nil {
			return fmt.Errorf("job %s: %w", id, err)
		}
		all.account(id, &s, 1)
		for _, e := range s.appendIndexKeys(nil, id) {
			entries[e.index]++
			c := bucket(tx, e.index).Cursor()
			if found, _ := c.Seek(e.key); !bytes.Equal(found, e.key) {
				return fmt.Errorf("%w: job %s is not in the index %q", ErrDamaged, id, bucketNames[e.index])
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, n := range []int{indexDue, indexKeys, indexList, indexLive} {
		count := 0
		err := bucket(tx, n).ForEach(func(_, _ []byte) error { count++; return ctx.Err() })
		if err != nil {
			return err
		}
		if count != entries[n] {
			return fmt.Errorf("%w: the index %q has %d entries, the rows have %d", ErrDamaged, bucketNames[n], count, entries[n])
		}
	}
	return errors.Join(checkCounts(tx, all), checkSeals(tx, all), checkDigests(tx, all))
}

func checkRow(s *state) error {
	subs := s.submissions()
	switch {
	case !canonical(s.records):
		return fmt.Errorf("%w: the row is not in canonical order", ErrDamaged)
	case s.idUntil > 0 && len(s.records) > 0:
		return fmt.Errorf("%w: a forgotten job has records", ErrDamaged)
	case len(subs) > 0 && s.at != subs[0].Clock:
		return fmt.Errorf("%w: the row's time differs from that of its submission", ErrDamaged)
	case len(s.records) > 0 && (s.firstSeen > 0) == (Row{s.records}).visible():
		return fmt.Errorf("%w: the time first seen is set for a row with a submission, or missing for one without", ErrDamaged)
	}
	return nil
}

func checkCounts(tx *bbolt.Tx, all *batch) error {
	b := bucket(tx, tableMeta).Get(keyCounts)
	for i, want := range all.counts {
		var n int64
		if len(b) == 8*len(statuses) {
			n = int64(binary.BigEndian.Uint64(b[8*i:]))
		}
		if n != want {
			return fmt.Errorf("%w: %d jobs are counted as %s, the rows have %d", ErrDamaged, n, statuses[i], want)
		}
	}
	return nil
}

func checkSeals(tx *bbolt.Tx, all *batch) error {
	counted, err := readSeals(tx)
	if err == nil && !maps.Equal(counted, all.seals) {
		err = fmt.Errorf("%w: payloads are counted by their key as %v, the rows have %v", ErrDamaged, counted, all.seals)
	}
	return err
}

// checkDigests compares the slots that no node has begun to forget.
func checkDigests(tx *bbolt.Tx, all *batch) error {
	for slot, want := range all.digests {
		v := bucket(tx, tableDigests).Get(slot.key())
		if v == nil && slot != liveSlot {
			continue // older than the cut
		}
		if len(v) != len(want)*16 {
			return fmt.Errorf("%w: digests of %d bytes", ErrDamaged, len(v))
		}
		for i := range want {
			if !bytes.Equal(v[16*i:16*i+16], want[i][:]) {
				return fmt.Errorf("%w: the digest of bucket %d in slot %d is wrong", ErrDamaged, i, slot)
			}
		}
	}
	return nil
}
