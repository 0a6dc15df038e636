package storage

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/storage/keyring"
)

// A snapshot file is
//
//	"DSNSNAPS" (8) | format (1) | length (4) | meta record | length (4) | body record
//
// with nothing after it. The place of the meta record is the snapshot's id, and
// the place of the body is the meta record: neither can be moved to another file.
const (
	snapshotMagic  = "DSNSNAPS"
	snapshotFormat = 1
	snapshotHeader = len(snapshotMagic) + 1

	// maxSnapshot bounds the body; the agreed state is a few MB.
	maxSnapshot     = 64 << 20
	maxSnapshotMeta = 1 << 20
	maxSnapshotFile = snapshotHeader + 4 + maxSnapshotMeta + 4 + maxSnapshot + 2*recordOverhead
)

// snapshotMeta is the sealed head of a snapshot, as JSON.
type snapshotMeta struct {
	Format             int    `json:"format"` // of this struct
	RaftVersion        int    `json:"raft_version"`
	Index              uint64 `json:"index"`
	Term               uint64 `json:"term"`
	Configuration      []byte `json:"configuration"` // raft.EncodeConfiguration
	ConfigurationIndex uint64 `json:"configuration_index"`
	Size               int64  `json:"size"` // of the plaintext body
}

func appendSnapshot(dst []byte, s keyring.Sealer, id string, meta snapshotMeta, body []byte) ([]byte, error) {
	meta.Format, meta.Size = snapshotFormat, int64(len(body))
	head, err := json.Marshal(meta)
	if err != nil {
		return nil, err
	}
	if len(head) > maxSnapshotMeta || len(body) > maxSnapshot {
		return nil, fmt.Errorf("%w: a snapshot of %d bytes", ErrTooLarge, len(body))
	}
	dst = append(dst, snapshotMagic...)
	dst = append(dst, snapshotFormat)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(head)+recordOverhead))
	at := len(dst)
	dst = appendRecord(dst, s, head, snapshotPlace("meta", id))
	place := snapshotPlace("body", string(dst[at:]))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(body)+recordOverhead))
	return appendRecord(dst, s, body, place), nil
}

// parseSnapshot decrypts a whole snapshot file. The error wraps ErrDamaged,
// ErrWrongKey or ErrNewerFormat.
func parseSnapshot(b []byte, s keyring.Sealer, id string) (*raft.SnapshotMeta, []byte, error) {
	if len(b) < snapshotHeader || string(b[:len(snapshotMagic)]) != snapshotMagic {
		return nil, nil, fmt.Errorf("%w: not a snapshot", ErrDamaged)
	}
	if b[len(snapshotMagic)] != snapshotFormat {
		return nil, nil, fmt.Errorf("%w: snapshot format %d", ErrNewerFormat, b[len(snapshotMagic)])
	}
	head, b, err := cutRecord(b[snapshotHeader:])
	if err != nil {
		return nil, nil, err
	}
	meta, err := parseSnapshotMeta(head, s, id)
	if err != nil {
		return nil, nil, err
	}
	sealed, b, err := cutRecord(b)
	if err != nil {
		return nil, nil, err
	}
	if len(b) != 0 {
		return nil, nil, fmt.Errorf("%w: %d bytes after the end", ErrDamaged, len(b))
	}
	body, err := openRecord(nil, s, sealed, snapshotPlace("body", string(head)))
	if err != nil {
		return nil, nil, err
	}
	if int64(len(body)) != meta.Size {
		return nil, nil, fmt.Errorf("%w: a body of %d bytes, want %d", ErrDamaged, len(body), meta.Size)
	}
	return meta, body, nil
}

func parseSnapshotMeta(head []byte, s keyring.Sealer, id string) (*raft.SnapshotMeta, error) {
	plain, err := openRecord(nil, s, head, snapshotPlace("meta", id))
	if err != nil {
		return nil, err
	}
	var m snapshotMeta
	if err := json.Unmarshal(plain, &m); err != nil {
		return nil, fmt.Errorf("%w: snapshot meta: %w", ErrDamaged, err)
	}
	if m.Format != snapshotFormat {
		return nil, fmt.Errorf("%w: snapshot meta format %d", ErrNewerFormat, m.Format)
	}
	configuration, err := decodeConfiguration(m.Configuration)
	if err != nil {
		return nil, err
	}
	return &raft.SnapshotMeta{
		Version:            raft.SnapshotVersion(m.RaftVersion),
		ID:                 id,
		Index:              m.Index,
		Term:               m.Term,
		Configuration:      configuration,
		ConfigurationIndex: m.ConfigurationIndex,
		Size:               m.Size,
	}, nil
}

// decodeConfiguration wraps raft.DecodeConfiguration, which panics on bytes that
// it can't decode.
func decodeConfiguration(b []byte) (c raft.Configuration, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: snapshot configuration: %v", ErrDamaged, p)
		}
	}()
	return raft.DecodeConfiguration(b), nil
}

func cutRecord(b []byte) (record, rest []byte, err error) {
	if len(b) < 4 {
		return nil, nil, fmt.Errorf("%w: it ends early", ErrDamaged)
	}
	size := binary.BigEndian.Uint32(b)
	b = b[4:]
	if uint64(size) > uint64(len(b)) {
		return nil, nil, fmt.Errorf("%w: it ends early", ErrDamaged)
	}
	return b[:size], b[size:], nil
}

func snapshotPlace(part, of string) []byte {
	return []byte("snapshot " + part + "\x00" + of)
}

const (
	snapshotPrefix = "snapshot-"
	snapshotSuffix = ".dss"
)

// snapshotName is what a snapshot's id consists of. The file name is the id and
// snapshotSuffix.
type snapshotName struct {
	term, index uint64
	unixms      int64
}

func (n snapshotName) id() string {
	return fmt.Sprintf("%s%d-%d-%d", snapshotPrefix, n.term, n.index, n.unixms)
}

// parseSnapshotName parses a file name; ok is false for any other file.
func parseSnapshotName(file string) (n snapshotName, ok bool) {
	id, ok := strings.CutSuffix(file, snapshotSuffix)
	if !ok {
		return n, false
	}
	// Sscanf is lenient: accept only a name that is printed the same again.
	if _, err := fmt.Sscanf(id, snapshotPrefix+"%d-%d-%d", &n.term, &n.index, &n.unixms); err != nil {
		return n, false
	}
	return n, n.id() == id
}

func (n snapshotName) compare(o snapshotName) int {
	return cmp.Or(cmp.Compare(n.term, o.term), cmp.Compare(n.index, o.index), cmp.Compare(n.unixms, o.unixms))
}

// isUnreadable reports whether a file was read and its content rejected, as
// opposed to an error of reading.
func isUnreadable(err error) bool {
	return errors.Is(err, ErrDamaged) || errors.Is(err, ErrWrongKey) || errors.Is(err, ErrNewerFormat)
}
