package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/storage/atomicfile"
	"github.com/dsnode/dsnode/storage/keyring"
)

// SnapshotDir is the directory of the snapshots inside the data directory.
const SnapshotDir = "snapshots"

const (
	// One is a reserve, in case the other is damaged.
	keptSnapshots = 2
	snapshotTemp  = ".tmp"
)

// SnapshotStore keeps Raft's snapshots, sealed, one file each. A snapshot exists
// once it is complete and synced, and never changes afterwards. All methods are
// safe for concurrent use.
type SnapshotStore struct {
	dir     string
	sealer  keyring.Sealer
	log     *slog.Logger
	metrics storeMetrics
	before  func() error // Options.BeforeWrite

	writing sync.Mutex   // serialises writing a snapshot and removing old ones
	lastMS  atomic.Int64 // in the last id given, so that ids never repeat
}

var _ raft.SnapshotStore = (*SnapshotStore)(nil)

// OpenSnapshotStore makes the directory if it does not exist, and removes the
// files of interrupted snapshots.
func OpenSnapshotStore(o Options) (*SnapshotStore, error) {
	s := &SnapshotStore{
		dir:     filepath.Join(o.Dir, SnapshotDir),
		sealer:  o.Sealer,
		log:     o.Logger,
		metrics: o.Metrics.of("snapshot"),
		before:  o.BeforeWrite,
	}
	if err := s.open(o.Dir); err != nil {
		return nil, fmt.Errorf("open %s: %w", s.dir, err)
	}
	return s, nil
}

func (s *SnapshotStore) open(dataDir string) error {
	err := os.Mkdir(s.dir, 0o700)
	if err == nil {
		return atomicfile.SyncDir(dataDir)
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if strings.HasSuffix(f.Name(), snapshotSuffix+snapshotTemp) {
			if err := os.Remove(filepath.Join(s.dir, f.Name())); err != nil {
				return err
			}
			s.log.Info("unfinished snapshot removed", "file", f.Name())
		}
	}
	return nil
}

// Create begins a snapshot. The sink holds it in memory, up to 64 MiB, and
// writes it on Close. Only snapshot version 1 is supported.
func (s *SnapshotStore) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, _ raft.Transport,
) (raft.SnapshotSink, error) {
	if version != raft.SnapshotVersionMax {
		return nil, fmt.Errorf("%w: raft snapshot version %d", ErrNewerFormat, version)
	}
	return &snapshotSink{
		store: s,
		id:    snapshotName{term, index, s.nextMS()}.id(),
		meta: snapshotMeta{
			RaftVersion:        int(version),
			Index:              index,
			Term:               term,
			Configuration:      raft.EncodeConfiguration(configuration),
			ConfigurationIndex: configurationIndex,
		},
	}, nil
}

func (s *SnapshotStore) nextMS() int64 {
	for {
		last := s.lastMS.Load()
		next := max(time.Now().UnixMilli(), last+1)
		if s.lastMS.CompareAndSwap(last, next) {
			return next
		}
	}
}

// List returns the intact snapshots, newest first, at most two. It reads each one
// whole to verify it. It logs and skips damaged ones. When all are damaged it
// fails, because raft would take an empty list for a new node.
func (s *SnapshotStore) List() ([]*raft.SnapshotMeta, error) {
	names, err := s.names()
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	good := []*raft.SnapshotMeta{}
	var bad error
	for _, n := range names {
		meta, _, err := s.read(n.id())
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile, for a newer one
			continue
		case err != nil:
			s.metrics.damaged.Inc()
			s.log.Error("snapshot skipped", "id", n.id(), "err", err)
			bad = err
			continue
		}
		if good = append(good, meta); len(good) == keptSnapshots {
			break
		}
	}
	if len(good) == 0 && bad != nil {
		return nil, fmt.Errorf("list snapshots in %s: none can be used: %w", s.dir, withHint(bad))
	}
	return good, nil
}

// Open returns the plaintext of a snapshot, verified as a whole. Size in the meta
// is the size of the plaintext.
func (s *SnapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	if _, ok := parseSnapshotName(id + snapshotSuffix); !ok {
		return nil, nil, fmt.Errorf("open snapshot %q: %w", id, fs.ErrNotExist)
	}
	meta, body, err := s.read(id)
	if err != nil {
		if isUnreadable(err) {
			s.metrics.damaged.Inc()
		}
		return nil, nil, fmt.Errorf("open snapshot %s: %w", id, err)
	}
	return meta, io.NopCloser(bytes.NewReader(body)), nil
}

