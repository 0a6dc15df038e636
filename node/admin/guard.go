package admin

import (
	"crypto/sha256"
	"crypto/subtle"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/dsnode/dsnode/node/ports"
)

// sameOrigin refuses requests that a page of another origin made a browser send. On
// loopback, where no token may be needed, it also refuses foreign Host headers: with DNS
// rebinding a page can have the origin of this port, but its Host header shows its name.
func sameOrigin(r *http.Request) error {
	if rebound(r) {
		return &Error{
			Code: "forbidden", Message: "the Host header " + quote(r.Host) + " is not a name of the loopback address",
			Hint: "use 127.0.0.1 or localhost; a proxy in front must set Host to localhost",
		}
	}
	if origin := r.Header.Get("Origin"); origin != "" {
		u, err := url.Parse(origin)
		if err != nil || u.Host == "" || !strings.EqualFold(u.Host, r.Host) {
			return &Error{Code: "forbidden", Message: "requests from a page of " + quote(origin) + " are refused"}
		}
	}
	if !ports.CrossSite(r.Header) {
		return nil
	}
	// A link to the console is harmless: its page is the same for everybody.
	if r.URL.Path == "/" && r.Method == http.MethodGet && r.Header.Get("Sec-Fetch-Mode") == "navigate" {
		return nil
	}
	return &Error{Code: "forbidden", Message: "requests from a page of another site are refused"}
}

// rebound reports whether a request over loopback has a foreign name.
func rebound(r *http.Request) bool { return overLoopback(r) && !ports.LoopbackName(r.Host) }

// ForMetrics guards a port that has only metrics, without a token: pages of other sites
// can't read them on loopback, and neither a body nor a reader may be slow.
func ForMetrics(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		_ = control.SetReadDeadline(time.Now().Add(bodyTimeout)) // a test's recorder has no deadlines
		_ = control.SetWriteDeadline(time.Now().Add(defaultTimeout))
		if rebound(r) {
			http.Error(w, "The Host header is not a name of the loopback address; use 127.0.0.1 or localhost.", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// authorized requires the token, or a connection over loopback when no token is
// configured. It bounds how many requests run at once.
func (s *Server) authorized(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := s.authorize(r); err != nil {
			s.refuse(w, r, err)
			return
		}
		select {
		case s.inFlight <- struct{}{}:
			defer func() { <-s.inFlight }()
		default:
			w.Header().Set("Retry-After", "1")
			s.refuse(w, r, ErrBusy)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *Server) authorize(r *http.Request) error {
	if s.token == "" {
		// The node refuses to start like this on any other address. This check holds
		// even if it did start.
		if overLoopback(r) && ports.Forwarded(r.Header) {
			return &Error{
				Code: "unauthorized", Message: "the operator's token is missing: a proxy has passed this request on, and no token is configured",
				Hint: "set admin.token_file in node.yaml, or connect without the proxy",
			}
		}
		if overLoopback(r) {
			return nil
		}
		return &Error{
			Code: "unauthorized", Message: "this port serves only loopback, because no token is configured",
			Hint: "set admin.token_file in node.yaml, or connect from the node's own machine",
		}
	}
	token, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !found || token == "" {
		return &Error{Code: "unauthorized", Message: "the operator's token is missing"}
	}
	// Hashes are compared, so that the time does not even depend on the length.
	got, want := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(s.token))
	if subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
		return &Error{Code: "unauthorized", Message: "the operator's token is wrong"}
	}
	return nil
}

// overLoopback looks at the connection itself, not at the configuration.
func overLoopback(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok {
		return false
	}
	addr, err := netip.ParseAddrPort(local.String())
	return err == nil && addr.Addr().Unmap().IsLoopback()
}

// quote quotes untrusted text in a message, at most 100 bytes of it.
func quote(s string) string {
	if len(s) > 100 {
		s = s[:100] + "…"
	}
	return `"` + strings.ToValidUTF8(s, "?") + `"`
}
