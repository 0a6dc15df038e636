package journal

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
)

// marks is a file with a slot for each stream, that says up to where it was
// durable:
//
//	incarnation (16) | seq (8) | crc32c of that and the origin (4) | unused (4)
//
// It is written after the sync of the records and not synced itself: a crash of
// the process does not lose it, and one of the machine that does only makes it
// older. So the end of a stream that is unreadable is told from one that was
// never acknowledged.
type marks struct {
	mu   sync.Mutex // guards what follows
	f    file
	used []bool // by slot; 0 is none
}

const (
	marksFile = "marks"
	slotSize  = 32
)

// readMarks gives what the marks of an earlier process say, of all streams. What
// can't be read says nothing.
func readMarks(dir string) (map[Incarnation]markSlot, error) {
	b, err := os.ReadFile(filepath.Join(dir, marksFile))
	if err != nil && !isNotExist(err) {
		return nil, err
	}
	known := map[Incarnation]markSlot{}
	for ; len(b) >= slotSize; b = b[slotSize:] {
		m := markSlot{seq: binary.BigEndian.Uint64(b[16:]), sum: binary.BigEndian.Uint32(b[24:])}
		known[Incarnation(b[:16])] = m
	}
	return known, nil
}

// markSlot is a slot as it was read.
type markSlot struct {
	seq uint64
	sum uint32
}

// of gives the slot's seq if it is the stream's, 0 if not.
func (m markSlot) of(id Stream) uint64 {
	if m.sum != slotSum(id, m.seq) {
		return 0
	}
	return m.seq
}

func slotSum(id Stream, seq uint64) uint32 {
	sum := crc32.Checksum(binary.BigEndian.AppendUint64(id.Incarnation[:], seq), castagnoli)
	return crc32.Update(sum, castagnoli, []byte(id.Origin))
}

// newMarks makes the file anew. The room for all slots is taken now, so that a
// full disk does not refuse one later.
func newMarks(d disk, dir string) (*marks, error) {
	f, err := d.open(filepath.Join(dir, marksFile), os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(make([]byte, (MaxStreams+1)*slotSize), 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &marks{f: f, used: make([]bool, MaxStreams+1)}, nil
}

// put says that the stream is durable up to seq; the caller holds its write lock.
func (m *marks) put(s *stream, seq uint64) error {
	if s.slot == 0 {
		m.mu.Lock()
		for i := 1; i < len(m.used) && s.slot == 0; i++ {
			if !m.used[i] {
				m.used[i], s.slot = true, i
			}
		}
		m.mu.Unlock()
		if s.slot == 0 {
			return ErrTooManyStreams // not with MaxStreams slots
		}
	}
	var b [slotSize]byte
	copy(b[:], s.id.Incarnation[:])
	binary.BigEndian.PutUint64(b[16:], seq)
	binary.BigEndian.PutUint32(b[24:], slotSum(s.id, seq))
	_, err := m.f.WriteAt(b[:], int64(s.slot)*slotSize)
	return err
}

// free empties the stream's slot; the caller holds its write lock.
func (m *marks) free(s *stream) error {
	if s.slot == 0 {
		return nil
	}
	var b [slotSize]byte
	if _, err := m.f.WriteAt(b[:], int64(s.slot)*slotSize); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used[s.slot], s.slot = false, 0
	return nil
}

func (m *marks) close() error { return m.f.Close() }
