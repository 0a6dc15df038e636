package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dsnode/dsnode/node/ports"
)

// read makes a handler for a GET, which takes the given parameters.
func (s *Server) read(h handler, parameters ...string) http.Handler {
	return s.authorized(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := readCall(r, parameters)
		if err == nil {
			err = s.answer(w, r, h, c)
		}
		if err != nil {
			s.refuse(w, r, err)
		}
	}))
}

// change makes a handler for a change, and logs it. It takes the given parameters and
// ?author=, the name of the person who makes the change.
func (s *Server) change(h handler, parameters ...string) http.Handler {
	parameters = append(parameters, "author")
	return s.authorized(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := readCall(r, parameters)
		if err == nil {
			c.body, err = readBody(w, r)
		}
		if err == nil {
			err = s.answer(w, r, h, c)
		}
		attrs := []slog.Attr{
			slog.String("method", r.Method), slog.String("path", r.URL.Path),
			slog.String("author", c.author), slog.String("remote", r.RemoteAddr),
		}
		if err != nil {
			s.refuse(w, r, err)
			s.log.LogAttrs(r.Context(), slog.LevelWarn, "operator's change refused", append(attrs, slog.Any("err", err))...)
			return
		}
		s.log.LogAttrs(r.Context(), slog.LevelInfo, "operator's change made", attrs...)
	}))
}

// answer calls h within the time limit and sends its value. If it returns an error,
// nothing was sent.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, h handler, c call) error {
	ctx, cancel := context.WithTimeout(r.Context(), s.timeout)
	defer cancel()
	value, err := h(ctx, c)
	if err != nil {
		return err
	}
	if value == nil {
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	s.writeJSON(w, http.StatusOK, value)
	return nil
}

// refuse sends an error. An internal error is logged too.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, context.Canceled) && r.Context().Err() != nil {
		return // the client has disconnected
	}
	status, body := describe(err)
	switch status {
	case http.StatusInternalServerError:
		s.log.LogAttrs(r.Context(), slog.LevelError, "admin request failed",
			slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Any("err", err))
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", `Bearer realm="dsnode admin"`)
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	}
	s.writeJSON(w, status, body)
}

func (s *Server) writeJSON(w http.ResponseWriter, status int, value any) {
	text, err := json.Marshal(value)
	if err != nil {
		// Only a programming error gets here: all values are our own types.
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	// A client that does not read must not block the goroutine. A test's recorder
	// supports no deadline, so the error is ignored.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.timeout))
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// The client may have disconnected: the error can't be reported.
	_, _ = w.Write(append(text, '\n'))
}

// readCall reads a request, without its body.
func readCall(r *http.Request, parameters []string) (call, error) {
	c := call{path: r.PathValue}
	var err error
	if c.query, err = readQuery(r, parameters); err != nil {
		return c, err
	}
	c.author, err = readAuthor(c.query.Get("author"))
	return c, err
}

// readQuery refuses unknown parameters: a misspelt expect_version must not become an
// unconditional change.
func readQuery(r *http.Request, known []string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("%w: the query is malformed: %w", ErrInvalidRequest, err)
	}
	for name, values := range q {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("%w: unknown parameter %s", ErrInvalidRequest, quote(name))
		}
		if len(values) > 1 {
			return nil, fmt.Errorf("%w: parameter %s is given twice", ErrInvalidRequest, name)
		}
	}
	return q, nil
}

// maxAuthor bounds a name that the history keeps.
const maxAuthor = 200

// readAuthor checks the name of the person who makes a change. It proves no identity.
func readAuthor(who string) (string, error) {
	if len(who) > maxAuthor || !utf8.ValidString(who) || strings.ContainsFunc(who, unicode.IsControl) {
		return "", fmt.Errorf("%w: author must be one line of at most %d bytes of text", ErrInvalidRequest, maxAuthor)
	}
	if who == "" {
		return "unknown", nil
	}
	return who, nil
}

// readBody reads at most maxBody bytes. ServeHTTP has set the deadline.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	control := http.NewResponseController(w)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil {
		// If it stayed, it would end the request's context during the work. A test's
		// recorder supports no deadlines, so errors are ignored.
		_ = control.SetReadDeadline(time.Time{})
		ports.Received(r.Context())
	}
	var over *http.MaxBytesError
	switch {
	case errors.As(err, &over):
		return nil, fmt.Errorf("%w: at most %d bytes are allowed", ErrTooLarge, over.Limit)
	case err != nil:
		return nil, fmt.Errorf("%w: the body can't be read: %w", ErrInvalidRequest, err)
	}
	return body, nil
}
