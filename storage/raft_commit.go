package storage

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

var _ raft.CommitTrackingLogStore = (*RaftStore)(nil)

var keyCommit = []byte("commit")

// A commit index, before it is sealed, is format (1) | index (8).
const commitFormat = 1

// StageCommitIndex records how far entries are committed. The index is written
// with the next entries, in their transaction, and costs no sync of its own. A
// node that starts without a quorum then knows what was agreed up to its last
// entry but one; the leader appends an entry every 250 ms.
func (s *RaftStore) StageCommitIndex(index uint64) error {
	s.staged.Store(index)
	return nil
}

// GetCommitIndex returns the newest stored commit index, never above LastIndex, and
// 0 for none.
func (s *RaftStore) GetCommitIndex() (uint64, error) {
	var index uint64
	err := s.view(func(tx *bbolt.Tx) error {
		record := tx.Bucket(bucketMeta).Get(keyCommit)
		if record == nil {
			return nil
		}
		plain, err := openRecord(nil, s.sealer, record, placeOf(bucketMeta, keyCommit))
		if err != nil {
			return err
		}
		index, err = parseCommit(plain)
		return err
	})
	if err != nil {
		if !errors.Is(err, ErrClosed) && !errors.Is(err, ErrFailed) {
			err = s.setFailed("read the commit index", err)
		}
		return 0, err
	}
	return min(index, s.entries.Load().last), nil
}

func parseCommit(plain []byte) (uint64, error) {
	switch {
	case len(plain) == 9 && plain[0] == commitFormat:
		return binary.BigEndian.Uint64(plain[1:]), nil
	case len(plain) > 0 && plain[0] > commitFormat:
		return 0, fmt.Errorf("%w: commit index format %d", ErrNewerFormat, plain[0])
	}
	return 0, fmt.Errorf("%w: the commit index has %d bytes", ErrDamaged, len(plain))
}

// putCommit writes the staged index in the transaction that stores entries.
func (s *RaftStore) putCommit(tx *bbolt.Tx) error {
	index := s.staged.Load()
	if index == 0 {
		return nil
	}
	plain := binary.BigEndian.AppendUint64([]byte{commitFormat}, index)
	return tx.Bucket(bucketMeta).Put(keyCommit, appendRecord(nil, s.sealer, plain, placeOf(bucketMeta, keyCommit)))
}
