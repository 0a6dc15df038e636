package ports

import (
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// Direct reports whether a request comes over loopback from a program on this machine, for
// itself. One that a proxy has passed on does not, whichever headers the proxy adds. Its
// user need not be of this machine.
func Direct(r *http.Request) bool {
	addr, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && addr.Addr().Unmap().IsLoopback() && !Forwarded(r.Header)
}

// Forwarded reports whether a header says that a proxy has passed the request on. Proxies
// and CDNs have many names for the client's address, so whole families count.
func Forwarded(h http.Header) bool {
	for name := range h {
		if forwards(name) {
			return true
		}
	}
	return false
}

// forwards judges one name, in its canonical form.
func forwards(name string) bool {
	switch name {
	case "True-Client-Ip", "Client-Ip", "Incap-Client-Ip", "Ali-Cdn-Real-Ip", "X-Client-Ip", "X-Cluster-Client-Ip", "X-Coming-From", "X-Appengine-User-Ip", "X-Goog-Iap-Jwt-Assertion":
		return true
	}
	family, rest, _ := strings.Cut(name, "-")
	switch family {
	case "Forwarded", "Via", "Cdn", "Cf", "Cloudfront", "Fastly", "Fly", "Akamai", "Tailscale":
		return true
	case "X":
		family, _, _ = strings.Cut(rest, "-")
		switch family {
		case "Forwarded", "Forward", "Original", "Originating", "Rewrite", "Real", "Remote", "Proxy", "Proxyuser", "Host",
			"Envoy", "Traefik", "Varnish", "Arr", "Azure", "Amzn", "Nf", "Vercel":
			return true
		}
	}
	return false
}

// CrossSite reports whether a page of another site, or of another port of this one, made a
// browser send the request. A page that the port itself has served did not.
func CrossSite(h http.Header) bool {
	for _, from := range h["Sec-Fetch-Site"] {
		switch from {
		case "", "none", "same-origin":
		default:
			return true
		}
	}
	return false
}

// LoopbackName reports whether a Host header names the loopback address. With DNS rebinding
// a page can have this port as its origin, but the header shows the page's name. Any port
// is allowed, because the port may be forwarded.
func LoopbackName(host string) bool {
	host = bare(host)
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// BelowLocalhost reports whether a Host header is a name below localhost, as web
// applications under development use them. Nobody can register such a name.
func BelowLocalhost(host string) bool {
	return strings.HasSuffix(bare(host), ".localhost")
}

// bare is the name in a Host header, in lower case and without a final dot.
func bare(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return strings.TrimSuffix(strings.ToLower(strings.Trim(host, "[]")), ".")
}
