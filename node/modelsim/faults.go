package modelsim

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Mode is a kind of fault. "After n tokens" is Fault.After, the tokens of a stream that
// are sent before the fault.
type Mode string

const (
	// Refuse resets new and idle connections before a request is answered. /sim/ stays
	// reachable: a connection is only reset if its first bytes are another request.
	Refuse Mode = "refuse"
	// HTTP500, HTTP503, HTTP429 and HTTP401 answer with that status and an OpenAI error
	// object. The first three have Retry-After when RetryAfter is set.
	HTTP500 Mode = "http_500"
	HTTP503 Mode = "http_503"
	HTTP429 Mode = "http_429"
	HTTP401 Mode = "http_401"
	// ResetBefore reads the request, then resets the connection.
	ResetBefore Mode = "reset_before"
	// ResetAfter resets the connection after n tokens; plain: after half of the body.
	ResetAfter Mode = "reset_after"
	// Stall sends nothing after n tokens until the client disconnects (with n = 0 it
	// sends the stream's 200); plain: it sends no byte.
	Stall Mode = "stall"
	// StallComments is Stall with ": keep-alive" each interval; plain: 200 and an empty
	// line each interval, as DeepSeek does.
	StallComments Mode = "stall_comments"
	// SlowDrip sends one token each interval; plain: one byte each interval.
	SlowDrip Mode = "slow_drip"
	// BadJSON sends an event that is not JSON after n tokens, then [DONE]; plain: a
	// complete body that is not JSON.
	BadJSON Mode = "bad_json"
	// SilentEnd ends the stream cleanly after n tokens without finish_reason and [DONE];
	// plain: an empty body.
	SilentEnd Mode = "silent_end"
	// MissingDone sends everything except [DONE]; plain: a correct answer.
	MissingDone Mode = "missing_done"
	// ErrorEvent sends an error event after n tokens and ends; plain: 200 with an error
	// object as body.
	ErrorEvent Mode = "error_event"
	// TruncatedBody closes the connection (FIN) within an event after n tokens; plain:
	// after half of Content-Length.
	TruncatedBody Mode = "truncated_body"
	// RoleOnlyThenEnd sends the role chunk and [DONE]; plain: no content and
	// no finish_reason.
	RoleOnlyThenEnd Mode = "role_only_then_end"
	// InsufficientResource ends the answer after n tokens with this finish_reason, as
	// DeepSeek does under load; plain: the same finish_reason.
	InsufficientResource Mode = "insufficient_system_resource"
)

var modes = []Mode{
	Refuse, HTTP500, HTTP503, HTTP429, HTTP401, ResetBefore, ResetAfter, Stall, StallComments, SlowDrip,
	BadJSON, SilentEnd, MissingDone, ErrorEvent, TruncatedBody, RoleOnlyThenEnd, InsufficientResource,
}

// Fault is the body of POST /sim/faults.
type Fault struct {
	Mode  Mode `json:"mode"`
	After int  `json:"after,omitempty"` // tokens of a stream before the fault
	// RetryAfter in seconds.
	RetryAfter int `json:"retry_after,omitempty"`
	// Count is how many requests fail before the fault is cleared; 0: no limit.
	Count int `json:"count,omitempty"`
	// Probability that a request fails, in (0, 1]; 0 means 1.
	Probability float64 `json:"probability,omitempty"`
	// IntervalMS is the interval of SlowDrip and StallComments; 0 means 1000.
	IntervalMS int `json:"interval_ms,omitempty"`
	// Probes makes http_*, reset_before and the stalls also apply to GET /health and
	// /models, without using up Count. refuse always applies to them.
	Probes bool `json:"probes,omitempty"`
}

func (f Fault) check() error {
	switch {
	case !slices.Contains(modes, f.Mode):
		return fmt.Errorf("mode %q is unknown; one of %v", f.Mode, modes)
	case f.After < 0, f.RetryAfter < 0, f.Count < 0, f.IntervalMS < 0:
		return fmt.Errorf("after, retry_after, count and interval_ms must not be negative")
	case f.Probability < 0 || f.Probability > 1:
		return fmt.Errorf("probability must be between 0 and 1, got %v", f.Probability)
	}
	return nil
}

func (f Fault) interval() time.Duration {
	if f.IntervalMS == 0 {
		return time.Second
	}
	return time.Duration(f.IntervalMS) * time.Millisecond
}

func (f Fault) stalls() bool { return f.Mode == Stall || f.Mode == StallComments }