func (s *SnapshotStore) read(id string) (*raft.SnapshotMeta, []byte, error) {
	f, err := os.Open(filepath.Join(s.dir, id+snapshotSuffix))
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = f.Close() }() // only read from
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if info.Size() > int64(maxSnapshotFile) {
		return nil, nil, fmt.Errorf("%w: a snapshot file of %d bytes", ErrDamaged, info.Size())
	}
	b := make([]byte, info.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, nil, err
	}
	return parseSnapshot(b, s.sealer, id)
}

// names returns all snapshot files, newest first, intact or not.
func (s *SnapshotStore) names() ([]snapshotName, error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var names []snapshotName
	for _, f := range files {
		if n, ok := parseSnapshotName(f.Name()); ok {
			names = append(names, n)
		}
	}
	slices.SortFunc(names, func(a, b snapshotName) int { return b.compare(a) })
	return names, nil
}

// write makes a snapshot durable, then removes all but the two newest intact
// ones. A failed sync is not retried: the file is removed, and raft takes another
// snapshot later.
func (s *SnapshotStore) write(id string, file []byte) error {
	if s.before != nil {
		if err := s.before(); err != nil {
			s.metrics.failures.Inc()
			return err
		}
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	path := filepath.Join(s.dir, id+snapshotSuffix)
	begin := time.Now()
	if err := writeDurably(path, file); err != nil {
		s.metrics.failures.Inc()
		return err
	}
	s.metrics.fsync.Observe(time.Since(begin).Seconds())
	if err := s.removeOld(); err != nil {
		// The new one is durable; the next snapshot tries again.
		s.log.Warn("old snapshots not removed", "err", err)
	}
	return nil
}

func writeDurably(path string, b []byte) error {
	err := atomicfile.Write(path, path+snapshotTemp, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
	if err == nil {
		return nil
	}
	// Renamed, but the directory was not synced: whether the file survives a crash
	// is unknown. The caller assumes that it does not exist, so remove it.
	if removeErr := os.Remove(path); !errors.Is(removeErr, fs.ErrNotExist) {
		err = errors.Join(err, removeErr)
	}
	return err
}

func (s *SnapshotStore) removeOld() error {
	names, err := s.names()
	if err != nil {
		return err
	}
	good := 0
	for _, n := range names {
		if good < keptSnapshots {
			_, _, err := s.read(n.id())
			if err == nil {
				good++
			}
			// Keep a damaged one for inspection until there are two intact ones.
			continue
		}
		if err := os.Remove(filepath.Join(s.dir, n.id()+snapshotSuffix)); err != nil {
			return err
		}
		s.log.Info("old snapshot removed", "id", n.id())
	}
	return nil
}

// snapshotSink is a snapshot being taken. Raft uses it from one goroutine.
type snapshotSink struct {
	store *SnapshotStore
	id    string
	meta  snapshotMeta
	body  bytes.Buffer
	ended bool
}

func (k *snapshotSink) ID() string { return k.id }

func (k *snapshotSink) Write(p []byte) (int, error) {
	if k.ended {
		return 0, ErrClosed
	}
	if k.body.Len()+len(p) > maxSnapshot {
		return 0, fmt.Errorf("snapshot %s: %w: more than %d bytes", k.id, ErrTooLarge, maxSnapshot)
	}
	return k.body.Write(p)
}

// Close makes the snapshot durable. A second call does nothing, as raft expects.
func (k *snapshotSink) Close() error {
	if k.ended {
		return nil
	}
	k.ended = true
	body := k.body.Bytes()
	size := snapshotHeader + 8 + len(body) + 2*recordOverhead + 1024 + 2*len(k.meta.Configuration)
	file, err := appendSnapshot(make([]byte, 0, size), k.store.sealer, k.id, k.meta, body)
	if err == nil {
		err = k.store.write(k.id, file)
	}
	k.body = bytes.Buffer{}
	if err != nil {
		return fmt.Errorf("write snapshot %s: %w", k.id, err)
	}
	k.store.log.Info("snapshot written", "id", k.id, "bytes", len(file))
	return nil
}

// Cancel discards the snapshot.
func (k *snapshotSink) Cancel() error {
	k.ended = true
	k.body = bytes.Buffer{}
	return nil
}
