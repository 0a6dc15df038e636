package boltfile

import (
	"errors"
	"os"
	"path/filepath"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/atomicfile"
)

// Create makes a bbolt file under the name temp, fills it with put, and renames
// it to path: after a crash path is either absent or complete. Both names are in
// one directory.
func Create(path, temp string, open func(string) (*bbolt.DB, error), put func(*bbolt.Tx) error) error {
	db, err := open(temp)
	if err != nil {
		return err
	}
	// Twice, so that both meta pages refer to our buckets and neither is the
	// empty one that bbolt writes first.
	err = db.Update(put)
	if err == nil {
		err = db.Update(put)
	}
	err = errors.Join(err, db.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err == nil {
		err = atomicfile.SyncDir(filepath.Dir(path))
	}
	return err
}
