package storage

import (
	"encoding/binary"
	"fmt"

	"github.com/dsnode/dsnode/storage/boltfile"
)

// raftMarkFormat is that of raft.mark, which detects that raft.db has lost
// acknowledged transactions (a vote, for instance). Its extra part is
//
//	first index (8) | last index (8) | number of stable values (4)
var raftMarkFormat = boltfile.MarkFormat{Magic: "DSNRMARK", Extra: 8 + 8 + 4}

// raftMark is what raft.mark records of raft.db.
type raftMark struct {
	boltfile.Mark
	indexRange
	stable uint32 // number of stable values
}

func (m raftMark) encode() boltfile.Mark {
	b := binary.BigEndian.AppendUint64(nil, m.first)
	b = binary.BigEndian.AppendUint64(b, m.last)
	m.Extra = string(binary.BigEndian.AppendUint32(b, m.stable))
	return m.Mark
}

func decodeRaftMark(m boltfile.Mark) raftMark {
	extra := []byte(m.Extra)
	m.Extra = ""
	return raftMark{
		Mark:       m,
		indexRange: indexRange{binary.BigEndian.Uint64(extra), binary.BigEndian.Uint64(extra[8:])},
		stable:     binary.BigEndian.Uint32(extra[16:]),
	}
}

// allows returns an error that wraps ErrDamaged when a store that is at now can't
// be the one for which m was written.
func (m raftMark) allows(now raftMark) error {
	if err := m.Allows(now.Mark); err != nil {
		return err
	}
	if now.Txid == m.Txid && (now.indexRange != m.indexRange || now.stable != m.stable) {
		return fmt.Errorf("%w: it holds the entries %d to %d and %d stable values, not %d to %d and %d",
			ErrDamaged, now.first, now.last, now.stable, m.first, m.last, m.stable)
	}
	return nil
}
