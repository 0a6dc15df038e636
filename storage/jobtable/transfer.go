package jobtable

import (
	"bytes"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"maps"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
)

// bucketScan bounds the rows that one call of Bucket looks at.
const bucketScan = 20_000

// Rows gives durable rows behind the id after in the order of ids, as frames
// for Merge: about maxBytes, at least one row. last is the id to go on with;
// more is false when there is nothing behind it. Take AppliedAll before the
// first page: the rows hold at least that much. Ids whose retention is over are
// left out.
func (t *Table) Rows(after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error) {
	return t.page(after, maxBytes, func(journal.JobID) bool { return true })
}

// Bucket gives the rows of bucket n of Digests, as Rows does; a page may be
// empty and have more behind it.
func (t *Table) Bucket(n byte, after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error) {
	return t.page(after, maxBytes, func(id journal.JobID) bool { return bucketOf(id) == n })
}

func (t *Table) page(after journal.JobID, maxBytes int, wanted func(journal.JobID) bool) (frames []byte, last journal.JobID, more bool, err error) {
	last = after
	err = t.read("read rows", func(tx *bbolt.Tx) error {
		c := bucket(tx, tableRows).Cursor()
		k, v := c.Seek(after[:])
		if bytes.Equal(k, after[:]) {
			k, v = c.Next()
		}
		for looked := 0; k != nil; k, v = c.Next() {
			if len(k) != len(last) {
				return fmt.Errorf("%w: a row's key is %x", ErrDamaged, k)
			}
			if looked++; looked > bucketScan {
				more = true
				return nil
			}
			if id := journal.JobID(k); wanted(id) {
				s, of, err := parseFields(v)
				if err != nil {
					return fmt.Errorf("row of job %s: %w", id, err)
				}
				if len(frames) > 0 && len(frames)+len(of) > maxBytes {
					more = true
					return nil
				}
				if s.until == 0 {
					frames = append(frames, of...)
				}
			}
			last = journal.JobID(k)
		}
		return nil
	})
	return frames, last, more, err
}

// Digests says what a table holds, in 256 numbers, by the last byte of the jobs'
// ids. Tables that hold the same records have the same, however these are sealed
// and whatever way they came.
type Digests struct {
	// Since: jobs that ended before this slot are left out, because some nodes
	// have forgotten them already.
	Since   Slot
	Applied map[journal.Stream]uint64 // what the rows hold at least, read at the same moment
	Sums    [256][16]byte
}

// DigestsCut is the slot from which on this node has forgotten nothing yet. Two
// nodes compare from the later one of theirs.
func (t *Table) DigestsCut() Slot {
	from := t.clock().Add(-t.o.Retention())
	return slotOf(from.Add(slotLength)) // the first slot that begins after it
}

// DigestsSince gives the digests of the durable rows, without jobs that ended
// before the slot.
func (t *Table) DigestsSince(since Slot) (Digests, error) {
	d := Digests{Since: since, Applied: map[journal.Stream]uint64{}}
	err := t.read("read digests", func(tx *bbolt.Tx) error {
		err := bucket(tx, tableStreams).ForEach(func(k, v []byte) error {
			s, ok := parseStreamKey(k)
			if !ok || len(v) != 8 {
				return fmt.Errorf("%w: a stream %x", ErrDamaged, k)
			}
			d.Applied[s] = binary.BigEndian.Uint64(v)
			return nil
		})
		if err != nil {
			return err
		}
		return bucket(tx, tableDigests).ForEach(func(k, v []byte) error {
			if len(k) != 8 || len(v) != len(d.Sums)*16 {
				return fmt.Errorf("%w: digests of %d bytes", ErrDamaged, len(v))
			}
			if slot := Slot(binary.BigEndian.Uint64(k)); slot != liveSlot && slot < since {
				return nil
			}
			for i := range d.Sums {
				subtle.XORBytes(d.Sums[i][:], d.Sums[i][:], v[16*i:16*i+16])
			}
			return nil
		})
	})
	return d, err
}

// Digests are the sums of DigestsSince(DigestsCut()).
func (t *Table) Digests() ([256][16]byte, error) {
	d, err := t.DigestsSince(t.DigestsCut())
	return d.Sums, err
}

// Differ gives the buckets in which two tables differ. It means something only
// for digests of one slot whose tables have applied the same: false says that
// they can't be compared.
func (d Digests) Differ(o Digests) (buckets []byte, comparable bool) {
	if d.Since != o.Since || !maps.Equal(d.Applied, o.Applied) {
		return nil, false
	}
	for i := range d.Sums {
		if d.Sums[i] != o.Sums[i] {
			buckets = append(buckets, byte(i))
		}
	}
	return buckets, true
}
