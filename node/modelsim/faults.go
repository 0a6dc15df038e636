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

// Mode is a way to fail. "after n" is Fault.After: tokens of a stream that
// come first.
type Mode string

const (
	// Refuse resets new and idle connections before a request is answered.
	// /sim/ stays reachable: a connection is cut when its first bytes are not
	// a request for it.
	Refuse Mode = "refuse"
	// HTTP500, HTTP503, HTTP429, HTTP401 answer with that status and an OpenAI
	// error; the first three carry Retry-After when RetryAfter is set.
	HTTP500 Mode = "http_500"
	HTTP503 Mode = "http_503"
	HTTP429 Mode = "http_429"
	HTTP401 Mode = "http_401"
	// ResetBefore reads the request, then resets the connection.
	ResetBefore Mode = "reset_before"
	// ResetAfter resets after n tokens; plain: after half of the body.
	ResetAfter Mode = "reset_after"
	// Stall says nothing more after n tokens until the client goes (with n = 0
	// the stream's 200 is sent); plain: no byte at all.
	Stall Mode = "stall"
	// StallComments is Stall with ": keep-alive" each Interval; plain: 200 and
	// an empty line each Interval, as DeepSeek does.
	StallComments Mode = "stall_comments"
	// SlowDrip sends one token each Interval; plain: one byte each Interval.
	SlowDrip Mode = "slow_drip"
	// BadJSON sends an event that is no JSON after n tokens, then ends with
	// [DONE]; plain: a complete body that is no JSON.
	BadJSON Mode = "bad_json"
	// SilentEnd ends cleanly after n tokens without finish_reason and [DONE];
	// plain: an empty body.
	SilentEnd Mode = "silent_end"
	// MissingDone sends all, finish_reason too, without [DONE]; plain: a
	// correct answer.
	MissingDone Mode = "missing_done"
	// ErrorEvent sends an error event after n tokens and ends; plain: 200 with
	// an error object for a body.
	ErrorEvent Mode = "error_event"
	// TruncatedBody closes the connection (FIN) in the middle of an event after
	// n tokens; plain: half of what Content-Length says.
	TruncatedBody Mode = "truncated_body"
	// RoleOnlyThenEnd sends the role chunk and [DONE]; plain: no content and
	// no finish_reason.
	RoleOnlyThenEnd Mode = "role_only_then_end"
	// InsufficientResource ends after n tokens with that finish_reason, as
	// DeepSeek does under load; plain: the same.
	InsufficientResource Mode = "insufficient_system_resource"
)

var modes = []Mode{
	Refuse, HTTP500, HTTP503, HTTP429, HTTP401, ResetBefore, ResetAfter, Stall, StallComments, SlowDrip,
	BadJSON, SilentEnd, MissingDone, ErrorEvent, TruncatedBody, RoleOnlyThenEnd, InsufficientResource,
}

// Modes lists all ways to fail.
func Modes() []Mode { return slices.Clone(modes) }

// Fault is what POST /sim/faults takes.
type Fault struct {
	Mode  Mode `json:"mode"`
	After int  `json:"after,omitempty"` // tokens of a stream before it fails
	// RetryAfter in seconds.
	RetryAfter int `json:"retry_after,omitempty"`
	// Count is how many requests fail before the fault clears itself; 0 is
	// until cleared.
	Count int `json:"count,omitempty"`
	// Probability that a request meets it, in (0, 1]; 0 means 1.
	Probability float64 `json:"probability,omitempty"`
	// IntervalMS is for the drips and comments; 0 means 1000.
	IntervalMS int `json:"interval_ms,omitempty"`
	// Probes makes refuse, http_*, reset_before and the stalls hit GET /health
	// and /models too (refuse always does), without counting.
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

// status of the modes that are an HTTP status, else 0.
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

// faultBox holds the armed fault.
type faultBox struct {
	mu    sync.Mutex // guards all below
	armed *Fault
	left  int // of Count
	rng   *rand.Rand
}

func (b *faultBox) seed(n uint64) { b.rng = rand.New(rand.NewPCG(n, 0x5eed)) } //nolint:gosec // repeatable on purpose

func (b *faultBox) get() *Fault {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.armed == nil {
		return nil
	}
	f := *b.armed
	return &f
}

// take decides whether this request fails, and uses up one of Count. A probe
// uses up none.
func (b *faultBox) take(probe bool) (Fault, bool) {
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

// SetFault arms f in place of the one before, or says what is wrong with it.
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

// ClearFault disarms.
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

// reset answers with RST. What was written and not flushed is lost.
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

// refusingListener cuts connections while Refuse is armed.
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

// refusingConn looks at the first bytes of a new connection before net/http
// does, so that it is reset without being read further, and /sim/ stays open.
type refusingConn struct {
	net.Conn
	s      *Server
	looked bool
	held   []byte
}

const controlPath = " /sim/"

func (c *refusingConn) Read(p []byte) (int, error) {
	if !c.looked && len(p) > 1 { // one byte is net/http waiting in the background
		c.looked = true
		if f := c.s.faults.get(); f != nil && f.Mode == Refuse {
			if err := c.look(); err != nil {
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

// look reads "METHOD /sim/" at most.
func (c *refusingConn) look() error {
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
	if _, hit := c.s.faults.take(false); !hit { // its Count was used up meanwhile
		c.held = buf
		return nil
	}
	c.s.book.refused()
	abort(c.Conn)
	return net.ErrClosed
}
