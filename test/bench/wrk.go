//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// wrk is a load generator in C, which uses less CPU than the built-in one. It does not
// check bodies, so a warm-up with the built-in one runs first.

const wrkScript = `wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
wrk.body = os.getenv("BENCH_BODY")
`

var errWrk = errors.New("wrk")

// wrk posts the same body over some connections for whole seconds.
func (s *sandbox) wrk(ctx context.Context, binary string, t target, body string, connections int, d time.Duration) (result, error) {
	script := filepath.Join(s.dir, "wrk.lua")
	if err := os.WriteFile(script, []byte(wrkScript), 0o600); err != nil {
		return result{}, fmt.Errorf("write wrk's script: %w", err)
	}
	seconds := max(1, int(d.Round(time.Second)/time.Second)) // it takes whole seconds
	cmd := exec.CommandContext(ctx, binary, "-t", strconv.Itoa(min(2, connections)), "-c", strconv.Itoa(connections),
		"-d", strconv.Itoa(seconds)+"s", "--latency", "-s", script, "http://"+t.addr+chatPath)
	cmd.Env = append(os.Environ(), "BENCH_KEY="+t.key, "BENCH_BODY="+body)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return result{}, fmt.Errorf("%w: %w: %s", errWrk, err, out)
	}
	return readWrk(string(out))
}

var (
	wrkQuantile = regexp.MustCompile(`(?m)^\s+(50|99)%\s+([\d.]+)(us|ms|s|m)\s*$`)
	wrkTotal    = regexp.MustCompile(`(\d+) requests in ([\d.]+)(ms|s|m)\b`)
	wrkRefused  = regexp.MustCompile(`Non-2xx or 3xx responses: (\d+)`)
	wrkSockets  = regexp.MustCompile(`Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)`)
)

var wrkUnits = map[string]float64{"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60}

// readWrk reads what wrk --latency prints.
func readWrk(out string) (result, error) {
	var r result
	number := func(text string) float64 {
		f, _ := strconv.ParseFloat(text, 64) // the expressions match only numbers
		return f
	}
	total := wrkTotal.FindStringSubmatch(out)
	if total == nil {
		return r, fmt.Errorf("%w: can't read what it printed: %s", errWrk, out)
	}
	r.Done, r.Seconds = int(number(total[1])), number(total[2])*wrkUnits[total[3]]
	for _, q := range wrkQuantile.FindAllStringSubmatch(out, -1) {
		to := &r.P50
		if q[1] == "99" {
			to = &r.P99
		}
		*to = number(q[2]) * wrkUnits[q[3]]
	}
	if m := wrkRefused.FindStringSubmatch(out); m != nil {
		n := int(number(m[1]))
		r.Done -= n
		r.Failed += n
		r.Errors = map[string]int{"no 200": n}
	}
	if m := wrkSockets.FindStringSubmatch(out); m != nil {
		for _, n := range m[1:] {
			r.Failed += int(number(n))
		}
		if r.Errors == nil {
			r.Errors = map[string]int{}
		}
		r.Errors[strings.TrimSpace(m[0])]++
	}
	return r, nil
}
