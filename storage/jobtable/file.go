package jobtable

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/atomicfile"
	"github.com/dsnode/dsnode/storage/boltfile"
)

// Files of the table in its directory.
const (
	File     = "jobs.db"
	markFile = "jobs.mark"
	tempFile = "jobs.db.tmp"
)

var markFormat = boltfile.MarkFormat{Magic: "DSNJMARK"}

// pageSize fits several rows of a few KiB. With 4 KiB, many rows would take a page
// each and leave half of it empty.
const pageSize = 16 << 10

const initialMap = 1 << 28

// The buckets of the file. Index entries are keys without values; see derived.go.
const (
	indexDue     = iota // class (1) | ms (8) | job
	indexKeys           // MAC of a KeyHash (16) | job
	indexList           // tenant (16) | status (1) | clock of the submission (8) | job
	indexLive           // incarnation (16) | origin | job
	tableDigests        // slot (8) → 256 digests of 16
	tableMeta           // "store" → format, id; "counts" → a number (8) for each status; "sum" → sum.go
	tableRows           // job → value.go
	tableSeals          // key id (8) → number of payloads (8)
	tableStreams        // incarnation (16) | origin → applied seq (8)
	tables
)

var (
	bucketNames = [tables]string{"due", "keys", "list", "live", "digests", "meta", "rows", "seals", "streams"}
	keyStore    = []byte("store")
	keyCounts   = []byte("counts")
	keySum      = []byte("sum")
)

// fileFormat is the version of the whole file: its buckets and their content.
const fileFormat = 1

func layout(depth boltfile.Depth) boltfile.Layout {
	names := slices.Clone(bucketNames[:])
	slices.Sort(names)
	return boltfile.Layout{PageSize: pageSize, Buckets: names, Freelist: true, Depth: depth}
}

// Discard removes the table's files, so that the next Open creates an empty table. The
// caller has to fill it from the journals and from other nodes' rows, and then calls
// SetWhole.
func Discard(dir string) error {
	if err := notePartial(dir); err != nil {
		return fmt.Errorf("discard the job table: %w", err)
	}
	for _, name := range []string{File, tempFile, markFile} { // the mark last: without the file it means damage
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("discard the job table: %w", err)
		}
	}
	return atomicfile.SyncDir(dir)
}

// openFile opens the file or creates one, and checks as much as takes little time.
func (t *Table) openFile() (err error) {
	dir, path := t.o.Dir, filepath.Join(t.o.Dir, File)
	if err := os.Remove(filepath.Join(dir, tempFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	found, marked, err := markFormat.Read(filepath.Join(dir, markFile))
	if err != nil {
		return err
	}
	_, err = os.Stat(path)
	t.fresh = errors.Is(err, fs.ErrNotExist)
	switch {
	case t.fresh && marked:
		return fmt.Errorf("%w: %s is gone, but %s exists", ErrDamaged, File, markFile)
	case t.fresh:
		if err = notePartial(dir); err == nil {
			err = createFile(dir, path)
		}
	case marked && found.State == boltfile.MarkDamaged:
		err = fmt.Errorf("%w: %s says that damage was found, or that a write failed", ErrDamaged, markFile)
	}
	if err != nil {
		return err
	}
	partial, err := isPartial(dir)
	if err != nil {
		return err
	}
	t.partial.Store(partial)
	depth := boltfile.Branches
	if !marked || found.State != boltfile.MarkClosed {
		depth = boltfile.Heads // it was not closed in order
	}
	if _, err := boltfile.CheckFile(path, layout(depth)); err != nil {
		return asDamaged(err)
	}
	if t.db, err = openBolt(path); err != nil {
		return asDamaged(err)
	}
	if t.mark, err = os.OpenFile(filepath.Join(dir, markFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return errors.Join(err, t.db.Close())
	}
	err = t.transact(func(tx *bbolt.Tx) error {
		t.now = boltfile.Mark{Txid: uint64(tx.ID()), State: boltfile.MarkOpen}
		head := tx.Bucket([]byte(bucketNames[tableMeta])).Get(keyStore)
		if len(head) < 1 || head[0] != fileFormat {
			return fmt.Errorf("%w: file format %x", ErrNewerFormat, head[:min(1, len(head))])
		}
		if copy(t.now.Store[:], head[1:]) != len(t.now.Store) {
			return fmt.Errorf("%w: the file's id is too short", ErrDamaged)
		}
		if err := checkSum(tx); err != nil {
			return err
		}
		return t.readCounts(tx)
	})
	if err == nil && marked {
		err = found.Allows(t.now)
	}
	if err == nil {
		err = t.readProven()
	}
	if err == nil {
		err = markFormat.Write(t.mark, t.now)
	}
	if err != nil {
		return errors.Join(asDamaged(err), t.mark.Close(), t.db.Close())
	}
	return nil
}

// openBolt opens the file with a stored free list, in contrast to Raft's file.
// Without one, bbolt reads every page at open and keeps a map of them, which takes
// seconds and a hundred megabytes for a million jobs. The list has as many pages as a
// few commits change, and is written once per commit.
func openBolt(path string) (db *bbolt.DB, err error) {
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	return bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout:      time.Millisecond, // the caller holds the directory's lock, so bbolt's own lock is free
		PageSize:     pageSize,
		FreelistType: bbolt.FreelistMapType, // the array type is searched from its start for each page
		// This takes address space only. Each time the mapping grows, a commit waits for
		// all readers and copies its pages.
		InitialMmapSize: initialMap,
		NoStatistics:    true,
	})
}

// createFile makes a file with empty buckets.
func createFile(dir, path string) error {
	head := make([]byte, 17)
	head[0] = fileFormat
	_, _ = rand.Read(head[1:]) // never fails; it ends the process instead
	return boltfile.Create(path, filepath.Join(dir, tempFile), openBolt, func(tx *bbolt.Tx) error {
		for _, name := range bucketNames {
			if _, err := tx.CreateBucketIfNotExists([]byte(name)); err != nil {
				return err
			}
		}
		return tx.Bucket([]byte(bucketNames[tableMeta])).Put(keyStore, head)
	})
}

// asDamaged adds ErrDamaged to boltfile's errors about a file's content.
func asDamaged(err error) error {
	if errors.Is(err, boltfile.ErrDamaged) || errors.Is(err, boltfile.ErrForeign) {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}
