package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	segmentSuffix = ".segment"
	// oldFile has the entries of earlier versions. It is removed, since this version
	// can't read it.
	oldFile = "cache.db"

	// A segment ends when it has 1/segmentShare of a bound of the tier, or after
	// 1/lifeShare of an entry's life. Without the latter, entries that come slowly
	// would stay long after they have expired.
	segmentShare = 32
	lifeShare    = 16
	// maxSegmentBytes lets 32 bits hold any offset in a segment.
	maxSegmentBytes = 2 << 30
	// The indexes have at most one entry for each bytesPerEntry of the tier's bound,
	// and maxIndexed in all. An entry takes up to 40 bytes of memory: 40 MiB for a
	// tier of 1 GiB, 160 MiB for the largest.
	bytesPerEntry = 1 << 10
	maxIndexed    = 4 << 20
)

// embedded is a shared tier in files of this node. Entries are appended to the newest
// segment. The oldest segments are deleted whole when the tier reaches a bound, or when
// all their entries are too old. Nothing is fsynced: a power failure may lose entries.
type embedded struct {
	dir        string
	limit      int64 // bytes of all segments
	maxEntries int   // in the indexes of all segments
	now        func() time.Time
	log        *slog.Logger
	damaged    func() // is called for each segment that is dropped because of damage

	writing *semaphore.Weighted // a mutex whose waiters stop when their context ends
	closed  bool                // guarded by writing

	mu       sync.RWMutex // guards segments and their fields; not held during disk access
	segments []*segment   // oldest first; writes go to the last one
}

func openEmbedded(dir string, limit int64, now func() time.Time, log *slog.Logger, damaged func()) (*embedded, error) {
	e := &embedded{
		dir: dir, limit: limit, maxEntries: int(min(limit/bytesPerEntry, maxIndexed)),
		now: now, log: log, damaged: damaged, writing: semaphore.NewWeighted(1),
	}
	files, err := os.ReadDir(dir) // sorted by name, so by age
	if err != nil {
		return nil, fmt.Errorf("open the cache's directory: %w", err)
	}
	for _, f := range files {
		name, is := strings.CutSuffix(f.Name(), segmentSuffix)
		made, err := strconv.ParseInt(name, 10, 64)
		if !is || err != nil || !f.Type().IsRegular() {
			continue
		}
		path := filepath.Join(dir, f.Name())
		s, err := openSegment(path, made)
		if err != nil {
			e.noteDamage(path, err)
			_ = os.Remove(path) // if that fails, the next start tries again
			continue
		}
		for k := range s.index {
			e.forget(k)
		}
		e.segments = append(e.segments, s)
		e.evict(func() bool { return e.isFull(0) })
	}
	if err := os.Remove(filepath.Join(dir, oldFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("can't remove the cache file of an earlier version", "err", err)
	}
	return e, nil
}

func (e *embedded) noteDamage(path string, err error) {
	e.log.Warn("a cache file is damaged, its answers are dropped", "path", path, "err", err)
	e.damaged()
}

// forget removes a key from the indexes. The caller holds mu.
func (e *embedded) forget(k recordKey) {
	for _, s := range e.segments {
		delete(s.index, k)
	}
}

// used counts entries and bytes. The caller holds mu.
func (e *embedded) used() (entries int, bytes int64) {
	for _, s := range e.segments {
		entries += len(s.index)
		bytes += s.size
	}
	return entries, bytes
}

// isFull reports whether one more record of n bytes would exceed a bound. The caller holds
// mu.
func (e *embedded) isFull(n int64) bool {
	entries, bytes := e.used()
	return entries >= e.maxEntries || bytes+n > e.limit
}

// evict drops the oldest segment as long as tooMuch, which is called with mu held.
func (e *embedded) evict(tooMuch func() bool) {
	e.mu.Lock()
	var old []*segment
	for len(e.segments) > 0 && tooMuch() {
		old = append(old, e.segments[0])
		e.segments = slices.Delete(e.segments, 0, 1)
	}
	e.mu.Unlock()
	for _, s := range old {
		s.remove()
	}
}

// find gives the place of a key's record. The segment is nil if there is none.
func (e *embedded) find(k Key) (*segment, recordPlace) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	for _, s := range e.segments {
		if p, ok := s.index[k.record()]; ok {
			return s, p
		}
	}
	return nil, recordPlace{}
}

