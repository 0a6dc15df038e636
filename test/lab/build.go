//go:build linux

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// built is the binary that this test process has built.
var built struct {
	once sync.Once
	dir  string
	err  error
}

// Build builds dsnode once in a test process and returns the binary's path. With
// LAB_RACE=1 the binary has the race detector. With LAB_BINARY set Build returns
// that path and builds nothing. A package whose tests call it needs Main.
func Build(t testing.TB) string {
	t.Helper()
	if path := os.Getenv("LAB_BINARY"); path != "" {
		return path
	}
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "dsnode-lab-"); built.err != nil {
			return
		}
		args := []string{"build", "-o", built.dir + "/dsnode"}
		if os.Getenv("LAB_RACE") == "1" {
			args = append(args, "-race")
		}
		cmd := exec.Command("go", append(args, "github.com/dsnode/dsnode/cmd/dsnode")...)
		cmd.Env = append(os.Environ(), "GOFLAGS="+plainFlags(os.Getenv("GOFLAGS")))
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("build dsnode: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, "dsnode")
}

// BuildTagged builds dsnode with build tags. The binary lasts as long as the test.
func BuildTagged(t testing.TB, tags string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "dsnode-"+tags)
	cmd := exec.Command("go", "build", "-tags", tags, "-o", binary, "github.com/dsnode/dsnode/cmd/dsnode")
	cmd.Env = append(os.Environ(), "GOFLAGS="+plainFlags(os.Getenv("GOFLAGS")))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build dsnode with %s: %v\n%s", tags, err, out)
	}
	return binary
}

// Main is the TestMain of a package: it runs the tests and removes Build's binary.
func Main(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		if err := os.RemoveAll(built.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	os.Exit(code)
}

// plainFlags drops -race: tests promise times of the program as users run it, also
// when the tests themselves are built with the race detector.
func plainFlags(flags string) string {
	var kept []string
	for f := range strings.FieldsSeq(flags) {
		if f != "-race" && f != "-race=true" {
			kept = append(kept, f)
		}
	}
	return strings.Join(kept, " ")
}
