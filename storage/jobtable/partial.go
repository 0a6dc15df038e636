package jobtable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dsnode/dsnode/storage/atomicfile"
)

// partialFile exists from before a table is discarded until the new one is whole, so
// that a crash in between does not make the table look whole.
const partialFile = "jobs.partial"

// The content is for people; only the existence of the file matters.
const partialNote = "dsnode 1: jobs.db may lack rows that only other nodes have, and is being completed\n"

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

// MarkPartial makes the table of a directory Partial from the next Open on. It keeps its
// rows.
func MarkPartial(dir string) error {
	if err := notePartial(dir); err != nil {
		return fmt.Errorf("mark the job table as partial: %w", err)
	}
	return nil
}

// Partial reports whether the table was discarded or marked, and SetWhole has not been
// called since. Then it may lack rows whose records are no longer in the journals: a row
// that is missing proves nothing.
func (t *Table) Partial() bool { return t.partial.Load() }

// SetWhole records that the table is complete, as far as it can be: all journals are
// applied, and other nodes' rows are merged. It is durable when it returns nil.
func (t *Table) SetWhole() error {
	err := os.Remove(filepath.Join(t.o.Dir, partialFile))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = atomicfile.SyncDir(t.o.Dir)
	}
	if err != nil {
		return fmt.Errorf("mark the job table as whole: %w", err)
	}
	t.partial.Store(false)
	return nil
}
