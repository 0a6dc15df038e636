package crash

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { Main(m, child) }

// child counts for ever, or only to three in a directory with a file "end".
func child(dir string) int {
	_, err := os.Stat(filepath.Join(dir, "end"))
	for n := 1; err != nil || n <= 3; n++ {
		Say("line %d", n)
	}
	return 0
}

// A killed child's lines are complete and none is missing.
func TestKill(t *testing.T) {
	total := 0
	for range 20 {
		heard := 0
		Kill(t, t.TempDir(), 500, func(line string) error {
			heard++
			if want := fmt.Sprintf("line %d", heard); line != want {
				return fmt.Errorf("heard %q, want %q", line, want)
			}
			return nil
		})
		total += heard
	}
	if total < 500 {
		t.Errorf("20 children printed only %d lines", total)
	}
}

// recorder keeps the reason of a failed test.
type recorder struct {
	testing.TB
	fatal string
}

func (r *recorder) Helper()                           {}
func (r *recorder) Fatal(args ...any)                 { r.end(fmt.Sprint(args...)) }
func (r *recorder) Fatalf(format string, args ...any) { r.end(fmt.Sprintf(format, args...)) }

func (r *recorder) end(why string) {
	r.fatal = why
	runtime.Goexit()
}

// fatal returns the reason why Kill fails a test.
func fatal(dir string, hear func(string) error) string {
	r := &recorder{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		Kill(r, dir, 1<<30, hear)
	}()
	<-done
	return r.fatal
}

func TestKillFailsWhenHearDoes(t *testing.T) {
	wrong := errors.New("this line was not expected")
	dir := t.TempDir()
	for range 100 { // a child that is killed while it starts prints no line
		if why := fatal(dir, func(string) error { return wrong }); why == wrong.Error() {
			return
		} else if why != "" {
			t.Fatal(why)
		}
	}
	t.Error("no error of hear failed a test")
}

func TestKillFailsWhenTheChildEnds(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "end"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 100 { // a child that is killed while it starts does not end by itself
		if why := fatal(dir, func(string) error { return nil }); strings.Contains(why, "ended by itself after 3 lines") {
			return
		} else if why != "" {
			t.Fatal(why)
		}
	}
	t.Error("no child that ended failed a test")
}
