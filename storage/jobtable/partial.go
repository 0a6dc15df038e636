package jobtable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/dsnode/dsnode/storage/atomicfile"
)

// Two files say how complete the table is. Neither exists beside a table of an earlier
// version: whether that one is complete is not known.
const (
	// partialFile exists from before an empty table is created until the table is whole, so
	// that a crash in between does not make it look whole.
	partialFile = "jobs.partial"
	// wholeFile exists when the table was whole at some time. It has the file's id, so that
	// it says nothing about another file.
	wholeFile = "jobs.whole"
)

// The content is for people; only the existence of the file matters, and its time.
const partialNote = "dsnode 1: jobs.db is new, or was damaged, and is being filled; it may lack rows that only other nodes have\n"

func notePartial(dir string) error {
	if partial, err := isPartial(dir); partial || err != nil {
		return err // keep its time
	}
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

// Partial reports whether the table may lack rows of records that are no longer in this
// node's journals: a row that is missing proves nothing. It is so for a new table, until
// SetWhole, and after SetPartial and MarkPartial.
func (t *Table) Partial() bool { return t.partial.Load() }

// PartialSince returns when the table became partial, by this node's clock; zero if it is
// not, or if that is not known.
func (t *Table) PartialSince() time.Time {
	info, err := os.Stat(filepath.Join(t.o.Dir, partialFile))
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

// SetPartial records that the table turned out to lack rows. It is durable when it
// returns nil.
func (t *Table) SetPartial() error {
	if err := notePartial(t.o.Dir); err != nil {
		return fmt.Errorf("mark the job table as partial: %w", err)
	}
	t.partial.Store(true)
	return nil
}

// Proven reports whether SetWhole was called for this table at some time. A table of an
// earlier version that did not record that is neither proven nor Partial.
func (t *Table) Proven() bool { return t.proven.Load() }

func (t *Table) readProven() error {
	text, err := os.ReadFile(filepath.Join(t.o.Dir, wholeFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	t.proven.Store(string(text) == t.wholeNote())
	return nil
}

func (t *Table) wholeNote() string {
	return fmt.Sprintf("dsnode 1: jobs.db %x was complete\n", t.now.Store)
}

// SetWhole records that the table is complete, as far as it can be: all journals are
// applied, and other nodes' rows are merged. It is durable when it returns nil. While the
// table is Rebuilding it does nothing.
func (t *Table) SetWhole() error {
	t.file.RLock() // the note has the file's id
	defer t.file.RUnlock()
	if t.Rebuilding() {
		return nil // it lacks records of this node's journals
	}
	err := atomicfile.Replace(filepath.Join(t.o.Dir, wholeFile), []byte(t.wholeNote()))
	if err == nil {
		err = os.Remove(filepath.Join(t.o.Dir, partialFile))
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = atomicfile.SyncDir(t.o.Dir)
	}
	if err != nil {
		return fmt.Errorf("mark the job table as whole: %w", err)
	}
	t.proven.Store(true)
	t.partial.Store(false)
	return nil
}
