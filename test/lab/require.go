//go:build linux

package lab

import (
	"fmt"
	"testing"

	"github.com/dsnode/dsnode/test/skip"
)

// Require skips the test, or with DSNODE_TEST_REQUIRE=1 fails it, where sites
// can't have networks of their own.
func Require(t testing.TB) {
	t.Helper()
	err := Reachable()
	skip.Unless(t, err == nil, fmt.Sprintf("the lab needs network namespaces: %v", err))
}
