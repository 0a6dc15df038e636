package node

import (
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/replication"
)

func TestMissingSaysWhatIsMissing(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, tc := range map[string]struct {
		st   replication.Standing
		says []string // nil: nothing is missing
	}{
		"complete":       {replication.Standing{CaughtUp: true}, nil},
		"hears nobody":   {replication.Standing{}, nil}, // other reasons say that
		"a node waits":   {replication.Standing{Partial: true, Since: since}, []string{"2026-01-02T03:04:05Z", "no node whose table is complete", "don't stop, wipe or remove"}},
		"rows arrive":    {replication.Standing{Partial: true, Since: since, Jobs: 12, Of: 3456, From: "b-1"}, []string{"it has 12 jobs and gets the 3456 jobs of node b-1"}},
		"unknown since":  {replication.Standing{Partial: true}, []string{"lacks jobs (no node"}},
		"has just begun": {replication.Standing{Behind: []string{"b-1", "c-1"}}, []string{"not yet received all jobs of b-1, c-1"}},
	} {
		got := missing(tc.st)
		if (got == "") != (tc.says == nil) {
			t.Errorf("%s: %q", name, got)
		}
		for _, part := range tc.says {
			if !strings.Contains(got, part) {
				t.Errorf("%s: %q does not say %q", name, got, part)
			}
		}
	}
}
