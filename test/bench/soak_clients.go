//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"time"
)

// comeAndGo runs one client after another until ctx ends. One in four is patient and
// must get a correct answer.
func (s *soak) comeAndGo(ctx context.Context) {
	for pause(ctx, rand.N(200*time.Millisecond)) == nil {
		// The end of ctx must not cut off the dial, which would count as a failure.
		c, err := dial(context.WithoutCancel(ctx), s.node.api)
		if err != nil {
			s.counts.failures.fail(err)
			continue
		}
		streamed := rand.IntN(2) == 0
		request := s.target().request(modelBusy, streamed)
		if rand.IntN(4) == 0 {
			if err := c.patient(request, streamed); err != nil {
				s.counts.failures.fail(err)
			}
			s.counts.served.Add(1)
		} else {
			c.impatient(ctx, request)
			s.counts.aborted.Add(1)
		}
		c.close()
	}
}

// patient reads the whole answer.
func (c *client) patient(request []byte, streamed bool) error {
	if err := c.conn.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return err
	}
	if _, err := c.conn.Write(request); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	end := `"finish_reason"`
	if streamed {
		end = "data: [DONE]\n\n"
	}
	if resp.StatusCode != http.StatusOK || !bytes.Contains(text, []byte(end)) {
		return fmt.Errorf("%w: status %d: %.200s", errWrong, resp.StatusCode, text)
	}
	return nil
}

// impatient leaves: with the request half sent, while it waits, or in the middle
// of the answer; half of the time with a reset.
func (c *client) impatient(ctx context.Context, request []byte) {
	if rand.IntN(2) == 0 {
		if tcp, ok := c.conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // else it just closes
		}
	}
	// The client disconnects whatever happens, so errors don't matter.
	switch rand.IntN(4) {
	case 0:
		_, _ = c.conn.Write(request[:rand.IntN(len(request))])
		_ = pause(ctx, rand.N(50*time.Millisecond))
	case 1:
		_, _ = c.conn.Write(request)
	case 2:
		_, _ = c.conn.Write(request)
		_ = pause(ctx, rand.N(150*time.Millisecond))
	default:
		_ = c.conn.SetDeadline(time.Now().Add(200 * time.Millisecond)) // some answers are shorter
		_, _ = c.conn.Write(request)
		_, _ = io.CopyN(io.Discard, c.in, rand.Int64N(4<<10))
	}
}

// watchUpstreams checks once a second whether the node shows an upstream as unhealthy,
// and keeps the first such reason.
func (s *soak) watchUpstreams(ctx context.Context) {
	for pause(ctx, time.Second) == nil {
		all, err := s.node.admin.Upstreams(ctx)
		if err != nil {
			continue // load reports a node that has ended
		}
		for _, u := range all {
			if u.State == "unhealthy" {
				why := fmt.Sprintf("%s was shown as unhealthy: %s", u.Name, u.Reason)
				s.marked.CompareAndSwap(nil, &why)
			}
		}
	}
}