// read reads a record. If the record is damaged, read drops its segment and returns the
// zero record.
func (e *embedded) read(s *segment, p recordPlace) (record, []byte) {
	b := make([]byte, p.size)
	_, err := s.file.ReadAt(b, int64(p.offset))
	var r record
	if err == nil {
		r, err = parseRecord(b)
	}
	if err == nil {
		return r, b[recordValue:]
	}
	e.mu.Lock()
	at := slices.Index(e.segments, s)
	if at >= 0 {
		e.segments = slices.Delete(e.segments, at, at+1)
	}
	e.mu.Unlock()
	if at >= 0 { // else it was dropped or closed meanwhile
		e.noteDamage(s.file.Name(), err)
		s.remove()
	}
	return record{}, nil
}

func (e *embedded) get(_ context.Context, k Key) ([]byte, error) {
	if s, p := e.find(k); s != nil {
		if r, value := e.read(s, p); r.key == k {
			return value, nil
		}
	}
	return nil, nil
}

// ping reads any entry of the oldest segment, because it is the least likely to be in the
// page cache, which can be read also while the disk hangs.
func (e *embedded) ping(context.Context) error {
	e.mu.RLock()
	for _, s := range e.segments {
		for _, p := range s.index {
			e.mu.RUnlock()
			e.read(s, p)
			return nil
		}
	}
	e.mu.RUnlock()
	return nil
}

func (e *embedded) put(ctx context.Context, batch []Entry, keep time.Duration) error {
	if err := e.writing.Acquire(ctx, 1); err != nil {
		return err
	}
	defer e.writing.Release(1)
	for _, entry := range batch {
		err := ctx.Err()
		if err == nil {
			err = e.putOne(entry, keep)
		}
		if err != nil {
			return fmt.Errorf("write to a cache file: %w", err)
		}
	}
	return nil
}

// putOne writes an entry, unless there is a newer one of its key, or the entry is larger
// than the whole tier may be.
func (e *embedded) putOne(entry Entry, keep time.Duration) error {
	if s, p := e.find(entry.Key); s != nil {
		if r, _ := e.read(s, p); r.storedAt > entry.StoredAt.UnixMilli() {
			return nil
		}
	}
	b := appendRecord(nil, entry)
	r, err := parseRecord(b)
	if err != nil || r.size > e.limit {
		return err
	}
	e.evict(func() bool { return e.isFull(r.size) })
	s, err := e.last(keep)
	if err != nil {
		return err
	}
	if _, err := s.file.WriteAt(b, s.size); err != nil {
		_ = s.file.Truncate(s.size) // the rest of b after a shorter record would look like damage
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.forget(r.key.record())
	s.add(r, s.size)
	return nil
}

// last gives the segment to append to. It begins a new one if the last one has ended.
func (e *embedded) last(keep time.Duration) (*segment, error) {
	if e.closed {
		return nil, fs.ErrClosed
	}
	e.mu.RLock()
	now := e.now().UnixMilli()
	if n := len(e.segments); n > 0 {
		s := e.segments[n-1]
		ended := s.size >= min(e.limit/segmentShare, maxSegmentBytes) || len(s.index) >= e.maxEntries/segmentShare ||
			now-s.made > max(keep/lifeShare, sweepEvery).Milliseconds()
		if !ended || s.size == 0 {
			e.mu.RUnlock()
			return s, nil
		}
		now = max(now, s.made+1)
	}
	e.mu.RUnlock()
	s, err := openSegment(filepath.Join(e.dir, fmt.Sprintf("%019d%s", now, segmentSuffix)), now)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.segments = append(e.segments, s)
	return s, nil
}

// drop removes keys from the indexes. Their records stay in the files, and a restart
// finds them again unless later records replace them.
func (e *embedded) drop(_ context.Context, keys []Key) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, k := range keys {
		e.forget(k.record())
	}
	return nil
}

// sweep drops the segments whose entries are all older than before.
func (e *embedded) sweep(_ context.Context, before time.Time) error {
	e.evict(func() bool { return e.segments[0].newest < before.UnixMilli() })
	return nil
}

func (e *embedded) size() (entries, size int64, known bool) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	n, size := e.used()
	return int64(n), size, true
}

func (e *embedded) close() error {
	_ = e.writing.Acquire(context.Background(), 1) // this context never ends
	defer e.writing.Release(1)
	e.closed = true
	e.mu.Lock()
	all := e.segments
	e.segments = nil
	e.mu.Unlock()
	var failed error
	for _, s := range all {
		failed = errors.Join(failed, s.file.Close())
	}
	return failed
}
