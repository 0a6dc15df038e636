//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// look is what a node uses at one moment.
type look struct {
	goroutines, sockets, inFlight int64
	heap, anonymous               int64 // bytes; the heap after a collection
	opened                        int64 // breakers since the start
}

// What a node uses varies by this much without requests.
const (
	spareGoroutines = 4
	spareSockets    = 2
	spareMemory     = 8 << 20
)

// returned returns an error for each figure that exceeds that of an earlier look.
func (l look) returned(before look) error {
	var left []error
	check := func(what string, have, most int64) {
		if have > most {
			left = append(left, fmt.Errorf("%w: %d %s, want %d at most", errLeft, have, what, most))
		}
	}
	check("requests in flight", l.inFlight, 0)
	check("goroutines", l.goroutines, before.goroutines+spareGoroutines)
	check("sockets", l.sockets, before.sockets+spareSockets)
	check("bytes of live heap", l.heap, before.heap+before.heap/4+spareMemory)
	check("bytes of anonymous memory", l.anonymous, before.anonymous+before.anonymous/4+spareMemory)
	return errors.Join(left...)
}

// settled waits until the node uses no more than before or, without an earlier look,
// no more than a second ago. After settleWithin it returns the last look in any case.
func (s *soak) settled(ctx context.Context, before look) (look, error) {
	deadline := time.Now().Add(settleWithin)
	first := before == look{}
	for wait := s.settle; ; wait = time.Second {
		if err := pause(ctx, wait); err != nil {
			return look{}, err
		}
		now, err := s.look(ctx)
		if err != nil {
			return look{}, fmt.Errorf("look at the node: %w", err)
		}
		if now.inFlight == 0 && before != (look{}) && now.returned(before) == nil || time.Now().After(deadline) {
			return now, nil
		}
		if first {
			before = now
		}
	}
}

// look asks the node for its figures, after a garbage collection.
func (s *soak) look(ctx context.Context) (l look, err error) {
	heap, err := fetch(ctx, s.node.admin.URLs()[0]+"/debug/pprof/heap?gc=1&debug=1")
	if err != nil {
		return l, err
	}
	metrics, err := fetch(ctx, s.node.admin.URLs()[0]+"/metrics")
	if err != nil {
		return l, err
	}
	for _, want := range []struct {
		text, name string
		to         *int64
	}{
		{heap, "# HeapAlloc = ", &l.heap},
		{metrics, "go_goroutines ", &l.goroutines},
		{metrics, "dsnode_requests_in_flight ", &l.inFlight},
	} {
		if *want.to, err = number(want.text, want.name); err != nil {
			return l, err
		}
	}
	n, err := sockets(s.node.pid())
	if err != nil {
		return l, err
	}
	l.sockets = int64(n)
	if l.anonymous, err = anonymous(s.node.pid()); err != nil {
		return l, err
	}
	l.opened, err = breakersOpened(s.node.log)
	return l, err
}

// fetch returns the body of a GET.
func fetch(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%w: GET %s: %s", errWrong, url, resp.Status)
	}
	return string(text), nil
}

// number returns the number after a name at the start of a line.
func number(text, name string) (int64, error) {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			var f float64
			if _, err := fmt.Sscan(rest, &f); err != nil {
				return 0, fmt.Errorf("read %s: %w", name, err)
			}
			return int64(f), nil
		}
	}
	return 0, fmt.Errorf("%w: no %q", errWrong, name)
}

// breakersOpened counts the openings of breakers in the node's log. The metrics would
// not show a breaker that opened and closed between two looks.
func breakersOpened(log string) (int64, error) {
	text, err := os.ReadFile(log)
	if err != nil {
		return 0, fmt.Errorf("read the node's log: %w", err)
	}
	n := int64(0)
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, `"msg":"breaker"`) && strings.Contains(line, `"state":"open"`) {
			n++
		}
	}
	return n, nil
}
