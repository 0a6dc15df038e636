//go:build linux

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsnode/dsnode/test/skip"
)

// Disk is a file system that can hang: then writes and fsync wait until Resume,
// while reads work.
type Disk struct {
	t   testing.TB
	dir string

	mu   sync.Mutex // guards hung
	hung *os.File   // open while it hangs
}

const (
	// diskBytes is more than the free space that a node keeps in reserve. The file has
	// holes, so it takes only what is written.
	diskBytes = 1 << 30
	// FIFREEZE and FITHAW of linux/fs.h.
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// NewDisk makes a Disk in a file and unmounts it at the end of the test. Call it
// before Start, so that it outlives the nodes, and defer Resume: a process that
// waits for its disk can't be killed. Where files can't be mounted the test is
// skipped or fails, as with Require.
func NewDisk(t testing.TB) *Disk {
	t.Helper()
	Require(t)
	d := &Disk{t: t, dir: filepath.Join(t.TempDir(), "disk")}
	err := d.mount(d.dir + ".img")
	skip.Unless(t, err == nil, fmt.Sprintf("the test needs a file system of its own: %v", err))
	t.Cleanup(func() {
		d.Resume()
		if err := unix.Unmount(d.dir, 0); err != nil {
			t.Errorf("unmount %s: %v", d.dir, err)
		}
	})
	return d
}

func (d *Disk) mount(image string) error {
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		return err
	}
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	if err := f.Truncate(diskBytes); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	for _, command := range [][]string{
		{"mkfs.ext4", "-q", "-F", image},
		{"mount", "-o", "loop", image, d.dir},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err, out)
		}
	}
	return nil
}

// Dir is the mount point, for use as a node's data_dir.
func (d *Disk) Dir() string { return d.dir }

// Hang freezes the file system.
func (d *Disk) Hang() {
	d.t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hung != nil {
		d.t.Fatal("the disk hangs already")
	}
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), fiFreeze, 0); err != nil {
		d.t.Fatalf("freeze %s: %v", d.dir, err)
	}
	d.hung = f
}

// Resume ends a Hang. Without one it does nothing.
func (d *Disk) Resume() {
	d.t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hung == nil {
		return
	}
	if err := unix.IoctlSetInt(int(d.hung.Fd()), fiThaw, 0); err != nil {
		d.t.Errorf("thaw %s: %v", d.dir, err)
	}
	_ = d.hung.Close() // only read from
	d.hung = nil
}
