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

// Whoever deletes the lock file does not release the directory, and the holder of a directory
// that was deleted, moved or replaced notices it.
func TestLockNoticesAReplacedDirectory(t *testing.T) {
	for name, replace := range map[string]func(dir string) error{
		"lock file deleted": func(dir string) error { return os.Remove(filepath.Join(dir, LockFile)) },
		"deleted":           os.RemoveAll,
		"moved":             func(dir string) error { return os.Rename(dir, dir+".old") },
		"replaced": func(dir string) error {
			return errors.Join(os.Rename(dir, dir+".old"), os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, LockFile), nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			lock, err := Lock(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := lock.Intact(); err != nil {
				t.Errorf("before: %v", err)
			}
			if err := replace(dir); err != nil {
				t.Fatal(err)
			}
			if err := lock.Intact(); !errors.Is(err, ErrReplaced) {
				t.Errorf("afterwards Intact is %v", err)
			}
			if name == "lock file deleted" {
				if _, err := Lock(dir); !errors.Is(err, ErrLocked) {
					t.Errorf("a second process got %v", err)
				}
			}
			if err := lock.Unlock(); err != nil {
				t.Error(err)
			}
		})
	}
}
