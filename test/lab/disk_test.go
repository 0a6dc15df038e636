//go:build linux

package lab

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestDiskHangsAndGoesOn(t *testing.T) {
	d := NewDisk(t)
	defer d.Resume()
	file := filepath.Join(d.Dir(), "file")
	if err := os.WriteFile(file, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Hang()
	written := make(chan error, 1)
	go func() { written <- os.WriteFile(file, []byte("meanwhile"), 0o600) }()
	if text, err := os.ReadFile(file); err != nil || len(text) == 0 {
		t.Errorf("read while the disk hangs: %q, %v", text, err)
	}
	select {
	case err := <-written:
		t.Fatalf("written while the disk hangs: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	d.Resume()
	select {
	case err := <-written:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the write still waits 10 s after Resume")
	}
	if text, err := os.ReadFile(file); string(text) != "meanwhile" || err != nil {
		t.Errorf("the file holds %q, %v", text, err)
	}
}

// A throttled disk writes, but not more than its limit. Writes are counted by the kernel,
// so the least time of many syncs does not depend on the machine's speed.
func TestDiskIsSlowAndFastAgain(t *testing.T) {
	d := NewDisk(t)
	const syncs, limit = 10, 30
	d.Throttle(limit)
	slow := syncTime(t, d, syncs)
	// Each sync is at least one write. The kernel lets a tenth of a second's writes pass at
	// once.
	if least := time.Duration(syncs-limit/10) * time.Second / limit; slow < least {
		t.Errorf("%d syncs took %v with %d writes per second, want %v or more", syncs, slow, limit, least)
	}
	d.Unthrottle()
	if fast := syncTime(t, d, syncs); fast > slow/2 {
		t.Errorf("%d syncs took %v without the limit, and %v with it", syncs, fast, slow)
	}
}

// syncTime writes and syncs a file that many times.
func syncTime(t *testing.T, d *Disk, times int) time.Duration {
	t.Helper()
	f, err := os.Create(filepath.Join(d.Dir(), "synced"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // every write was synced
	begun := time.Now()
	for range times {
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	return time.Since(begun)
}
