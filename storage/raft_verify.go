package storage

import (
	"encoding/binary"
	"fmt"
	"runtime/debug"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/boltfile"
)

// verify decrypts every record of a file whose pages are intact, and returns the
// state of the store. It takes about a microsecond per entry.
func (s *RaftStore) verify() (now raftMark, err error) {
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	err = s.db.View(func(tx *bbolt.Tx) error {
		now.Txid = uint64(tx.ID())
		// First, so that a wrong key is reported as such.
		if err := s.verifyMeta(tx.Bucket(bucketMeta), &now); err != nil {
			return err
		}
		if err := s.verifyStable(tx.Bucket(bucketStable), &now); err != nil {
			return err
		}
		return s.verifyLog(tx.Bucket(bucketLog), &now)
	})
	return now, err
}

func (s *RaftStore) verifyMeta(b *bbolt.Bucket, now *raftMark) error {
	record := b.Get(keyStore)
	if record == nil {
		return fmt.Errorf("%w: the store's id is missing", ErrDamaged)
	}
	plain, err := openRecord(nil, s.sealer, record, placeOf(bucketMeta, keyStore))
	if err != nil {
		return err
	}
	if len(plain) < 1 || plain[0] != storeFormat {
		return fmt.Errorf("%w: store format %x", ErrNewerFormat, plain[:min(1, len(plain))])
	}
	if copy(now.Store[:], plain[1:]) != len(now.Store) {
		return fmt.Errorf("%w: the store's id is too short", ErrDamaged)
	}
	return nil
}

func (s *RaftStore) verifyStable(b *bbolt.Bucket, now *raftMark) error {
	return b.ForEach(func(key, record []byte) error {
		if _, err := s.openStable(key, record); err != nil {
			return fmt.Errorf("stable value %q: %w", key, err)
		}
		now.stable++
		return nil
	})
}

func (s *RaftStore) verifyLog(b *bbolt.Bucket, now *raftMark) error {
	var l raft.Log
	var plain []byte
	c := b.Cursor()
	for key, record := c.First(); key != nil; key, record = c.Next() {
		if len(key) != 8 {
			return fmt.Errorf("%w: a log entry's key is %x", ErrDamaged, key)
		}
		before, opened, err := s.openEntry(plain[:0], key, record, &l)
		if err != nil {
			return fmt.Errorf("log entry %d: %w", binary.BigEndian.Uint64(key), err)
		}
		plain = opened
		if now.last != 0 && before != now.last {
			return fmt.Errorf("%w: log entry %d follows %d, but %d was stored before it",
				ErrDamaged, l.Index, now.last, before)
		}
		if now.first == 0 {
			now.first = l.Index
		}
		if l.Index != now.last+1 {
			s.unbroken = l.Index
		}
		now.last = l.Index
	}
	return nil
}

// CheckTogether checks that the newest intact snapshot and the log of one node,
// both just opened, leave no hole between them; raft would panic on one. The error
// wraps ErrDamaged. Raft's TrailingLogs must be larger than its SnapshotThreshold,
// so that the older of two snapshots suffices too.
func CheckTogether(r *RaftStore, s *SnapshotStore) error {
	snapshots, err := s.List()
	if err != nil {
		return err
	}
	var covered uint64
	if len(snapshots) > 0 {
		covered = snapshots[0].Index
	}
	e := r.entries.Load()
	if e.last > covered && r.unbroken > covered+1 {
		return withHint(fmt.Errorf("%w: the newest intact snapshot ends at entry %d, and the log begins with %d",
			ErrDamaged, covered, r.unbroken))
	}
	return nil
}
