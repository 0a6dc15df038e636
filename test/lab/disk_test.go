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
