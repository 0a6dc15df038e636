package journal

import (
	"log/slog"
	"strings"
	"testing"
)

// A log in JSON shows ids as people and the API write them, so that one can search for them.
func TestIdsInLogs(t *testing.T) {
	var out strings.Builder
	stream := Stream{Origin: "a-1", Incarnation: Incarnation{1, 2, 15: 0xff}}
	slog.New(slog.NewJSONHandler(&out, nil)).Info("test", "job", JobID{1, 2, 15: 0xff}, "stream", stream, "incarnation", stream.Incarnation)
	for _, want := range []string{
		`"job":"job_010200000000000000000000000000ff"`,
		`"stream":"a-1/010200000000000000000000000000ff"`, `"incarnation":"010200000000000000000000000000ff"`,
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s lacks %s", out.String(), want)
		}
	}
}
