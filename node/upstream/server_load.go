package upstream

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/cluster/config"
)

// vLLM and SGLang report how many requests they run and queue, whoever sent them.
// Requests of other nodes and of other clients of the same server show nowhere else.

const (
	// maxReport bounds a metrics page, maxReportLine one line of it.
	maxReport     = 1 << 20
	maxReportLine = 16 << 10
	// reportAge is how long a figure counts: three rounds of probes.
	reportAge = 3 * probeEvery
	// reportPause follows an answer without figures: SGLang has them only when
	// started with --enable-metrics, and its log should not fill with refusals.
	reportPause = time.Minute
)

// report is a server's own count of its requests.
type report struct {
	at      time.Time
	foreign int64 // running and queued there, without this node's
	silent  bool  // it had no figures
}

var reportNames = map[config.UpstreamKind][]string{
	config.KindVLLM:   {"vllm:num_requests_running", "vllm:num_requests_waiting"},
	config.KindSGLang: {"sglang:num_running_reqs", "sglang:num_queue_reqs"},
}

// reports says whether it is worth asking for figures now.
func (i *instance) reports(now time.Time) bool {
	if reportNames[i.def.Kind] == nil {
		return false
	}
	r := i.reported.Load()
	return r == nil || !r.silent || now.Sub(r.at) >= reportPause
}

// readLoad reads the figures. They only help to choose, so a failure says nothing
// against the server.
func (f *Fleet) readLoad(ctx context.Context, i *instance) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	// This node's requests there are counted already. They are taken before: one that
	// starts meanwhile is counted twice rather than not at all.
	own := i.inFlight.Load()
	total, err := i.askLoad(ctx)
	if ctx.Err() != nil {
		return // the old figure expires
	}
	before := i.reported.Swap(&report{at: f.o.Now(), foreign: max(0, total-own), silent: err != nil})
	if err != nil && (before == nil || !before.silent) {
		f.log.Debug("upstream reports no load", append(i.logAttrs(), "err", err)...)
	}
}

func (i *instance) askLoad(ctx context.Context) (int64, error) {
	at := i.base.join("/metrics")
	resp, err := i.get(ctx, at)
	if err != nil {
		return 0, cause.Of(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		discard(resp.Body)
		return 0, fmt.Errorf("%s answered %d", at.Path, resp.StatusCode)
	}
	return sumSeries(io.LimitReader(resp.Body, maxReport), reportNames[i.def.Kind])
}

// sumSeries adds up all series of the names in a page of Prometheus' text
// format: a server of several engines has one of each. All names must be there.
func sumSeries(page io.Reader, names []string) (int64, error) {
	lines := bufio.NewScanner(page)
	lines.Buffer(nil, maxReportLine)
	var sum float64
	seen := make([]bool, len(names))
	for lines.Scan() {
		for i, name := range names {
			if v, ok := seriesValue(lines.Bytes(), name); ok {
				sum += v
				seen[i] = true
			}
		}
	}
	if err := lines.Err(); err != nil {
		return 0, fmt.Errorf("read metrics: %w", cause.Of(err))
	}
	for i, name := range names {
		if !seen[i] {
			return 0, fmt.Errorf("no %s in the metrics", name)
		}
	}
	return int64(min(sum, 1<<30)), nil
}

// seriesValue reads `name value` or `name{labels} value`, with or without a
// timestamp after it. Negative values and NaN are no values.
func seriesValue(line []byte, name string) (float64, bool) {
	rest, ok := bytes.CutPrefix(line, []byte(name))
	if !ok || len(rest) == 0 {
		return 0, false
	}
	switch rest[0] {
	case ' ', '\t':
	case '{':
		end := labelsEnd(rest)
		if end < 0 {
			return 0, false
		}
		rest = rest[end:]
	default:
		return 0, false // a longer name
	}
	fields := bytes.Fields(rest)
	if len(fields) == 0 || len(fields) > 2 {
		return 0, false
	}
	v, err := strconv.ParseFloat(string(fields[0]), 64)
	return v, err == nil && v >= 0
}

// labelsEnd is where labels end that begin at 0. A label's value may hold braces.
func labelsEnd(b []byte) int {
	inside := false
	for i := 1; i < len(b); i++ {
		switch {
		case inside && b[i] == '\\':
			i++
		case b[i] == '"':
			inside = !inside
		case !inside && b[i] == '}':
			return i + 1
		}
	}
	return -1
}

// load adds the requests that others have sent there, as far as they are known.
func (i *instance) load(now time.Time) load {
	l := i.backend.load(now)
	if r := i.reported.Load(); r != nil && !r.silent && now.Sub(r.at) < reportAge {
		l.inFlight += r.foreign
	}
	return l
}
