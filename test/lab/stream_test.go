//go:build linux

package lab

import (
	"errors"
	"strings"
	"testing"
)

func TestReadStream(t *testing.T) {
	const (
		hello = `data: {"id":"1","choices":[{"delta":{"content":"Hel"}}]}` + "\n\n" + `data: {"id":"1","choices":[{"delta":{"content":"lo"}}]}` + "\n\n"
		end   = `data: {"id":"1","choices":[{"delta":{},"finish_reason":"stop"}]}` + "\n\n"
		done  = "data: [DONE]\n\n"
	)
	for _, c := range []struct {
		name, stream string
		want         error
	}{
		{"complete", hello + end + done, nil},
		{"with comments and CRLF", ": keep-alive\r\n\r\n" + strings.ReplaceAll(hello+end+done, "\n", "\r\n"), nil},
		{"cut off", hello, errStreamTruncated},
		{"finish reason but no DONE", hello + end, errStreamTruncated},
		{"false DONE", hello + done, errFalseDone},
		{"explicit error", hello + `data: {"error":{"message":"gone"}}` + "\n\n", errStreamError},
		{"more after DONE", hello + end + done + hello, errAfterDone},
	} {
		t.Run(c.name, func(t *testing.T) {
			text, err := readStream(strings.NewReader(c.stream))
			if !errors.Is(err, c.want) || (c.want == nil && err != nil) {
				t.Errorf("got error %v, want %v", err, c.want)
			}
			if text != "Hello" {
				t.Errorf("got text %q", text)
			}
		})
	}
	other := `data: {"id":"2","choices":[{"delta":{"content":"x"}}]}` + "\n\n"
	if _, err := readStream(strings.NewReader(hello + other)); err == nil {
		t.Error("a stream whose id changes was accepted")
	}
}

func TestTwoPrimariesAreNoticed(t *testing.T) {
	b := newLawCheck()
	say := func(pid int, generation, epoch uint64, site string) {
		b.check(Observation{Node: "n", PID: pid, Generation: generation, Epoch: epoch, Primary: site})
	}
	say(1, 1, 1, "a")
	say(2, 1, 1, "a")
	say(2, 1, 2, "b")
	say(3, 1, 1, "a") // another process may be behind
	if len(b.broken) != 0 {
		t.Fatalf("reported without a violation: %v", b.broken)
	}
	say(3, 1, 2, "c")
	say(2, 1, 1, "a")
	if len(b.broken) != 2 {
		t.Errorf("reported %v, want two primaries of one epoch and a node that went back", b.broken)
	}
}
