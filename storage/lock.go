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

// LockFile is the file's name inside the data directory. It holds the process
// id of the node that has the lock, and is empty when nobody has it.
const LockFile = "dsnode.pid"

// DirLock gives a data directory to one process. The kernel drops it when the
// process ends, however it ends.
type DirLock struct{ file *os.File }

// Lock takes the lock of a data directory, which must exist. It never waits:
// the error is ErrLocked with the holder's process id, or what the file system
// said.
func Lock(dir string) (*DirLock, error) {
	path := filepath.Join(dir, LockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer func() { _ = f.Close() }() // nothing was written
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s is held by %s; stop that process, or give this node a data_dir of its own",
				ErrLocked, dir, holder(f))
		}
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	// The pid is for people; the lock holds without it. So no fsync, but a
	// disk that can't take it is reported now and not by the first vote.
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", errors.Join(err, f.Close()))
	}
	return &DirLock{file: f}, nil
}

// Unlock gives the directory free. The file stays: removing it would let two
// processes lock two files of one name.
func (l *DirLock) Unlock() error {
	return errors.Join(l.file.Truncate(0), l.file.Close())
}

func holder(f *os.File) string {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 32))
	pid := strings.TrimSpace(string(b))
	if err != nil || pid == "" {
		// Between its lock and its write.
		return "a process that is just starting"
	}
	return "process " + pid
}
