package jobtable

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
)

// The mark is a small file beside jobs.db that says how far that had got:
//
//	"DSNJMARK" (8) | format (1) | state (1) | store id (16) | transaction (8) | crc32c of all that (4)
//
// bbolt falls back to its previous meta page when the latest is unreadable: the
// journal may have been trimmed of what the latest held. It is written after
// each commit and not synced, as Raft's is: too old a mark only forbids less.
const (
	markMagic  = "DSNJMARK"
	markFormat = 1
	markSize   = len(markMagic) + 2 + 16 + 8 + 4

	markOpen   = 1
	markClosed = 2
	// markDamaged: damage was found, or a commit failed. After a failed sync the
	// page cache shows what is not on the disk, so the file is not believed again.
	markDamaged = 3
)

type mark struct {
	state byte
	store [16]byte
	txid  uint64
}

func (m mark) append(b []byte) []byte {
	start := len(b)
	b = append(b, markMagic...)
	b = append(b, markFormat, m.state)
	b = append(b, m.store[:]...)
	b = binary.BigEndian.AppendUint64(b, m.txid)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// parseMark gives false for anything but a whole mark of this format.
func parseMark(b []byte) (m mark, ok bool) {
	const at = len(markMagic)
	if len(b) != markSize || string(b[:at]) != markMagic || b[at] != markFormat ||
		crc32.Checksum(b[:markSize-4], castagnoli) != binary.BigEndian.Uint32(b[markSize-4:]) {
		return m, false
	}
	m.state = b[at+1]
	n := copy(m.store[:], b[at+2:])
	m.txid = binary.BigEndian.Uint64(b[at+2+n:])
	return m, true
}

// readMark gives false when there is no mark, or none that can be read: a
// machine that lost power may have torn it.
func readMark(path string) (mark, bool, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return mark{}, false, nil
	}
	if err != nil {
		return mark{}, false, err
	}
	m, ok := parseMark(b)
	return m, ok, nil
}

// allows says whether a file that stands at now may be the one last seen at m.
func (m mark) allows(now mark) error {
	switch {
	case m.store != now.store:
		return fmt.Errorf("%w: it is not the file that was here before", ErrDamaged)
	case now.txid < m.txid:
		return fmt.Errorf("%w: it stands at transaction %d, but %d was made durable; "+
			"its latest part is damaged, or an older copy was put in its place", ErrDamaged, now.txid, m.txid)
	}
	return nil
}

// markWriter writes the mark in place.
type markWriter struct{ f *os.File }

func openMark(path string) (markWriter, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	return markWriter{f}, err
}

func (w markWriter) write(m mark) error {
	var b [markSize]byte
	if _, err := w.f.WriteAt(m.append(b[:0]), 0); err != nil {
		return fmt.Errorf("write %s: %w", markFile, err)
	}
	return nil
}

func (w markWriter) Close() error { return w.f.Close() }
