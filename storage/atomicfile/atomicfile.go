// Package atomicfile replaces files so that a crash leaves either the old or the
// new content.
package atomicfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Replace gives a file new content, readable by its owner alone. When it returns
// nil the content is on the disk; after an error the file has its old content or
// the new one. One caller at a time for each path: the new content is first
// written to path.new.
func Replace(path string, content []byte) error {
	err := Write(path, path+".new", func(w io.Writer) error {
		_, err := w.Write(content)
		return err
	})
	if err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	return nil
}

// Write is Replace with content that fill writes, and with a temporary name of
// the caller's choice in the same directory.
func Write(path, temp string, fill func(io.Writer) error) error {
	// A crash may have left the temporary file; nothing uses its content.
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp) // frees space on a full disk; else the next Write removes it
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the entries of a directory durable: files made, renamed or
// removed in it.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
