package journal

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// storeFile identifies the directory and the time it was created:
	//
	//	"DSNJSTOR" (8) | format (1) | Unix milliseconds (8) | random id (16) | crc32c of all that (4)
	storeFile   = "store"
	storeMagic  = "DSNJSTOR"
	storeFormat = 1
	storeSize   = len(storeMagic) + 1 + 8 + 16 + 4

	// checkpointFile holds a checkpoint for each stream.
	checkpointFile   = "settled.json"
	checkpointFormat = 1

	tempSuffix = ".new"
)

// openStore reads the store's identity, or creates it. A damaged one is replaced: peers
// then forget what they recorded about this node.
func (l *Log) openStore() error {
	path := filepath.Join(l.o.Dir, storeFile)
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		l.epoch, err = parseStore(b)
		if !errors.Is(err, ErrDamaged) {
			return err
		}
		l.metrics.damaged.Inc()
		l.log.Error("the journal's identity is damaged; it is replaced by a new one", "path", path, "err", err)
	}
	return l.renewStore()
}

// renewStore gives the store a new identity with a higher epoch, which makes obsolete what
// peers recorded about this node.
func (l *Log) renewStore() error {
	l.epoch = max(l.epoch+1, uint64(l.clock.now().UnixMilli()))
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails; it ends the process instead
	b := append([]byte(storeMagic), storeFormat)
	b = binary.BigEndian.AppendUint64(b, l.epoch)
	b = append(b, id[:]...)
	return l.replaceFile(filepath.Join(l.o.Dir, storeFile), appendSum(b))
}

func parseStore(b []byte) (epoch uint64, err error) {
	const at = len(storeMagic)
	switch {
	case len(b) > at && string(b[:at]) == storeMagic && b[at] > storeFormat:
		return 0, fmt.Errorf("%w: store format %d", ErrNewerFormat, b[at])
	case len(b) != storeSize || string(b[:at]) != storeMagic || b[at] != storeFormat ||
		crc32.Checksum(b[:storeSize-4], castagnoli) != binary.BigEndian.Uint32(b[storeSize-4:]):
		return 0, fmt.Errorf("%w: %s", ErrDamaged, storeFile)
	}
	return binary.BigEndian.Uint64(b[at+1:]), nil
}

// checkpoint says that the stream's last segment was on the disk up to Size, at a moment
// without writes: after opening, and when it was closed in order. Later bytes may exist
// only in the page cache, after a failed sync.
type checkpoint struct {
	Segment uint64 `json:"segment"` // first seq
	Size    int64  `json:"size"`
	Durable uint64 `json:"durable"`
}

type checkpoints struct {
	Format  int                   `json:"format"`
	Streams map[string]checkpoint `json:"streams"`
}

func (l *Log) writeCheckpoint(streams []*stream) error {
	list := checkpoints{Format: checkpointFormat, Streams: map[string]checkpoint{}}
	for _, s := range streams {
		s.mu.Lock()
		g := s.segments[len(s.segments)-1]
		list.Streams[s.id.String()] = checkpoint{Segment: g.first, Size: g.size, Durable: s.durable}
		s.mu.Unlock()
	}
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	return l.replaceFile(filepath.Join(l.o.Dir, checkpointFile), b)
}

// readCheckpoint returns nothing when the file can't be read; recovery then trusts no bytes.
func (l *Log) readCheckpoint() (map[string]checkpoint, error) {
	b, err := os.ReadFile(filepath.Join(l.o.Dir, checkpointFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list checkpoints
	if err := json.Unmarshal(b, &list); err != nil {
		l.log.Warn("the journal's checkpoint is damaged", "file", checkpointFile, "err", err)
		return nil, nil
	}
	if list.Format > checkpointFormat {
		return nil, fmt.Errorf("%w: %s has format %d", ErrNewerFormat, checkpointFile, list.Format)
	}
	return list.Streams, nil
}

func (l *Log) replaceFile(path string, b []byte) error {
	return l.rewriteFile(path, func(f file) error {
		_, err := f.WriteAt(b, 0)
		return err
	})
}

// rewriteFile replaces the file at path by what fill writes. After a crash the
// path has the old content or the new one; after it returns nil, the new one.
func (l *Log) rewriteFile(path string, fill func(file) error) error {
	temp := path + tempSuffix
	f, err := l.disk.open(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	if err = fill(f); err == nil {
		err = f.sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = l.disk.rename(temp, path)
	}
	if err == nil {
		err = l.disk.syncDir(filepath.Dir(path))
	}
	return err
}

// copyBytes copies a part of a file to the same offsets of another.
func copyBytes(to, from file, at, end int64) error {
	buf := make([]byte, min(windowBytes, max(end-at, 1)))
	for at < end {
		n := min(int64(len(buf)), end-at)
		if _, err := from.ReadAt(buf[:n], at); err != nil {
			return err
		}
		if _, err := to.WriteAt(buf[:n], at); err != nil {
			return err
		}
		at += n
	}
	return nil
}
