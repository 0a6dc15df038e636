// Package atomicfile replaces small files so that a crash leaves the old content
// or the new one, and nothing in between.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Replace gives a file new content, readable by its owner alone. When it returns
// nil the content is on the disk; after an error the file is as it was, or as it
// should be. One caller at a time for each path: the next content is written
// beside it, as path.new.
func Replace(path string, content []byte) error {
	if err := replace(path, path+".new", content); err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	return nil
}

func replace(path, next string, content []byte) error {
	// A crash may have left one; it holds nothing that anybody relies on.
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(next, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		_ = os.Remove(next) // a full disk needs the room; the next one does it otherwise
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
