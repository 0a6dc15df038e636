package gateway

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"

	"github.com/dsnode/dsnode/node/ports"
	"github.com/dsnode/dsnode/node/serving"
)

// authenticate finds out who asks.
func (x *exchange) authenticate() (who serving.Principal, hops int, f *failure) {
	if x.from == clients {
		who, err := x.g.o.Auth.Authenticate(token(x.r.Header), local(x.r))
		if err != nil {
			if f = explain(err, ""); f == nil || f.status != http.StatusUnauthorized && !errors.Is(err, ErrKeysStale) {
				f = explain(ErrKeyUnknowable, "")
			}
			return who, 0, f
		}
		return who, 0, nil
	}
	if x.from == operators {
		return who, 0, nil
	}
	return x.readPeer()
}

// readPeer reads what another node says of who asks.
func (x *exchange) readPeer() (who serving.Principal, hops int, f *failure) {
	hops, err := strconv.Atoi(x.r.Header.Get(serving.HeaderHops))
	switch {
	case err != nil || hops < 1:
		return who, 0, badPeerRequest(serving.HeaderHops + " must be a number from 1")
	case hops > serving.MaxHops:
		return who, hops, explain(serving.ErrHopLimit, "")
	}
	if err := json.Unmarshal([]byte(x.r.Header.Get(serving.HeaderPrincipal)), &who); err != nil {
		return who, hops, badPeerRequest(serving.HeaderPrincipal + " must be a JSON object")
	}
	return who, hops, nil
}

// token is the bearer token, or x-api-key as Anthropic's clients send it.
func token(h http.Header) string {
	const scheme = "bearer "
	if v := first(h, "Authorization"); len(v) > len(scheme) && strings.EqualFold(v[:len(scheme)], scheme) {
		return strings.TrimSpace(v[len(scheme):])
	}
	return first(h, "X-Api-Key")
}

// first is h.Get for a canonical key.
func first(h http.Header, key string) string {
	if v := h[key]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// local reports whether a request comes directly from a program on this machine. One that
// a proxy on this machine has passed on does not. Neither does one that a web page makes a
// local browser send: it is not the user's. Such a page shows itself by an Origin, by
// Sec-Fetch-Site or, after DNS rebinding, by the name in the Host header.
func local(r *http.Request) bool {
	if _, page := r.Header["Origin"]; page {
		return false
	}
	return ports.Direct(r) && (ports.LoopbackName(r.Host) || ports.BelowLocalhost(r.Host)) && !ports.CrossSite(r.Header)
}
