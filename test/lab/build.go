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
		var flags []string
		if os.Getenv("LAB_RACE") == "1" {
			flags = append(flags, "-race")
		}
		built.err = goBuild("", filepath.Join(built.dir, "dsnode"), flags...)
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
	if err := goBuild("", binary, "-tags", tags); err != nil {
		t.Fatal(err)
	}
	return binary
}

// BuildCommit builds dsnode as it was at a commit of this repository. The binary
// lasts as long as the test. It returns false when this clone lacks the commit.
func BuildCommit(t testing.TB, commit string) (string, bool) {
	t.Helper()
	top, err := exec.Command("git", "rev-parse", "--show-toplevel").Output()
	if err != nil {
		return "", false // not a clone
	}
	git := []string{"-C", strings.TrimSpace(string(top))}
	if exec.Command("git", append(git, "cat-file", "-e", commit+"^{commit}")...).Run() != nil {
		return "", false
	}
	dir := t.TempDir()
	archive := filepath.Join(dir, "tree.tar")
	source := filepath.Join(dir, "tree")
	for _, command := range [][]string{
		append(append([]string{"git"}, git...), "archive", "--prefix=tree/", "-o", archive, commit),
		{"tar", "-xf", archive, "-C", dir},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
		}
	}
	binary := filepath.Join(dir, "dsnode-"+commit)
	if err := goBuild(source, binary); err != nil {
		t.Fatal(err)
	}
	return binary, true
}

// goBuild builds the program in a source tree; "" is the present one.
func goBuild(dir, binary string, flags ...string) error {
	cmd := exec.Command("go", append(append([]string{"build", "-o", binary}, flags...), "github.com/dsnode/dsnode/cmd/dsnode")...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS="+plainFlags(os.Getenv("GOFLAGS")))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build dsnode: %w\n%s", err, out)
	}
	return nil
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
