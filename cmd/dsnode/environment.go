package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// environment has everything that a command takes from the process, so that tests
// can replace it. main makes the real one.
type environment struct {
	stdin  io.Reader
	stdout io.Writer // data only
	stderr io.Writer // messages
	getenv func(string) string
	// version is what `dsnode version` prints and what nodes report to each other.
	version string
	// cacheDir returns the user's cache folder (os.UserCacheDir). A running
	// `dsnode dev` writes its record there.
	cacheDir func() (string, error)
}

// runningDev is the record that `dsnode dev` writes while it runs. Commands without
// --admin find the cluster by it.
type runningDev struct {
	Format  int      `json:"format"` // 1
	Admin   []string `json:"admin"`  // such as "http://127.0.0.1:8102", in the order to try
	PID     int      `json:"pid"`    // of the dev process
	DataDir string   `json:"data_dir"`
}

// runningDevFormat is the only format of the record so far.
const runningDevFormat = 1

// runningDevPath is dsnode/dev.json in the user's cache folder.
func (e *environment) runningDevPath() (string, error) {
	dir, err := e.cacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache folder: %w", err)
	}
	return filepath.Join(dir, "dsnode", "dev.json"), nil
}

// writeRunningDev replaces the record atomically.
func (e *environment) writeRunningDev(dev runningDev) error {
	path, err := e.runningDevPath()
	if err != nil {
		return err
	}
	dev.Format = runningDevFormat
	text, err := json.Marshal(dev)
	if err != nil {
		return fmt.Errorf("encode the record of the dev cluster: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make the cache folder: %w", err)
	}
	next := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.WriteFile(next, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("record the dev cluster: %w", err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("record the dev cluster: %w", errors.Join(err, os.Remove(next)))
	}
	return nil
}

// readRunningDev returns the record of the running dev cluster. It is false when
// there is no record, or when the process that wrote it has ended.
func (e *environment) readRunningDev() (runningDev, bool) {
	path, err := e.runningDevPath()
	if err != nil {
		return runningDev{}, false
	}
	text, err := os.ReadFile(path) //nolint:gosec // the path is made of the user's own cache folder
	if err != nil {
		return runningDev{}, false
	}
	var dev runningDev
	if err := json.Unmarshal(text, &dev); err != nil || dev.Format != runningDevFormat {
		return runningDev{}, false
	}
	if len(dev.Admin) == 0 || !processLives(dev.PID) {
		return runningDev{}, false
	}
	return dev, true
}

// removeRunningDev removes the record of the process pid. A record that another dev
// cluster has written since stays.
func (e *environment) removeRunningDev(pid int) error {
	dev, found := e.readRunningDev()
	if !found || dev.PID != pid {
		return nil
	}
	path, err := e.runningDevPath()
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the record of the dev cluster: %w", err)
	}
	return nil
}

// processLives reports whether a process exists. Signal 0 only checks; EPERM means
// that the process exists and belongs to another user.
func processLives(pid int) bool {
	if pid <= 0 {
		return false
	}
	err := syscall.Kill(pid, 0)
	return err == nil || errors.Is(err, syscall.EPERM)
}
