package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
)

// The mark is a small file beside raft.db that says how far raft.db had got:
//
//	"DSNRMARK" (8) | format (1) | state (1) | store id (16) | transaction (8) |
//	first index (8) | last index (8) | stable values (4) | crc32c of all that (4)
//
// bbolt falls back to its previous meta page when the latest is unreadable. That
// is right after a crash, when the latest was never acknowledged, and wrong when
// an acknowledged one was damaged: a vote would be forgotten in silence. The
// mark tells the two apart. It is written after each transaction, not synced: a
// crash of the process doesn't lose it, and a crash of the machine that does
// only makes it older, which forbids less. It never promises more than
// raft.db had made durable.
//
// Its state says whether the store was closed in order. If not, a sync may have
// failed, and then pages that the kernel shows need not be on the disk.
const (
	markMagic  = "DSNRMARK"
	markFormat = 1
	markSize   = len(markMagic) + 2 + 16 + 3*8 + 4 + 4

	markOpen   = 1
	markClosed = 2
)

type raftMark struct {
	state byte
	store [16]byte
	txid  uint64
	indexRange
	stable uint32 // how many stable values there are
}

func (m raftMark) append(b []byte) []byte {
	start := len(b)
	b = append(b, markMagic...)
	b = append(b, markFormat, m.state)
	b = append(b, m.store[:]...)
	b = binary.BigEndian.AppendUint64(b, m.txid)
	b = binary.BigEndian.AppendUint64(b, m.first)
	b = binary.BigEndian.AppendUint64(b, m.last)
	b = binary.BigEndian.AppendUint32(b, m.stable)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// parseRaftMark gives false for anything but a whole mark of this format.
func parseRaftMark(b []byte) (m raftMark, ok bool) {
	const at = len(markMagic)
	if len(b) != markSize || string(b[:at]) != markMagic || b[at] != markFormat ||
		crc32.Checksum(b[:markSize-4], castagnoli) != binary.BigEndian.Uint32(b[markSize-4:]) {
		return m, false
	}
	m.state = b[at+1]
	n := copy(m.store[:], b[at+2:])
	b = b[at+2+n:]
	m.txid = binary.BigEndian.Uint64(b)
	m.first = binary.BigEndian.Uint64(b[8:])
	m.last = binary.BigEndian.Uint64(b[16:])
	m.stable = binary.BigEndian.Uint32(b[24:])
	return m, true
}

// readRaftMark gives false when there is no mark, or none that can be read: a
// machine that lost power may have torn it.
func readRaftMark(path string) (raftMark, bool, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return raftMark{}, false, nil
	}
	if err != nil {
		return raftMark{}, false, err
	}
	m, ok := parseRaftMark(b)
	return m, ok, nil
}

// allows says whether a store that stands at now may be the one that was last
// seen at m.
func (m raftMark) allows(now raftMark) error {
	switch {
	case m.store != now.store:
		return fmt.Errorf("%w: it is not the file that was here before", ErrDamaged)
	case now.txid < m.txid:
		return fmt.Errorf("%w: it stands at transaction %d, but %d was acknowledged; "+
			"its latest part is damaged, or an older copy was put in its place", ErrDamaged, now.txid, m.txid)
	case now.txid == m.txid && (now.indexRange != m.indexRange || now.stable != m.stable):
		return fmt.Errorf("%w: it holds the entries %d to %d and %d stable values, not %d to %d and %d",
			ErrDamaged, now.first, now.last, now.stable, m.first, m.last, m.stable)
	}
	return nil
}
