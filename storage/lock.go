package storage

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// LockFile is the name of the lock file in the data directory. It holds the
// process id of the node that has the lock; it is empty when no node has it.
const LockFile = "dsnode.pid"

// DirLock reserves a data directory for one process. The kernel releases it when
// the process ends, in whatever way.
type DirLock struct {
	path string
	dir  *os.File // locked too: whoever deletes the lock file does not release the directory
	file *os.File
}

// Lock locks a data directory, which must exist. It does not wait: when another
// process has the lock, the error wraps ErrLocked and names its process id.
func Lock(dir string) (*DirLock, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	f, err := lockFiles(dir, d)
	if err != nil {
		_ = d.Close() // nothing was written
		return nil, err
	}
	return &DirLock{path: dir, dir: d, file: f}, nil
}

// lockFiles locks the directory and the lock file in it.
func lockFiles(dir string, d *os.File) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, LockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if err = syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil {
		defer func() { _ = f.Close() }() // nothing was written
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s is held by %s; stop that process, or give this node a data_dir of its own",
				ErrLocked, dir, holder(f))
		}
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	// The pid is for people; the lock works without it, so it is not synced.
	// Still report a disk that can't be written to now, and not at the first vote. A full one
	// is no reason to refuse: requests need no disk.
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		return nil, fmt.Errorf("lock data directory: %w", errors.Join(err, f.Close()))
	}
	return f, nil
}

// Intact is nil while the path of the directory leads to the directory that was locked.
// Otherwise somebody has deleted, moved or replaced it: what this process writes goes to
// files that no later process finds.
func (l *DirLock) Intact() error {
	now, err := os.Stat(l.path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrReplaced, err)
	}
	held, err := l.dir.Stat()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrReplaced, err)
	}
	if !os.SameFile(now, held) {
		return fmt.Errorf("%w: %s is another directory now", ErrReplaced, l.path)
	}
	now, err = os.Stat(filepath.Join(l.path, LockFile))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrReplaced, err)
	}
	if held, err = l.file.Stat(); err != nil || !os.SameFile(now, held) {
		return fmt.Errorf("%w: %s was replaced", ErrReplaced, filepath.Join(l.path, LockFile))
	}
	return nil
}

// Unlock releases the directory. It does not remove the file: then two processes
// could lock two different files of that name.
func (l *DirLock) Unlock() error {
	return errors.Join(l.file.Truncate(0), l.file.Close(), l.dir.Close())
}

func holder(f *os.File) string {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 32))
	pid := strings.TrimSpace(string(b))
	if err != nil || pid == "" {
		// The holder has locked the file and not yet written its pid.
		return "a process that is just starting"
	}
	return "process " + pid
}
