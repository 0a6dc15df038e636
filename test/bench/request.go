//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// target is a proxy or the upstream itself.
type target struct {
	name string
	addr string   // host:port
	key  string   // API key
	proc *process // nil for the upstream, whose process is not measured
}

const chatPath = "/v1/chat/completions"

// body is a request body of typical size, 350 bytes.
func body(model string, stream bool) string {
	return fmt.Sprintf(`{"model":"%s","stream":%v,"messages":[{"role":"system","content":"You are a helpful assistant."},{"role":"user","content":"Tell me, in about 160 words, what a quick brown fox does all day long, and why the dog is lazy."}],"temperature":0.7,"max_tokens":256}`, model, stream)
}

// request returns the bytes of a whole request.
func (t target) request(model string, stream bool) []byte { return t.post(body(model, stream)) }

func (t target) post(b string) []byte {
	return fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nAccept: */*\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s",
		chatPath, t.addr, t.key, len(b), b)
}

// client is one connection of the load generator.
type client struct {
	conn net.Conn
	in   *bufio.Reader
}

var errWrong = errors.New("wrong answer")

// answerWithin is far above the time that any request here takes.
const answerWithin = 20 * time.Second

func dial(ctx context.Context, addr string) (*client, error) {
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &client{conn: conn, in: bufio.NewReaderSize(conn, 8<<10)}, nil
}

func (c *client) close() { _ = c.conn.Close() }

// ask sends a request and reads the whole answer, which must be the upstream's.
func (c *client) ask(request []byte) error {
	_, err := c.answer(request)
	return err
}

// answer is ask, and returns the header.
func (c *client) answer(request []byte) (http.Header, error) {
	if err := c.conn.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return nil, err
	}
	if _, err := c.conn.Write(request); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || !bytes.Contains(text, []byte(answerMark)) {
		return nil, fmt.Errorf("%w: status %d: %.100s", errWrong, resp.StatusCode, text)
	}
	if resp.Close {
		return nil, io.EOF
	}
	return resp.Header, nil
}

var (
	dataPrefix = []byte("data: ")
	doneData   = []byte("[DONE]")
	finishText = []byte(`"finish_reason":"stop"`)
)

// stream asks for a stream and reads it to its end: each event once and in order, then
// a finish reason and [DONE]. It appends the time of each event to arrived.
func (c *client) stream(request []byte, events int, arrived []time.Time) ([]time.Time, error) {
	if err := c.conn.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return arrived, err
	}
	if _, err := c.conn.Write(request); err != nil {
		return arrived, err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return arrived, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 100)) // the status is reported anyway
		return arrived, fmt.Errorf("%w: status %d: %s", errWrong, resp.StatusCode, text)
	}
	lines := bufio.NewReaderSize(resp.Body, 1<<10)
	finished := false
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			return arrived, fmt.Errorf("the stream broke after %d events: %w", len(arrived), err)
		}
		data, ok := bytes.CutPrefix(bytes.TrimRight(line, "\r\n"), dataPrefix)
		switch {
		case !ok: // a comment or an empty line
		case bytes.Equal(data, doneData):
			if !finished || len(arrived) != events {
				return arrived, fmt.Errorf("%w: [DONE] after %d of %d events, finish reason: %v", errWrong, len(arrived), events, finished)
			}
			return arrived, nil
		case bytes.Contains(data, finishText):
			finished = true
		case bytes.Contains(data, []byte(eventText(len(arrived)))):
			arrived = append(arrived, time.Now())
		default:
			return arrived, fmt.Errorf("%w: in place of event %d: %.100s", errWrong, len(arrived), data)
		}
	}
}

// answers waits for the target's first correct answer.
func (t target) answers(ctx context.Context, p *process) error {
	request := t.request(modelAtOnce, false)
	err := p.until(ctx, func() error {
		c, err := dial(ctx, t.addr)
		if err != nil {
			return err
		}
		defer c.close()
		return c.ask(request)
	})
	if err != nil {
		return fmt.Errorf("wait for %s: %w", t.name, err)
	}
	return nil
}
