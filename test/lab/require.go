//go:build linux

package lab

import (
	"os"
	"testing"
)

// Require skips the test where sites can't have networks of their own, with the
// reason. With DSNODE_TEST_REQUIRE=1, as on a machine that must run everything,
// it fails instead.
func Require(t testing.TB) {
	t.Helper()
	err := Reachable()
	if err == nil {
		return
	}
	if os.Getenv("DSNODE_TEST_REQUIRE") == "1" {
		t.Fatalf("the lab can't run here: %v", err)
	}
	t.Skipf("the lab can't run here: %v", err)
}
