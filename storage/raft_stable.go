package storage

import (
	"encoding/binary"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"
)

// A stable value, before it is sealed, is format (1) | value. Raft stores three:
// its term, and the term and the candidate of its last vote.
const (
	stableFormat    = 1
	maxStableKey    = 256
	maxStableValue  = 64 << 10
	maxStableValues = 64
)

// Set stores a value of up to 64 KiB. There may be 64 values. Beyond either limit
// the error wraps ErrTooLarge.
func (s *RaftStore) Set(key, val []byte) error {
	if len(key) == 0 || len(key) > maxStableKey || len(val) > maxStableValue {
		return fmt.Errorf("%w: stable value %q of %d bytes", ErrTooLarge, key, len(val))
	}
	if err := s.beforeWrite("set a stable value"); err != nil {
		return err
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	after := s.now
	old, err := s.Get(key)
	if err != nil {
		return err
	}
	if old == nil {
		after.stable++
	}
	if after.stable > maxStableValues {
		return fmt.Errorf("%w: %d stable values", ErrTooLarge, after.stable)
	}
	record := appendRecord(nil, s.sealer, append([]byte{stableFormat}, val...), placeOf(bucketStable, key))
	return s.update(fmt.Sprintf("set %q", key), after, func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketStable).Put(key, record)
	})
}

// Get returns the value of key, or nil without an error when there is none.
func (s *RaftStore) Get(key []byte) ([]byte, error) {
	var value []byte
	err := s.view(func(tx *bbolt.Tx) error {
		record := tx.Bucket(bucketStable).Get(key)
		if record == nil {
			return nil
		}
		var err error
		value, err = s.openStable(key, record)
		return err
	})
	if err != nil && !errors.Is(err, ErrClosed) && !errors.Is(err, ErrFailed) {
		err = s.setFailed(fmt.Sprintf("read %q", key), err)
	}
	return value, err
}

func (s *RaftStore) openStable(key, record []byte) ([]byte, error) {
	plain, err := openRecord(nil, s.sealer, record, placeOf(bucketStable, key))
	if err != nil {
		return nil, err
	}
	if len(plain) == 0 {
		return nil, fmt.Errorf("%w: stable value %q", ErrDamaged, key)
	}
	if plain[0] != stableFormat {
		return nil, fmt.Errorf("%w: stable value format %d", ErrNewerFormat, plain[0])
	}
	return plain[1:], nil
}

// SetUint64 stores a number under key.
func (s *RaftStore) SetUint64(key []byte, val uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, val))
}

// GetUint64 returns the number under key, or 0 without an error when there is none.
func (s *RaftStore) GetUint64(key []byte) (uint64, error) {
	b, err := s.Get(key)
	if err != nil || b == nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("stable value %q has %d bytes, not the 8 of a number", key, len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}