// status is the HTTP status of modes that are one, else 0.
func (f Fault) status() int {
	switch f.Mode {
	case HTTP500:
		return http.StatusInternalServerError
	case HTTP503:
		return http.StatusServiceUnavailable
	case HTTP429:
		return http.StatusTooManyRequests
	case HTTP401:
		return http.StatusUnauthorized
	}
	return 0
}

// faultState holds the armed fault.
type faultState struct {
	mu    sync.Mutex // guards all below
	armed *Fault
	left  int // requests until Count is used up
	rng   *rand.Rand
}

func (b *faultState) seed(n uint64) { b.rng = rand.New(rand.NewPCG(n, 0x5eed)) } //nolint:gosec // repeatable on purpose

func (b *faultState) get() *Fault {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.armed == nil {
		return nil
	}
	f := *b.armed
	return &f
}

// take decides whether this request fails. A request that fails uses up one of Count, a
// probe does not.
func (b *faultState) take(probe bool) (Fault, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.armed == nil {
		return Fault{}, false
	}
	f := *b.armed
	if probe {
		whole := f.status() != 0 || f.Mode == ResetBefore || f.stalls()
		return f, f.Mode == Refuse || f.Probes && whole
	}
	if f.Probability > 0 && b.rng.Float64() >= f.Probability {
		return Fault{}, false
	}
	if f.Count > 0 {
		if b.left--; b.left == 0 {
			b.armed = nil
		}
	}
	return f, true
}

// SetFault arms f and replaces the previous fault. The error says what is wrong with f.
func (s *Server) SetFault(f Fault) error {
	if err := f.check(); err != nil {
		return err
	}
	s.faults.mu.Lock()
	s.faults.armed, s.faults.left = &f, f.Count
	s.faults.mu.Unlock()
	s.log.Info("fault armed", slog.String("mode", string(f.Mode)), slog.Int("count", f.Count))
	return nil
}

// ClearFault clears the fault.
func (s *Server) ClearFault() {
	s.faults.mu.Lock()
	s.faults.armed = nil
	s.faults.mu.Unlock()
	s.log.Info("fault cleared")
}

func (s *Server) writeStatusFault(w http.ResponseWriter, f Fault) {
	if f.RetryAfter > 0 && f.Mode != HTTP401 {
		w.Header().Set("Retry-After", fmt.Sprint(f.RetryAfter))
	}
	kind := map[Mode]string{HTTP429: "rate_limit_error", HTTP401: "authentication_error"}[f.Mode]
	if kind == "" {
		kind = "server_error"
	}
	writeError(w, f.status(), kind, "simulated", "simulated "+string(f.Mode))
}

// reset closes the connection with RST. Data that was not flushed is lost.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil { // HTTP/2, or a recorder in a test
		panic(http.ErrAbortHandler)
	}
	abort(conn)
}

func abort(conn net.Conn) {
	if c, ok := conn.(*refusingConn); ok {
		conn = c.Conn
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// refusingListener resets connections while Refuse is armed.
type refusingListener struct {
	net.Listener
	s *Server
}

func (l refusingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &refusingConn{Conn: c, s: l.s}, nil
}

// refusingConn reads the first bytes of a new connection before net/http does, so that it
// can be reset without reading more, and /sim/ stays reachable.
type refusingConn struct {
	net.Conn
	s       *Server
	checked bool
	held    []byte // read by check and not yet by net/http
}

const controlPath = " /sim/"

func (c *refusingConn) Read(p []byte) (int, error) {
	if !c.checked && len(p) > 1 { // net/http reads one byte when it only watches an idle connection
		c.checked = true
		if f := c.s.faults.get(); f != nil && f.Mode == Refuse {
			if err := c.check(); err != nil {
				return 0, err
			}
		}
	}
	if len(c.held) > 0 {
		n := copy(p, c.held)
		c.held = c.held[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// check reads at most "METHOD /sim/", and resets the connection if that is not the
// beginning of the request.
func (c *refusingConn) check() error {
	buf := make([]byte, 0, 16)
	for len(buf) < cap(buf) {
		n, err := c.Conn.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err != nil {
			return err
		}
		if i := slices.Index(buf, ' '); i >= 0 && len(buf) >= i+len(controlPath) {
			if string(buf[i:i+len(controlPath)]) == controlPath {
				c.held = buf
				return nil
			}
			break
		}
	}
	if _, hit := c.s.faults.take(false); !hit { // Count was used up meanwhile
		c.held = buf
		return nil
	}
	c.s.record.refused()
	abort(c.Conn)
	return net.ErrClosed
}
