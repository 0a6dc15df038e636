//go:build linux

package main

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// result is the outcome of one load. Times are in seconds.
type result struct {
	Done    int            `json:"done"`
	Failed  int            `json:"failed"`
	Late    int            `json:"late,omitempty"` // open loop: started too late
	Errors  map[string]int `json:"errors,omitempty"`
	Seconds float64        `json:"seconds"`
	P50     float64        `json:"p50"` // of whole answers
	P99     float64        `json:"p99"`
	P999    float64        `json:"p999,omitempty"`
	// Of streams: time to the first event, and between events.
	FirstP50 float64 `json:"first_p50,omitempty"`
	FirstP99 float64 `json:"first_p99,omitempty"`
	GapP99   float64 `json:"gap_p99,omitempty"`
}

// tally collects the outcomes of many clients.
type tally struct {
	mu           sync.Mutex // guards all below
	took         []time.Duration
	first, gaps  []time.Duration
	failed, late int
	errors       map[string]int
}

// differentErrors bounds the error texts that are kept.
const differentErrors = 8

func (t *tally) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed++
	text := err.Error()
	if t.errors == nil {
		t.errors = map[string]int{}
	}
	if _, known := t.errors[text]; known || len(t.errors) < differentErrors {
		t.errors[text]++
	}
}

func (t *tally) add(took []time.Duration, late int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.took = append(t.took, took...)
	t.late += late
}

func (t *tally) result(took time.Duration) result {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range [][]time.Duration{t.took, t.first, t.gaps} {
		slices.Sort(d)
	}
	return result{
		Done: len(t.took), Failed: t.failed, Late: t.late, Errors: t.errors, Seconds: took.Seconds(),
		P50: quantile(t.took, 0.5), P99: quantile(t.took, 0.99), P999: quantile(t.took, 0.999),
		FirstP50: quantile(t.first, 0.5), FirstP99: quantile(t.first, 0.99), GapP99: quantile(t.gaps, 0.99),
	}
}

// quantile of sorted times, in seconds; 0 without any.
func quantile(sorted []time.Duration, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[int(q*float64(len(sorted)-1)+0.5)].Seconds()
}

// median of values; 0 without any.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	v := slices.Sorted(slices.Values(values))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// connection is a client that dials again after a failure.
type connection struct {
	addr string
	c    *client
}

// do sends a request, after dialling if there is no connection.
func (k *connection) do(ctx context.Context, send func(*client) error) error {
	if k.c == nil {
		c, err := dial(ctx, k.addr)
		if err != nil {
			_ = pause(ctx, 10*time.Millisecond) // the caller tries again at once
			return err
		}
		k.c = c
	}
	err := send(k.c)
	if err != nil {
		k.close()
	}
	return err
}

func (k *connection) close() {
	if k.c != nil {
		k.c.close()
		k.c = nil
	}
}

// closedLoop keeps a number of connections busy: each sends its next request after the
// answer to the one before.
func closedLoop(ctx context.Context, t target, model string, connections int, d time.Duration) result {
	return closedLoopOf(ctx, t.addr, (*client).ask, t.request(model, false), connections, d)
}

// closedLoopOf is closedLoop for any request, sent by any function.
func closedLoopOf(ctx context.Context, addr string, send func(*client, []byte) error, request []byte, connections int, d time.Duration) result {
	var all tally
	begun := time.Now()
	var clients sync.WaitGroup
	for range connections {
		clients.Go(func() {
			k := connection{addr: addr}
			defer k.close()
			var took []time.Duration
			for ctx.Err() == nil {
				start := time.Now()
				if start.Sub(begun) > d {
					break
				}
				if err := k.do(ctx, func(c *client) error { return send(c, request) }); err != nil {
					all.fail(err)
					continue
				}
				took = append(took, time.Since(start))
			}
			all.add(took, 0)
		})
	}
	clients.Wait()
	return all.result(time.Since(begun))
}

// openLoop starts requests by the clock, whether or not earlier ones have been
// answered. A request for which no connection was free starts late; its latency counts
// from the time when it was due.
func openLoop(ctx context.Context, t target, model string, rate float64, connections int, d time.Duration) result {
	request := t.request(model, false)
	return openLoopOf(ctx, t.addr, func(c *client, _ int64) error { return c.ask(request) }, rate, connections, d)
}

// openLoopOf is openLoop for any requests. Send gets the request's number.
func openLoopOf(ctx context.Context, addr string, send func(*client, int64) error, rate float64, connections int, d time.Duration) result {
	var all tally
	var next atomic.Int64
	begun := time.Now()
	total := int64(rate * d.Seconds())
	var clients sync.WaitGroup
	for range connections {
		clients.Go(func() {
			k := connection{addr: addr}
			defer k.close()
			var took []time.Duration
			late := 0
			for ctx.Err() == nil {
				i := next.Add(1) - 1
				if i >= total {
					break
				}
				start := begun.Add(time.Duration(float64(i) / rate * float64(time.Second)))
				if wait := time.Until(start); wait > 0 {
					if pause(ctx, wait) != nil {
						break
					}
					start = time.Now() // the timer's delay does not count
				} else {
					late++
				}
				if err := k.do(ctx, func(c *client) error { return send(c, i) }); err != nil {
					all.fail(err)
					continue
				}
				took = append(took, time.Since(start))
			}
			all.add(took, late)
		})
	}
	clients.Wait()
	return all.result(time.Since(begun))
}

// burst is a number of streams that start within a time.
type burst struct {
	streams int
	within  time.Duration // their starts are evenly spread
	events  int
	every   time.Duration
}

// length returns the least time that the burst takes.
func (b burst) length() time.Duration { return b.within + time.Duration(b.events)*b.every }

// streams starts a burst, each stream on a new connection, and reads all streams to
// their ends.
func streams(ctx context.Context, t target, b burst) result {
	request := t.request(modelStream(b.events, b.every), true)
	var all tally
	begun := time.Now()
	var clients sync.WaitGroup
	for i := range b.streams {
		clients.Go(func() {
			if pause(ctx, b.within*time.Duration(i)/time.Duration(b.streams)) != nil {
				return
			}
			c, err := dial(ctx, t.addr)
			if err != nil {
				all.fail(err)
				return
			}
			defer c.close()
			start := time.Now()
			arrived, err := c.stream(request, b.events, make([]time.Time, 0, b.events))
			if err != nil {
				all.fail(err)
				return
			}
			all.stream(start, arrived)
		})
	}
	clients.Wait()
	return all.result(time.Since(begun))
}

// stream adds a complete stream.
func (t *tally) stream(start time.Time, arrived []time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.took = append(t.took, time.Since(start))
	t.first = append(t.first, arrived[0].Sub(start))
	for i := 1; i < len(arrived); i++ {
		t.gaps = append(t.gaps, arrived[i].Sub(arrived[i-1]))
	}
}
