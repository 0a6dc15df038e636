package shares

import (
	"math"
	"strings"
	"testing"
)

func TestPart(t *testing.T) {
	for _, tc := range []struct {
		bound   int64
		percent int
		want    int64
	}{
		{4096, 50, 2048},
		{3, 50, 1},
		{1, 50, 1},
		{1, 1, 1},
		{1000, 1, 10},
		{150, 33, 49},
		{100, 100, 100},
		{100, 0, 100}, // no shares
		{math.MaxInt64, 50, math.MaxInt64 / 2},
	} {
		if got := Part(tc.bound, tc.percent); got != tc.want {
			t.Errorf("%d %% of %d: %d, want %d", tc.percent, tc.bound, got, tc.want)
		}
	}
}

func TestCounter(t *testing.T) {
	var c Counter
	take := func(tenant string, n, most int64, want bool) {
		t.Helper()
		if got := c.Take(tenant, n, most); got != want {
			t.Errorf("%s takes %d of %d: %v", tenant, n, most, got)
		}
	}
	take("a", 2, 3, true)
	take("a", 2, 3, false)
	take("a", 1, 3, true)
	take("b", 3, 3, true) // another tenant has its own share
	take("", 1, 3, true)
	c.Add("a", -1)
	take("a", 1, 3, true)
	c.Add("a", 5) // what must be taken is
	take("a", 1, 3, false)
	c.Add("a", -8)
	c.Add("b", -3)
	c.Add("", -1)
	if len(c.used) != 0 {
		t.Errorf("tenants that use nothing are kept: %v", c.used)
	}
}

func TestErrorNamesTheShare(t *testing.T) {
	e := &Error{Tenant: "a\x1b", Of: "requests in progress", Most: 2048, Percent: 50}
	for _, want := range []string{`tenant "a\x1b"`, "requests in progress: 2048", "50 %", "limits.tenant_share"} {
		if !strings.Contains(e.Error(), want) {
			t.Errorf("%s lacks %s", e, want)
		}
	}
}
