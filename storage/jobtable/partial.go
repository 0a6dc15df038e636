package jobtable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dsnode/dsnode/storage/atomicfile"
)

// partialFile stands beside a table that was discarded, from before its files
// went until it is whole again, so that a crash in between doesn't make it look so.
const partialFile = "jobs.partial"

// What it says is for people; that it is there is what counts.
const partialNote = "dsnode 1: jobs.db was damaged and is made anew; it may lack rows that only other nodes have\n"

func notePartial(dir string) error {
	return atomicfile.Replace(filepath.Join(dir, partialFile), []byte(partialNote))
}

func isPartial(dir string) (bool, error) {
	_, err := os.Stat(filepath.Join(dir, partialFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Partial reports whether the table was discarded and SetWhole has not been
// called since: it may lack rows whose records the journals no longer hold, and
// nothing may be concluded from what it doesn't have.
func (t *Table) Partial() bool { return t.partial.Load() }

// SetWhole notes that the table lacks nothing any more that can be had: all
// journals are applied, and other nodes' rows merged. It is durable when it
// returns nil.
func (t *Table) SetWhole() error {
	err := os.Remove(filepath.Join(t.o.Dir, partialFile))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = atomicfile.SyncDir(t.o.Dir)
	}
	if err != nil {
		return fmt.Errorf("note that the job table is whole: %w", err)
	}
	t.partial.Store(false)
	return nil
}
