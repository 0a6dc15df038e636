package storage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLockIsExclusive(t *testing.T) {
	dir := t.TempDir()
	lock, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(readFile(t, filepath.Join(dir, LockFile)))); got != fmt.Sprint(os.Getpid()) {
		t.Fatalf("the pid file holds %q", got)
	}
	_, err = Lock(dir)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d;", os.Getpid())) {
		t.Fatalf("locking again returned %v", err)
	}
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	if got := readFile(t, filepath.Join(dir, LockFile)); len(got) != 0 {
		t.Fatalf("the pid file of a free directory holds %q", got)
	}
	again, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Unlock(); err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(filepath.Join(dir, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("no directory: %v", err)
	}
}

func TestLockTakesOverStalePidFile(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, LockFile), []byte("999999999999\n"))
	lock, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(readFile(t, filepath.Join(dir, LockFile)))); got != fmt.Sprint(os.Getpid()) {
		t.Fatalf("the pid file holds %q", got)
	}
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
}
