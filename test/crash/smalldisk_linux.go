package crash

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dsnode/dsnode/test/skip"
)

// SmallDisk mounts a file system in memory of a size such as "1m" until the end of
// the test. Resize changes the size while it is in use.
func SmallDisk(t testing.TB, size string) (dir string, resize func(size string)) {
	t.Helper()
	dir = t.TempDir()
	err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size)
	skip.Unless(t, err == nil, fmt.Sprintf("only root may mount a small file system: %v", err))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir, func(size string) {
		t.Helper()
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size="+size); err != nil {
			t.Fatal(err)
		}
	}
}
