package serving

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
)

// What nodes of two sites tell each other about a request that one sends on to the
// other. The gateway reads the request's half and writes the answer's.
const (
	// HeaderHops counts the peers that a forwarded request has passed.
	HeaderHops = "X-Dsnode-Hops"
	// HeaderPrincipal carries the Principal as JSON.
	HeaderPrincipal = "X-Dsnode-Principal"
	// HeaderModel tells which model answered, query-escaped: a fallback's answer is
	// not the asked model's.
	HeaderModel = "X-Dsnode-Model"
	// HeaderError is the code of an error that the peer's gateway made itself. An
	// upstream's refusal carries X-Dsnode-Upstream instead. Together they tell "ask
	// another site" from "this is the answer".
	HeaderError = "X-Dsnode-Error"

	headerUpstream = "X-Dsnode-Upstream"
	headerSite     = "X-Dsnode-Site"
	headerAttempts = "X-Dsnode-Attempts"
)

// forward adds to a header what a peer must know, and gives the body for it: the
// client's. Only for a fallback the name in it is the fallback's. The client's key
// need not allow that one: the configuration does.
func (a *attempt) forward(h http.Header) ([]byte, error) {
	who, model := a.r.Principal, a.permit.Model
	if model.Name != a.r.Model && len(who.Models) > 0 {
		who.Models = append([]string{model.Name}, who.Models...)
	}
	principal, err := json.Marshal(who)
	if err != nil {
		return nil, fmt.Errorf("encode principal: %w", err)
	}
	h[HeaderPrincipal] = []string{string(principal)}
	h[HeaderHops] = []string{strconv.Itoa(a.r.Hops + 1)}
	return a.r.BodyFor(a.modelName(), false), nil
}

// labelPeer says whose answer a peer has passed on.
func (a *attempt) labelPeer(h http.Header) {
	a.head.Model, _ = url.QueryUnescape(h.Get(HeaderModel)) // empty, unknown, when it can't be read
	a.head.Upstream, a.head.Site, a.head.Node = h.Get(headerUpstream), h.Get(headerSite), a.permit.Peer
	if a.head.Site == "" {
		a.head.Site = a.permit.Site
	}
	a.head.Attempts += max(a.peerTries, 1) - 1
}
