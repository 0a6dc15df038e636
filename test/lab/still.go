//go:build linux

package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// StopStill freezes all nodes of the site, and returns once they stand still: a
// signal takes a moment to reach every thread of a process.
func (s *Site) StopStill() {
	s.lab.t.Helper()
	s.Stop()
	deadline := time.Now().Add(10 * time.Second)
	for _, n := range s.Nodes {
		for err := n.moves(); err != nil; err = n.moves() {
			if time.Now().After(deadline) {
				s.lab.t.Fatalf("%s was stopped: %v", n.Name, err)
			}
			pause(time.Millisecond)
		}
	}
}

// moves is an error while some thread of the process is not stopped.
func (n *Node) moves() error {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", n.PID()))
	if err != nil {
		return err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if os.IsNotExist(err) {
			continue // a thread that has ended
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
