//go:build linux

package lab

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// What a stream can end in other than a finish reason and [DONE]. Law 9 allows the
// first, an explicit error, and forbids the others.
var (
	errStreamError     = errors.New("the stream ended in an error event")
	errStreamTruncated = errors.New("the stream ended without [DONE]")
	errFalseDone       = errors.New("the stream says [DONE] without a finish reason")
	errAfterDone       = errors.New("the stream goes on after [DONE]")
)

// readStream returns the text of a streamed chat completion.
func readStream(r io.Reader) (string, error) {
	var text strings.Builder
	var finished, done bool
	id := ""
	lines := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) && line == "" {
			break
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return text.String(), fmt.Errorf("%w: %w", errStreamTruncated, err)
		}
		data, isData := strings.CutPrefix(strings.TrimRight(line, "\r\n"), "data: ")
		switch {
		case !isData:
			continue
		case done:
			return text.String(), errAfterDone
		case data == "[DONE]":
			done = true
			continue
		}
		var event struct {
			ID      string          `json:"id"`
			Error   json.RawMessage `json:"error"`
			Choices []struct {
				Delta        struct{ Content string }
				FinishReason string `json:"finish_reason"`
			}
		}
		if err := json.Unmarshal([]byte(data), &event); err != nil {
			return text.String(), fmt.Errorf("an event is not JSON: %w", err)
		}
		if event.Error != nil {
			return text.String(), fmt.Errorf("%w: %s", errStreamError, event.Error)
		}
		if id == "" {
			id = event.ID
		} else if event.ID != id {
			return text.String(), fmt.Errorf("the id changed from %s to %s within a stream", id, event.ID)
		}
		for _, c := range event.Choices {
			text.WriteString(c.Delta.Content)
			finished = finished || c.FinishReason != ""
		}
	}
	switch {
	case !done:
		return text.String(), errStreamTruncated
	case !finished:
		return text.String(), errFalseDone
	}
	return text.String(), nil
}

// LawfulEnd reports whether a stream ended as law 9 allows: complete or with an
// explicit error.
func LawfulEnd(r Result) bool { return r.Err == nil || errors.Is(r.Err, errStreamError) }
