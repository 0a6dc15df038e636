package journal

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dsnode/dsnode/storage/atomicfile"
)

// disk has the calls of the file system whose failure matters; tests make them fail.
type disk interface {
	open(path string, flags int) (file, error)
	rename(from, to string) error
	remove(path string) error
	syncDir(path string) error
	free(path string) (int64, error)
}

type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Truncate(size int64) error
	size() (int64, error)
	sync() error // fdatasync
}

type osDisk struct{}

type osFile struct{ *os.File }

func (osDisk) open(path string, flags int) (file, error) {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osDisk) rename(from, to string) error { return os.Rename(from, to) }
func (osDisk) remove(path string) error     { return os.Remove(path) }
func (osDisk) syncDir(path string) error    { return atomicfile.SyncDir(path) }

// free returns the bytes that an unprivileged process may still write.
func (osDisk) free(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

func (f osFile) size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f osFile) sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// escape makes a file name from a node's name, one to one.
func escape(name string) string {
	var b strings.Builder
	for i, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.' && i > 0:
			_ = b.WriteByte(c)
		default:
			_, _ = fmt.Fprintf(&b, "%%%02x", c)
		}
	}
	return b.String()
}
