package jobtable

import (
	"bytes"
	"crypto/subtle"
	"encoding/binary"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
)

// bucketScan bounds the rows that one call of Bucket reads.
const bucketScan = 20_000

// Rows returns durable rows after the given id, ordered by id, as frames for Merge:
// about maxBytes, at least one row. last is where the next page begins; more is false
// after the last page. Call AppliedAll before the first page: the rows include at
// least those records. Ids of jobs whose retention is over are left out.
func (t *Table) Rows(after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error) {
	return t.page(after, maxBytes, func(journal.JobID) bool { return true })
}

// Bucket returns the rows of one bucket of Digests, like Rows; a page may be empty
// although more is true.
func (t *Table) Bucket(n byte, after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error) {
	return t.page(after, maxBytes, func(id journal.JobID) bool { return bucketOf(id) == n })
}

func (t *Table) page(after journal.JobID, maxBytes int, wanted func(journal.JobID) bool) (frames []byte, last journal.JobID, more bool, err error) {
	last = after
	err = t.read("read rows", func(tx *bbolt.Tx) error {
		frames, last, more = nil, after, false
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
				// Checked wholly: the other node could do nothing about damage here.
				s, err := parseValue(id, v)
				if err != nil {
					return err
				}
				_, of, _ := parseFields(v) // parseValue has checked them
				if len(frames) > 0 && len(frames)+len(of) > maxBytes {
					more = true
					return nil
				}
				if s.idUntil == 0 {
					frames = append(frames, of...)
				}
			}
			last = journal.JobID(k)
		}
		return nil
	})
	return frames, last, more, err
}

// digestsCut returns the first slot of which this node has forgotten nothing yet.
func (t *Table) digestsCut() timeSlot {
	from := t.clock().Add(-t.o.Retention())
	return slotOf(from.Add(slotLength)) // the first slot that begins after it
}

// Digests returns one digest per bucket, where the last byte of a job's id is its
// bucket. They cover the durable rows, except jobs that ended before
// digestsCut: some nodes have already forgotten those. Tables that hold the same
// records have the same digests, whatever keys seal the payloads and in whatever
// order the records came.
func (t *Table) Digests() ([256][16]byte, error) { return t.digestsSince(t.digestsCut()) }

func (t *Table) digestsSince(since timeSlot) (sums [256][16]byte, err error) {
	err = t.read("read digests", func(tx *bbolt.Tx) error {
		sums = [256][16]byte{}
		return bucket(tx, tableDigests).ForEach(func(k, v []byte) error {
			if len(k) != 8 || len(v) != len(sums)*16 {
				return fmt.Errorf("%w: digests of %d bytes", ErrDamaged, len(v))
			}
			if slot := timeSlot(binary.BigEndian.Uint64(k)); slot != liveSlot && slot < since {
				return nil
			}
			for i := range sums {
				subtle.XORBytes(sums[i][:], sums[i][:], v[16*i:16*i+16])
			}
			return nil
		})
	})
	return sums, err
}
