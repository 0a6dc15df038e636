package admin

import (
	"crypto/sha256"
	"crypto/subtle"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

// sameOrigin refuses what a browser was made to send by a page of somebody
// else. Over loopback, where no token may be needed, it refuses foreign Host
// headers too: a page whose name was rebound to 127.0.0.1 is of the same
// origin as we are, but can't hide its name.
func (s *Server) sameOrigin(r *http.Request) error {
	if overLoopback(r) && !loopbackName(r.Host) {
		return &Error{
			Code: "forbidden", Message: "the Host header " + quote(r.Host) + " is not a name of the loopback address",
			Hint: "ask 127.0.0.1 or localhost; a proxy in front must set Host to localhost",
		}
	}
	if origin := r.Header.Get("Origin"); origin != "" {
		u, err := url.Parse(origin)
		if err != nil || u.Host == "" || !strings.EqualFold(u.Host, r.Host) {
			return &Error{Code: "forbidden", Message: "requests from a page of " + quote(origin) + " are refused"}
		}
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "none", "same-origin":
		return nil
	}
	// Following a link to the console is harmless: the page is the same for all.
	if r.URL.Path == "/" && r.Method == http.MethodGet && r.Header.Get("Sec-Fetch-Mode") == "navigate" {
		return nil
	}
	return &Error{Code: "forbidden", Message: "requests from a page of another site are refused"}
}

// authorized lets in who has the token, or who comes over loopback when there
// is none. It bounds how many are inside at once.
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
		// The node refuses to start like this on any other address; this is
		// the second lock on the same door.
		if overLoopback(r) {
			return nil
		}
		return &Error{
			Code: "unauthorized", Message: "this port serves loopback only, because no token is configured",
			Hint: "set admin.token_file in node.yaml, or ask from the node's own machine",
		}
	}
	token, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !found || token == "" {
		return &Error{Code: "unauthorized", Message: "the operator's token is missing"}
	}
	// Hashed first, so that not even the length shows in the time it takes.
	got, want := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(s.token))
	if subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
		return &Error{Code: "unauthorized", Message: "the operator's token is wrong"}
	}
	return nil
}

// overLoopback judges by the connection itself, not by what was configured.
func overLoopback(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok {
		return false
	}
	addr, err := netip.ParseAddrPort(local.String())
	return err == nil && addr.Addr().Unmap().IsLoopback()
}

// loopbackName reports whether a Host header names this machine by itself. Any
// port will do: it may have been forwarded.
func loopbackName(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.TrimSuffix(strings.ToLower(strings.Trim(host, "[]")), ".")
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// quote shows a stranger's text in a message, at most 100 bytes of it.
func quote(s string) string {
	if len(s) > 100 {
		s = s[:100] + "…"
	}
	return `"` + strings.ToValidUTF8(s, "?") + `"`
}
