// Package modelsim is a simulated model server with OpenAI's API. It answers
// deterministically and can fail on command. `dsnode dev`, tests and the benchmarks use
// it. Start reading at Server.ServeHTTP.
//
// # Model endpoints, with and without /v1
//
//	POST /chat/completions   plain and stream
//	POST /completions        plain and stream
//	POST /embeddings         float and base64, dimensions
//	POST anything else       a small JSON echo: endpoint, model, SHA-256 of the body
//	GET  /models, /models/{id}, /health
//
// The text of an answer depends only on the messages (or the prompt), starts with their
// short hash, and is cut at max_tokens. So every simulated server gives the same text to
// the same question, plain or streamed. One word is one token. A model whose name
// contains "reasoner" sends reasoning_content first. With tools and tool_choice
// "required" (or a named function) the answer is a tool call.
//
// # Speed
//
// Options.FirstToken and Options.Rate set the time to the first token and the
// tokens per second. A request can override them, and the number of tokens, in its model
// name, "m@first=60ms,rate=50,tokens=50", or with the headers X-Sim-First-Token,
// X-Sim-Rate and X-Sim-Tokens. The model's name is the part before the "@".
//
// # Control
//
//	GET    /sim/requests   the newest requests, oldest first ([]Record)
//	GET    /sim/stats      counters (Stats)
//	GET    /sim/faults     the armed fault, or null
//	POST   /sim/faults     arms a fault (Fault) and replaces the previous one
//	DELETE /sim/faults     clears the fault; the counters and requests stay
//	DELETE /sim/requests   deletes the recorded requests
//
// The kinds of faults are listed at Mode.
package modelsim

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Options configure a Server; the zero value is valid.
type Options struct {
	// Models that exist; any other name is a 404. Empty: every name exists.
	Models []string
	// APIKey, when set, is required as a bearer token.
	APIKey string
	// FirstToken is the time from the request to the first token of the
	// answer (to the whole answer when it is plain and Rate is 0).
	FirstToken time.Duration
	// Rate is tokens per second after the first; 0: all at once.
	Rate float64
	// Tokens is the length of an answer without max_tokens; 0 means 32.
	Tokens int
	// Dimensions of an embedding whose request sets none; 0 means 256.
	Dimensions int
	// Keep is how many requests are recorded; 0 means 256.
	Keep int
	// Seed of the random choice which requests meet a fault with a probability.
	Seed uint64
	// Logger gets one line for each fault that is armed or cleared; nil: discards.
	Logger *slog.Logger
}

const (
	maxBody      = 32 << 20
	maxTokens    = 1 << 16
	maxDimension = 8192
	maxChoices   = 128
)

// Server is the simulated model server, an http.Handler. It starts nothing by itself.
type Server struct {
	opts   Options
	start  int64 // Unix seconds, "created" of every model
	log    *slog.Logger
	faults faultState
	record recorder
	active sync.WaitGroup // requests in progress; Run waits for them
}

// New makes a server.
func New(o Options) *Server {
	if o.Tokens <= 0 {
		o.Tokens = 32
	}
	o.Dimensions = cmp.Or(o.Dimensions, 256)
	o.Keep = cmp.Or(o.Keep, 256)
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	s := &Server{opts: o, start: time.Now().Unix(), log: o.Logger}
	s.faults.seed(o.Seed)
	s.record.keep = o.Keep
	return s
}

// Run serves on ln until ctx ends, then cuts the running requests. It returns nil after
// ctx has ended, with no goroutine left.
func (s *Server) Run(ctx context.Context, ln net.Listener) error {
	base, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := &http.Server{
		Handler:           s,
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(refusingListener{ln, s}) }()
	var err error
	select {
	case <-ctx.Done():
		err = srv.Close()
		<-failed //nolint:errcheck // it is http.ErrServerClosed
	case err = <-failed:
	}
	cancel()
	s.active.Wait()
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return err
}

// ServeHTTP serves the control and the model endpoints.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.active.Add(1)
	defer s.active.Done()
	if strings.HasPrefix(r.URL.Path, "/sim/") {
		s.serveControl(w, r)
		return
	}
	path := strings.TrimPrefix(r.URL.Path, "/v1")
	switch {
	case r.Method == http.MethodPost:
		s.servePost(w, r, path)
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		writeError(w, http.StatusMethodNotAllowed, "invalid_request_error", "method_not_allowed", "method not allowed")
	default:
		s.serveGet(w, r, path)
	}
}

func (s *Server) serveGet(w http.ResponseWriter, r *http.Request, path string) {
	if f, hit := s.faults.take(true); hit && f.status() != 0 {
		s.writeStatusFault(w, f)
		return
	} else if hit && f.stalls() {
		<-r.Context().Done()
		return
	} else if hit {
		reset(w)
		return
	}
	if path != "/health" && !s.authorised(w, r) {
		return
	}
	switch id, one := strings.CutPrefix(path, "/models/"); {
	case path == "/health":
		writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	case path == "/models":
		list := make([]modelObject, 0, len(s.opts.Models))
		for _, m := range s.opts.Models {
			list = append(list, modelObject{m, "model", s.start, "modelsim"})
		}
		writeJSON(w, http.StatusOK, map[string]any{"object": "list", "data": list})
	case one && s.knows(id):
		writeJSON(w, http.StatusOK, modelObject{id, "model", s.start, "modelsim"})
	case one:
		writeError(w, http.StatusNotFound, "invalid_request_error", "model_not_found", "The model `"+id+"` does not exist")
	default:
		writeError(w, http.StatusNotFound, "invalid_request_error", "not_found", "no such path: "+r.URL.Path)
	}
}

type modelObject struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

func (s *Server) knows(model string) bool {
	return len(s.opts.Models) == 0 || slices.Contains(s.opts.Models, model)
}

func (s *Server) authorised(w http.ResponseWriter, r *http.Request) bool {
	if s.opts.APIKey == "" || r.Header.Get("Authorization") == "Bearer "+s.opts.APIKey {
		return true
	}
	writeError(w, http.StatusUnauthorized, "authentication_error", "invalid_api_key", "incorrect API key")
	return false
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(mustJSON(v), '\n')) // the request's context shows a client that disconnected
}

func writeError(w http.ResponseWriter, status int, kind, code, message string) {
	writeJSON(w, status, map[string]any{"error": map[string]any{
		"message": message, "type": kind, "param": nil, "code": code,
	}})
}
