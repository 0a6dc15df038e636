//go:build linux

package lab

import (
	"errors"
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
// while reads work. It can also be slow.
type Disk struct {
	t   testing.TB
	dir string

	mu        sync.Mutex // guards hung, throttled
	hung      *os.File   // open while it hangs
	throttled bool
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
	err := d.mount(filepath.Join(imageDir(t), "disk.img"))
	skip.Unless(t, err == nil, fmt.Sprintf("the test needs a file system of its own: %v", err))
	_ = d.limit(0) // a test that was killed may have left a limit of this loop device
	t.Cleanup(func() {
		d.Resume()
		d.Unthrottle()
		if err := unix.Unmount(d.dir, 0); err != nil {
			t.Errorf("unmount %s: %v", d.dir, err)
		}
	})
	return d
}

// imageDir is for a disk's image: in memory, so that the disk is as fast as the test says,
// whatever else uses the machine's own disk.
func imageDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "dsnode-lab-disk-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a leftover harms nobody
	return dir
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
		// Without lazy initialization, which would use some of a slow disk's writes later.
		{"mkfs.ext4", "-q", "-F", "-N", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", image},
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

// Fill writes a file of zeros so that no more than that many bytes are free. The function
// that it returns removes the file.
func (d *Disk) Fill(leave int64) (empty func()) {
	d.t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(d.dir, &fs); err != nil {
		d.t.Fatal(err)
	}
	path := filepath.Join(d.dir, "fill")
	f, err := os.Create(path)
	if err != nil {
		d.t.Fatal(err)
	}
	free := int64(fs.Bavail) * fs.Bsize //nolint:gosec // a small disk
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, free-leave), f.Close()); err != nil {
		d.t.Fatalf("fill %s: %v", d.dir, err)
	}
	return func() {
		d.t.Helper()
		if err := os.Remove(path); err != nil {
			d.t.Error(err)
		}
	}
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

// throttleFile limits the writes of each second to a block device, for the processes of
// a cgroup. Writes of the file system's own threads count for the root cgroup, so a limit
// is set there and holds for all processes that use the device.
const throttleFile = "/sys/fs/cgroup/blkio/blkio.throttle.write_iops_device"

// Throttle limits the disk to that many writes to the device per second. An fsync of the
// file system takes several of them, so at 30 it takes about 100 ms, and more if many
// files are synced at the same time. Where the kernel has no such limit the test is
// skipped or fails, as with Require.
func (d *Disk) Throttle(writesPerSecond int) {
	d.t.Helper()
	err := d.limit(writesPerSecond)
	skip.Unless(d.t, err == nil, fmt.Sprintf("the test needs a disk that can be made slow: %v", err))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.throttled = true
}

// Unthrottle ends a Throttle. Without one it does nothing.
func (d *Disk) Unthrottle() {
	d.t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.throttled {
		return
	}
	if err := d.limit(0); err != nil { // 0 removes the limit
		d.t.Errorf("end the throttling of %s: %v", d.dir, err)
	}
	d.throttled = false
}

func (d *Disk) limit(writesPerSecond int) error {
	var st unix.Stat_t
	if err := unix.Stat(d.dir, &st); err != nil {
		return err
	}
	// The device of the mounted file system is its loop device.
	limit := fmt.Sprintf("%d:%d %d\n", unix.Major(st.Dev), unix.Minor(st.Dev), writesPerSecond)
	return os.WriteFile(throttleFile, []byte(limit), 0)
}
