// Package skip decides what a test does on a machine that lacks what it needs.
package skip

import (
	"os"
	"testing"
)

// Unless skips the test and says why, unless ok. With DSNODE_TEST_REQUIRE=1, for
// a machine that must run every test, it fails the test instead.
func Unless(t testing.TB, ok bool, why string) {
	t.Helper()
	switch {
	case ok:
	case os.Getenv("DSNODE_TEST_REQUIRE") == "1":
		t.Fatalf("this machine can't run the test: %s", why)
	default:
		t.Skip(why)
	}
}
