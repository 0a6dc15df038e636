// Package crash tests what survives the SIGKILL of a process that writes files.
// The test binary is its own victim: as a child process it works in a directory
// and prints what it has acknowledged; the test kills it at a random moment, opens
// what it left, and compares that with the lines. Start at Main and Kill.
package crash

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// childEnv makes a test binary a child: it names the directory to work in.
const childEnv = "DSNODE_TEST_CRASH_CHILD"

// Main is the TestMain of a package with such tests. The child works until it is
// killed, or gives its exit code.
func Main(m *testing.M, child func(dir string) int) {
	if dir := os.Getenv(childEnv); dir != "" {
		os.Exit(child(dir))
	}
	os.Exit(m.Run())
}

// Say prints a line of a child in one write, so that the lines of a killed child
// are whole. A write fails only when the parent is gone.
func Say(format string, args ...any) {
	_, _ = fmt.Fprintf(os.Stdout, format+"\n", args...)
}

// Command starts this test binary as a child in a directory, as an argument of
// the wrapper if there is one (strace, for instance).
func Command(dir string, wrapper ...string) *exec.Cmd {
	args := append(wrapper, os.Args[0])
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	return cmd
}

// Kill starts a child, gives hear each line that it prints, and kills it at a
// random moment: at most 8 ms after one of the first lines, fewer than the number
// given. Every tenth child is killed while it opens its files. The test fails
// when hear does, or when the child ends by itself.
func Kill(t testing.TB, dir string, lines int, hear func(line string) error) {
	t.Helper()
	cmd := Command(dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := func() { _ = cmd.Process.Kill() } // it may have ended, which Wait tells
	killAfter := rand.IntN(lines)
	if rand.IntN(10) == 0 {
		killAfter = 0
	}
	var wrong error
	heard := 0
	for sc := bufio.NewScanner(out); ; heard++ {
		if heard == killAfter {
			time.AfterFunc(time.Duration(rand.IntN(8000))*time.Microsecond, kill)
		}
		if !sc.Scan() {
			break
		}
		if wrong = hear(sc.Text()); wrong != nil {
			kill()
			break
		}
	}
	err = cmd.Wait()
	if wrong != nil {
		t.Fatal(wrong)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child ended by itself after %d lines: %v", heard, err)
	}
}
