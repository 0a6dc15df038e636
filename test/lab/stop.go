//go:build linux

package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// StopAndWait sends SIGSTOP to all nodes of the site and waits until every thread
// of their processes is stopped, which takes a moment after the signal.
func (s *Site) StopAndWait() {
	s.lab.t.Helper()
	s.Stop()
	deadline := time.Now().Add(10 * time.Second)
	for _, n := range s.Nodes {
		for err := n.stopped(); err != nil; err = n.stopped() {
			if time.Now().After(deadline) {
				s.lab.t.Fatalf("%s is not stopped: %v", n.Name, err)
			}
			pause(time.Millisecond)
		}
	}
}

// stopped returns an error while a thread of the process is not stopped.
func (n *Node) stopped() error {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", n.PID()))
	if err != nil {
		return err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if os.IsNotExist(err) {
			continue // the thread has ended
		}
		if err != nil {
			return err
		}
		// The state follows the name, which is in parentheses.
		if _, rest, _ := cutLast(string(text), ") "); len(rest) == 0 || rest[0] != 'T' {
			return fmt.Errorf("thread %s is in state %.1q", file, rest)
		}
	}
	return nil
}
