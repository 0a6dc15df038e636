package boltfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
)

// MarkFormat describes a mark file, a small file beside a bbolt file that
// records the last transaction of that file:
//
//	magic (8) | format (1) | state (1) | store id (16) | transaction (8) | extra | crc32c of all that (4)
//
// bbolt falls back to its previous meta page when it can't read the latest one.
// That is right after a crash, when the latest transaction was not acknowledged.
// It is wrong when an acknowledged one was damaged: bbolt would silently forget
// it. The mark tells the two apart.
//
// The owner writes the mark after each commit and does not sync it. A crash of
// the process doesn't lose it. A crash of the machine may leave an older or a
// torn one, which only detects less. The mark never names a transaction that is
// not durable.
type MarkFormat struct {
	Magic string // 8 bytes
	Extra int    // length of Mark.Extra
}

const (
	markVersion = 1
	markFixed   = 8 + 2 + 16 + 8
)

// States of a Mark.
const (
	MarkOpen   = 1
	MarkClosed = 2 // the file was closed in order: no sync of it failed
	// MarkDamaged: damage was found, or a commit failed. After a failed sync the
	// page cache may show pages that are not on the disk, so the owner must not
	// use the file again.
	MarkDamaged = 3
)

// Mark is the content of a mark file.
type Mark struct {
	State byte
	Store [16]byte // random id of the bbolt file
	Txid  uint64   // the last durable transaction
	Extra string   // MarkFormat.Extra bytes, for the owner
}

// Append appends the encoded mark to b.
func (f MarkFormat) Append(b []byte, m Mark) []byte {
	start := len(b)
	b = append(b, f.Magic...)
	b = append(b, markVersion, m.State)
	b = append(b, m.Store[:]...)
	b = binary.BigEndian.AppendUint64(b, m.Txid)
	b = append(b, m.Extra...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// Parse decodes a mark; ok is false unless b is one whole mark of this format.
func (f MarkFormat) Parse(b []byte) (m Mark, ok bool) {
	at := len(f.Magic)
	sumAt := markFixed + f.Extra
	if len(b) != sumAt+4 || string(b[:at]) != f.Magic || b[at] != markVersion ||
		crc32.Checksum(b[:sumAt], castagnoli) != binary.BigEndian.Uint32(b[sumAt:]) {
		return m, false
	}
	m.State = b[at+1]
	n := copy(m.Store[:], b[at+2:])
	m.Txid = binary.BigEndian.Uint64(b[at+2+n:])
	m.Extra = string(b[markFixed:sumAt])
	return m, true
}

// Read reads the mark at path. ok is false when there is no file, or when its
// content is not a valid mark: a power failure may have torn it.
func (f MarkFormat) Read(path string) (m Mark, ok bool, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Mark{}, false, nil
	}
	if err != nil {
		return Mark{}, false, err
	}
	m, ok = f.Parse(b)
	return m, ok, nil
}

// Write writes the mark in place, without a sync.
func (f MarkFormat) Write(file *os.File, m Mark) error {
	if _, err := file.WriteAt(f.Append(make([]byte, 0, markFixed+f.Extra+4), m), 0); err != nil {
		return fmt.Errorf("write mark: %w", err)
	}
	return nil
}

// Allows returns an error that wraps ErrDamaged when a file that is at now can't
// be the file for which m was written.
func (m Mark) Allows(now Mark) error {
	switch {
	case m.Store != now.Store:
		return fmt.Errorf("%w: it is not the file that was here before", ErrDamaged)
	case now.Txid < m.Txid:
		return fmt.Errorf("%w: it is at transaction %d, but %d was durable; "+
			"its latest part is damaged, or it was replaced by an older copy", ErrDamaged, now.Txid, m.Txid)
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)
