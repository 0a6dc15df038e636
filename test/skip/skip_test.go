package skip

import (
	"fmt"
	"testing"
)

// recorder records how a test would have ended.
type recorder struct {
	testing.TB
	fatal, skipped string
}

func (r *recorder) Helper()                           {}
func (r *recorder) Fatalf(format string, args ...any) { r.fatal = fmt.Sprintf(format, args...) }
func (r *recorder) Skip(args ...any)                  { r.skipped = fmt.Sprint(args...) }

func TestUnless(t *testing.T) {
	const why = "haproxy is not installed"
	for _, c := range []struct {
		require        string
		ok             bool
		fatal, skipped string
	}{
		{require: "", ok: true},
		{require: "1", ok: true},
		{require: "", skipped: why},
		{require: "1", fatal: "this machine can't run the test: " + why},
	} {
		t.Setenv("DSNODE_TEST_REQUIRE", c.require)
		r := &recorder{}
		Unless(r, c.ok, why)
		if r.fatal != c.fatal || r.skipped != c.skipped {
			t.Errorf("DSNODE_TEST_REQUIRE=%q, ok %v: failed with %q, skipped with %q", c.require, c.ok, r.fatal, r.skipped)
		}
	}
}
