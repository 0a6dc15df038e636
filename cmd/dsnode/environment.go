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

// environment is all that a command sees of the world around the process, so
// that a test can give it another one. main makes the real one.
type environment struct {
	stdin  io.Reader
	stdout io.Writer // data, nothing else
	stderr io.Writer // everything else
	getenv func(string) string
	// version is what `dsnode version` prints and what nodes tell each other.
	version string
	// cacheDir is this user's cache folder (os.UserCacheDir), where a running
	// `dsnode dev` records itself.
	cacheDir func() (string, error)
}

// runningDev is what `dsnode dev` writes down about itself while it runs, and
// where commands find a cluster when nobody says --admin.
type runningDev struct {
	Format  int      `json:"format"` // 1
	Admin   []string `json:"admin"`  // "http://127.0.0.1:8102", the first is asked first
	PID     int      `json:"pid"`    // of the dev process
	DataDir string   `json:"data_dir"`
}

// runningDevFormat is the only format of the record so far.
const runningDevFormat = 1

// runningDevPath is the record's place: dsnode/dev.json in the user's cache folder.
func (e *environment) runningDevPath() (string, error) {
	dir, err := e.cacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache folder: %w", err)
	}
	return filepath.Join(dir, "dsnode", "dev.json"), nil
}

// writeRunningDev replaces the record in one step; a reader never sees half of it.
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

// readRunningDev gives the dev cluster that runs now. A record of a process
// that has gone is no cluster: false.
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

// removeRunningDev takes the record away if it is still the one of pid: a
// second dev cluster may have replaced it.
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

// processLives asks the kernel. Signal 0 reaches nobody; EPERM means that the
// process is there and somebody else's.
func processLives(pid int) bool {
	if pid <= 0 {
		return false
	}
	err := syscall.Kill(pid, 0)
	return err == nil || errors.Is(err, syscall.EPERM)
}
