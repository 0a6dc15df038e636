package storage

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

const (
	// deleteBatch bounds one transaction of DeleteRange, and so the time that an
	// append waits behind a compaction.
	deleteBatch = 2048
	// keptArena is the size up to which the buffers for sealing stay allocated.
	keptArena = 1 << 20
)

// FirstIndex returns the first index stored, 0 for none.
func (s *RaftStore) FirstIndex() (uint64, error) {
	if err := s.usable(); err != nil {
		return 0, err
	}
	return s.entries.Load().first, nil
}

// LastIndex returns the last index stored, 0 for none.
func (s *RaftStore) LastIndex() (uint64, error) {
	if err := s.usable(); err != nil {
		return 0, err
	}
	return s.entries.Load().last, nil
}

// GetLog fills l with the entry at index. The error is raft.ErrLogNotFound itself
// when there is none; any other error means that the store has failed.
func (s *RaftStore) GetLog(index uint64, l *raft.Log) error {
	found := false
	err := s.view(func(tx *bbolt.Tx) error {
		var key [8]byte
		binary.BigEndian.PutUint64(key[:], index)
		record := tx.Bucket(bucketLog).Get(key[:])
		if record == nil {
			return nil
		}
		found = true
		_, _, err := s.openEntry(nil, key[:], record, l)
		return err
	})
	switch {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrFailed):
		return err
	case err != nil:
		return s.setFailed(fmt.Sprintf("read log entry %d", index), err)
	case !found:
		return raft.ErrLogNotFound
	}
	return nil
}

// openEntry decrypts the record at key into l, whose data points into plain.
func (s *RaftStore) openEntry(dst, key, record []byte, l *raft.Log) (before uint64, plain []byte, err error) {
	var place [12]byte
	plain, err = openRecord(dst, s.sealer, record, logPlace(&place, key))
	if err != nil {
		return 0, nil, err
	}
	before, err = decodeEntry(plain, l)
	if err == nil && l.Index != binary.BigEndian.Uint64(key) {
		err = fmt.Errorf("%w: entry %d is stored under the key %x", ErrDamaged, l.Index, key)
	}
	return before, plain, err
}

// StoreLog is StoreLogs with one entry.
func (s *RaftStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs stores all of the entries or none. Their indexes must rise and follow
// the last one stored; gaps are allowed. The error wraps ErrOutOfOrder or, for an
// entry of more than 32 MiB, ErrTooLarge, and then the store is unchanged.
func (s *RaftStore) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return s.usable()
	}
	if err := s.beforeWrite("store entries"); err != nil {
		return err
	}
	s.writing.Lock()
	defer s.writing.Unlock()

	after := s.now
	size := 0
	for _, l := range logs {
		if l.Index <= after.last {
			return fmt.Errorf("%w: entry %d after %d", ErrOutOfOrder, l.Index, after.last)
		}
		if len(l.Data)+len(l.Extensions) > maxEntry {
			return fmt.Errorf("%w: entry %d has %d bytes, more than %d",
				ErrTooLarge, l.Index, len(l.Data)+len(l.Extensions), maxEntry)
		}
		if after.first == 0 {
			after.first = l.Index
		}
		after.last = l.Index
		size += 8 + entrySize(l) + recordOverhead
	}
	return s.update(fmt.Sprintf("store %d entries up to %d", len(logs), after.last), after, func(tx *bbolt.Tx) error {
		if err := s.putCommit(tx); err != nil {
			return err
		}
		return s.putLogs(tx.Bucket(bucketLog), logs, size)
	})
}

func (s *RaftStore) putLogs(b *bbolt.Bucket, logs []*raft.Log, size int) error {
	// Indexes only rise, so pages need no free space for later insertions.
	b.FillPercent = 1
	// bbolt refers to the values until the commit has written them. They share one
	// buffer, which is large enough not to be reallocated meanwhile.
	if cap(s.arena) < size {
		s.arena = make([]byte, 0, size)
	}
	arena, plain := s.arena[:0], s.plain
	defer func() {
		if cap(s.arena) > keptArena {
			s.arena = nil
		}
		if s.plain = plain; cap(plain) > keptArena {
			s.plain = nil
		}
	}()
	var place [12]byte
	before := s.now.last
	for _, l := range logs {
		from := len(arena)
		arena = binary.BigEndian.AppendUint64(arena, l.Index)
		key := arena[from:]
		plain = appendEntry(plain[:0], l, before)
		at := len(arena)
		arena = appendRecord(arena, s.sealer, plain, logPlace(&place, key))
		if err := b.Put(key, arena[at:len(arena):len(arena)]); err != nil {
			return err
		}
		before = l.Index
	}
	return nil
}

// DeleteRange removes the entries from min to max, inclusive. They must be the
// first or the last ones stored, or the error wraps ErrOutOfOrder. It returns nil
// when there is nothing to delete. Many entries take several transactions: a crash
// leaves some of them, but never a hole.
func (s *RaftStore) DeleteRange(min, max uint64) error {
	for {
		done, err := s.deleteSome(min, max)
		if done || err != nil {
			return err
		}
	}
}

func (s *RaftStore) deleteSome(min, max uint64) (done bool, err error) {
	if err := s.beforeWrite("delete entries"); err != nil {
		return false, err
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.usable(); err != nil {
		return false, err
	}
	now := s.now
	if now.last == 0 || min > max || min > now.last || max < now.first {
		return true, nil
	}
	var keys [][8]byte
	prefix := min <= now.first
	if !prefix && max < now.last {
		return false, fmt.Errorf("%w: deleting %d to %d would leave a hole in %d to %d",
			ErrOutOfOrder, min, max, now.first, now.last)
	}
	// Delete a prefix from its beginning, a suffix from its end.
	after := now
	err = s.view(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketLog).Cursor()
		k, _ := c.First()
		step := c.Next
		if !prefix {
			k, _ = c.Last()
			step = c.Prev
		}
		for ; k != nil && len(keys) < deleteBatch; k, _ = step() {
			index := binary.BigEndian.Uint64(k)
			if index < min || index > max {
				break
			}
			keys = append(keys, [8]byte(k))
		}
		switch {
		case k == nil:
			after.indexRange = indexRange{}
		case prefix:
			after.first = binary.BigEndian.Uint64(k)
		default:
			after.last = binary.BigEndian.Uint64(k)
		}
		return nil
	})
	what := fmt.Sprintf("delete entries %d to %d", min, max)
	if err != nil {
		return false, s.setFailed(what, err)
	}
	if len(keys) == 0 {
		return true, nil
	}
	err = s.update(what, after, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketLog)
		for i := range keys {
			if err := b.Delete(keys[i][:]); err != nil {
				return err
			}
		}
		return nil
	})
	return len(keys) < deleteBatch, err
}

// logPlace is placeOf(bucketLog, key) without an allocation.
func logPlace(buf *[12]byte, key []byte) []byte {
	n := copy(buf[:], bucketLog)
	buf[n] = 0
	return buf[:n+1+copy(buf[n+1:], key)]
}
