package gateway

import "net/http"

// The health endpoints need no key: load balancers have none. They show a site's name
// and role, and nothing about its models.

type healthAnswer struct {
	Status string  `json:"status"` // "ok" or "unavailable"
	Site   string  `json:"site"`
	Node   string  `json:"node"`
	Role   *string `json:"role"`  // null: unknown
	Epoch  *uint64 `json:"epoch"` // null: unknown
}

// healthIf makes a health endpoint that answers 200 if ok holds, else 503.
func healthIf(ok func(*Gateway, Report) bool) func(x *exchange, _ string) {
	return func(x *exchange, _ string) {
		h := x.g.o.Health.Health()
		a := healthAnswer{Status: "ok", Site: x.g.o.Site, Node: x.g.o.Node}
		if h.Role != "" {
			a.Role = &h.Role
		}
		if h.Epoch != 0 {
			a.Epoch = &h.Epoch
		}
		status := http.StatusOK
		if !ok(x.g, h) {
			a.Status, status = "unavailable", http.StatusServiceUnavailable
		}
		x.w.Header()["Cache-Control"] = noStore
		x.reply(status, a)
	}
}

var noStore = []string{"no-store"}

func live(*Gateway, Report) bool { return true }

func ready(g *Gateway, h Report) bool { return h.Ready && !g.draining.Load() }

// actsAsPrimary requires the lease: without it another site may have taken over, and
// this node may not know yet.
func actsAsPrimary(_ *Gateway, h Report) bool { return h.Role == "primary" && h.Acting }

func isSameCity(_ *Gateway, h Report) bool { return h.Role == "same-city" }

func isRemote(_ *Gateway, h Report) bool { return h.Role == "remote" }

func hasQuorum(_ *Gateway, h Report) bool { return h.Quorum }
