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
)

// read answers a question, with the parameters named.
func (s *Server) read(h handler, parameters ...string) http.Handler {
	return s.authorized(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query, err := readQuery(r, parameters)
		author := ""
		if err == nil {
			author, err = readAuthor(query.Get("author"))
		}
		if err != nil {
			s.refuse(w, r, err)
			return
		}
		if err := s.answer(w, r, h, call{path: r.PathValue, query: query, author: author}); err != nil {
			s.refuse(w, r, err)
		}
	}))
}

// change does what was asked and leaves a line in the log. It takes the
// parameters named, and ?author=, who says to make the change.
func (s *Server) change(h handler, parameters ...string) http.Handler {
	parameters = append(parameters, "author")
	return s.authorized(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := readCall(w, r, parameters)
		if err == nil {
			err = s.answer(w, r, h, c)
		}
		attrs := []slog.Attr{
			slog.String("method", r.Method), slog.String("path", r.URL.Path),
			slog.String("author", c.author), slog.String("remote", r.RemoteAddr),
		}
		if err != nil {
			s.refuse(w, r, err)
			s.log.LogAttrs(r.Context(), slog.LevelWarn, "operator's change refused", append(attrs, slog.Any("error", err))...)
			return
		}
		s.log.LogAttrs(r.Context(), slog.LevelInfo, "operator's change made", attrs...)
	}))
}

// answer calls h within the time limit and sends what it gives. An error was
// not sent yet.
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

// refuse writes an error's words. What we have no name for is logged: it is ours.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, context.Canceled) && r.Context().Err() != nil {
		return // the asker has gone
	}
	status, body := describe(err)
	switch status {
	case http.StatusInternalServerError:
		s.log.LogAttrs(r.Context(), slog.LevelError, "admin request failed",
			slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Any("error", err))
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
	// Who does not take the answer must not hold the goroutine. A recorder in
	// a test has no deadline to set, which is fine.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.timeout))
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// The asker may have gone; nobody is left to tell.
	_, _ = w.Write(append(text, '\n'))
}

func readCall(w http.ResponseWriter, r *http.Request, parameters []string) (call, error) {
	c := call{path: r.PathValue}
	var err error
	if c.query, err = readQuery(r, parameters); err != nil {
		return c, err
	}
	if c.author, err = readAuthor(c.query.Get("author")); err != nil {
		return c, err
	}
	c.body, err = readBody(w, r)
	return c, err
}

// readQuery refuses parameters that nobody knows: a misspelt expect_version
// must not become an unconditional change.
func readQuery(r *http.Request, known []string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("%w: the query can't be read: %w", ErrInvalidRequest, err)
	}
	for name, values := range q {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("%w: unknown parameter %s", ErrInvalidRequest, quote(name))
		}
		if len(values) > 1 {
			return nil, fmt.Errorf("%w: parameter %s stands there twice", ErrInvalidRequest, name)
		}
	}
	return q, nil
}

// maxAuthor bounds a name that is kept in the history for ever.
const maxAuthor = 200

// readAuthor is a note on who made a change, not a proof.
func readAuthor(who string) (string, error) {
	if len(who) > maxAuthor || !utf8.ValidString(who) || strings.ContainsFunc(who, unicode.IsControl) {
		return "", fmt.Errorf("%w: author must be one line of at most %d bytes of text", ErrInvalidRequest, maxAuthor)
	}
	if who == "" {
		return "unknown", nil
	}
	return who, nil
}

// readBody reads at most maxBody bytes within bodyTimeout.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	control := http.NewResponseController(w)
	// A recorder in a test has no deadlines, which is fine.
	_ = control.SetReadDeadline(time.Now().Add(bodyTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	// Left in place it would end the request's context while we work.
	_ = control.SetReadDeadline(time.Time{})
	var over *http.MaxBytesError
	switch {
	case errors.As(err, &over):
		return nil, fmt.Errorf("%w: at most %d bytes are taken", ErrTooLarge, over.Limit)
	case err != nil:
		return nil, fmt.Errorf("%w: the body can't be read: %w", ErrInvalidRequest, err)
	}
	return body, nil
}
