package journal

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
)

// watermarks is a file with a slot for each stream, which holds the sequence number up
// to which the stream is durable:
//
//	incarnation (16) | seq (8) | crc32c of that and the origin (4) | unused (4)
//
// A slot is written after the sync of the records and is not synced itself. A crash of
// the process does not lose it. A crash of the machine may lose the latest write, which
// leaves an older number. With it, recovery can tell an unreadable end of a stream
// that was acknowledged from one that was not.
type watermarks struct {
	mu   sync.Mutex // guards what follows
	f    file
	used []bool // by slot; slot 0 means none
}

const (
	watermarksFile = "marks"
	slotSize       = 32
)

// readWatermarks reads the watermarks of an earlier process. Unreadable slots are
// ignored by watermark.of.
func readWatermarks(dir string) (map[Incarnation]watermark, error) {
	b, err := os.ReadFile(filepath.Join(dir, watermarksFile))
	if err != nil && !isNotExist(err) {
		return nil, err
	}
	known := map[Incarnation]watermark{}
	for ; len(b) >= slotSize; b = b[slotSize:] {
		m := watermark{seq: binary.BigEndian.Uint64(b[16:]), sum: binary.BigEndian.Uint32(b[24:])}
		known[Incarnation(b[:16])] = m
	}
	return known, nil
}

// watermark is a slot as read from the file.
type watermark struct {
	seq uint64
	sum uint32
}

// of returns the slot's seq if it is valid for the stream, else 0.
func (m watermark) of(id Stream) uint64 {
	if m.sum != slotSum(id, m.seq) {
		return 0
	}
	return m.seq
}

func slotSum(id Stream, seq uint64) uint32 {
	sum := crc32.Checksum(binary.BigEndian.AppendUint64(id.Incarnation[:], seq), castagnoli)
	return crc32.Update(sum, castagnoli, []byte(id.Origin))
}

// newWatermarks makes an empty file. It allocates all slots at once, so that a full disk
// does not fail a later write.
func newWatermarks(d disk, dir string) (*watermarks, error) {
	f, err := d.open(filepath.Join(dir, watermarksFile), os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(make([]byte, (MaxStreams+1)*slotSize), 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &watermarks{f: f, used: make([]bool, MaxStreams+1)}, nil
}

// put records that the stream is durable up to seq. The caller holds its write lock.
func (m *watermarks) put(s *stream, seq uint64) error {
	if s.slot == 0 {
		m.mu.Lock()
		for i := 1; i < len(m.used) && s.slot == 0; i++ {
			if !m.used[i] {
				m.used[i], s.slot = true, i
			}
		}
		m.mu.Unlock()
		if s.slot == 0 {
			return ErrTooManyStreams // impossible, with MaxStreams slots
		}
	}
	var b [slotSize]byte
	copy(b[:], s.id.Incarnation[:])
	binary.BigEndian.PutUint64(b[16:], seq)
	binary.BigEndian.PutUint32(b[24:], slotSum(s.id, seq))
	_, err := m.f.WriteAt(b[:], int64(s.slot)*slotSize)
	return err
}

// free clears the stream's slot. The caller holds its write lock.
func (m *watermarks) free(s *stream) error {
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

func (m *watermarks) close() error { return m.f.Close() }
