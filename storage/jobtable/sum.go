package jobtable

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"go.etcd.io/bbolt"
)

// Rows have checksums of their own, and the keys of indexes are compared with their rows. What
// has neither is small, and is covered by one checksum in each transaction: the applied
// positions, counts, seals and digests. Otherwise a flipped bit could hide records of a journal
// for ever. The value of "sum" is the transaction (8) | crc32c (4). An earlier version does
// not write it: then the transaction is an older one, and nothing is checked.

func sumOf(tx *bbolt.Tx) []byte {
	sum := crc32.Checksum(bucket(tx, tableMeta).Get(keyCounts), castagnoli)
	var size [8]byte
	for _, n := range []int{tableDigests, tableSeals, tableStreams} {
		c := bucket(tx, n).Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			binary.BigEndian.PutUint32(size[:4], uint32(len(k)))
			binary.BigEndian.PutUint32(size[4:], uint32(len(v)))
			sum = crc32.Update(crc32.Update(crc32.Update(sum, castagnoli, size[:]), castagnoli, k), castagnoli, v)
		}
	}
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, uint64(tx.ID())), sum)
}

func putSum(tx *bbolt.Tx) error { return bucket(tx, tableMeta).Put(keySum, sumOf(tx)) }

// checkSum is called on the newest transaction. A damaged number of the transaction looks like
// that of an earlier version; one in the future does not.
func checkSum(tx *bbolt.Tx) error {
	sum := bucket(tx, tableMeta).Get(keySum)
	switch {
	case sum == nil:
		return nil
	case len(sum) != 12 || binary.BigEndian.Uint64(sum) > uint64(tx.ID()):
		return fmt.Errorf("%w: its checksum is %x", ErrDamaged, sum)
	case binary.BigEndian.Uint64(sum) == uint64(tx.ID()) && !bytes.Equal(sum, sumOf(tx)):
		return fmt.Errorf("%w: positions, counts, seals or digests are not those that were written", ErrDamaged)
	}
	return nil
}
