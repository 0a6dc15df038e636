package jobtable

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	resealPage = 5000 // rows read at once
	resealRest = time.Second
)

// Carries makes all changes durable and then returns how many payloads are sealed
// with each key.
func (t *Table) Carries(ctx context.Context) (map[keyring.KeyID]int64, error) {
	if err := t.flush(ctx); err != nil {
		return nil, err
	}
	var n map[keyring.KeyID]int64
	err := t.read("read seals", func(tx *bbolt.Tx) (err error) {
		n, err = readSeals(tx)
		return err
	})
	return n, err
}

func readSeals(tx *bbolt.Tx) (map[keyring.KeyID]int64, error) {
	n := map[keyring.KeyID]int64{}
	err := bucket(tx, tableSeals).ForEach(func(k, v []byte) error {
		if len(k) != len(keyring.KeyID{}) || len(v) != 8 {
			return fmt.Errorf("%w: seals of key %x", ErrDamaged, k)
		}
		n[keyring.KeyID(k)] = int64(binary.BigEndian.Uint64(v))
		return nil
	})
	return n, err
}

// Reseal seals all payloads that are sealed with the key from with the current key.
// It goes row by row, no faster than rows can be committed, and returns when no such
// payload is left; Carries shows the progress. Journals and other nodes may bring
// more later. It may be cancelled by ctx and called again at any time. Payloads that
// can't be opened stay as they are, and then it ends with an error.
func (t *Table) Reseal(ctx context.Context, from keyring.KeyID) error {
	for {
		n, err := t.Carries(ctx)
		if err != nil {
			return err
		}
		before := n[from]
		if before == 0 {
			return nil
		}
		if current, ok := t.o.Ring.Current(); !ok || current == from {
			return fmt.Errorf("re-seal jobs: %w", errCurrent)
		}
		stuck, err := t.resealAll(ctx, from)
		if err != nil {
			return err
		}
		if n, err = t.Carries(ctx); err != nil {
			return err
		}
		if left := n[from]; left > 0 && left >= before {
			return fmt.Errorf("%d payloads are still sealed with key %s: %w", left, from, errors.Join(stuck, errStuck))
		}
		select { // more payloads arrived meanwhile
		case <-time.After(resealRest):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

var (
	errCurrent = errors.New("there is no newer key")
	errStuck   = errors.New("they can't be opened, or arrive faster than they are re-sealed")
)

// resealAll goes through the file once. stuck is the first error of re-sealing a
// payload.
func (t *Table) resealAll(ctx context.Context, from keyring.KeyID) (stuck, err error) {
	after := journal.JobID{}
	for more := true; more; {
		var ids []journal.JobID
		if ids, after, more, err = t.sealedWith(after, from); err != nil {
			return stuck, err
		}
		for _, id := range ids {
			if err := ctx.Err(); err != nil {
				return stuck, err
			}
			err := t.change(id, false, absenceUnknown, func(s state) (state, bool) {
				next, changed, err := t.resealed(s, from)
				if err != nil && stuck == nil {
					stuck = fmt.Errorf("job %s: %w", id, err)
					t.o.Logger.Error("can't re-seal a job", "job", id, "key", from, "err", err)
				}
				return next, changed
			})
			if err != nil {
				return stuck, err
			}
		}
	}
	return stuck, nil
}

// sealedWith returns a page of the jobs with a payload sealed with key.
func (t *Table) sealedWith(after journal.JobID, key keyring.KeyID) (ids []journal.JobID, last journal.JobID, more bool, err error) {
	last = after
	err = t.read("look for a key", func(tx *bbolt.Tx) error {
		ids, last, more = nil, after, false
		c := bucket(tx, tableRows).Cursor()
		k, v := c.Seek(after[:])
		if bytes.Equal(k, after[:]) {
			k, v = c.Next()
		}
		for looked := 0; k != nil; k, v = c.Next() {
			if looked++; looked > resealPage {
				more = true
				return nil
			}
			if len(k) != len(last) {
				return fmt.Errorf("%w: a row's key is %x", ErrDamaged, k)
			}
			last = journal.JobID(k)
			s, err := parseValue(last, v)
			if err != nil {
				return err
			}
			if slices.ContainsFunc(s.records, func(r journal.Record) bool { return len(r.Payload) > 0 && sealOf(&r) == key }) {
				ids = append(ids, last)
			}
		}
		return nil
	})
	return ids, last, more, err
}

// resealed returns the state with re-sealed payloads, except those that can't be
// opened.
func (t *Table) resealed(s state, from keyring.KeyID) (next state, changed bool, failed error) {
	next = s
	next.records = slices.Clone(s.records)
	for i := range next.records {
		r := &next.records[i]
		if len(r.Payload) == 0 || sealOf(r) != from {
			continue
		}
		done, err := t.o.Sealer.Reseal(r)
		if err != nil && failed == nil {
			failed = err
		}
		changed = changed || err == nil && done
	}
	if changed {
		t.metrics.resealed.Inc()
	}
	return next, changed, failed
}
