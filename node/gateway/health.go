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

func (x *exchange) health(h Report, ok bool) {
	a := healthAnswer{Status: "ok", Site: x.g.o.Site, Node: x.g.o.Node}
	if h.Role != "" {
		a.Role = &h.Role
	}
	if h.Epoch != 0 {
		a.Epoch = &h.Epoch
	}
	status := http.StatusOK
	if !ok {
		a.Status, status = "unavailable", http.StatusServiceUnavailable
	}
	x.w.Header()["Cache-Control"] = noStore
	x.reply(status, a)
}

var noStore = []string{"no-store"}

func (x *exchange) live(string) { x.health(x.g.o.Health.Health(), true) }

func (x *exchange) ready(string) {
	h := x.g.o.Health.Health()
	x.health(h, h.Ready && !x.g.draining.Load())
}

// primary requires the lease: without it another site may have taken over, and this
// node may not know yet.
func (x *exchange) primary(string) {
	h := x.g.o.Health.Health()
	x.health(h, h.Role == "primary" && h.Lease)
}

func (x *exchange) sameCity(string) {
	h := x.g.o.Health.Health()
	x.health(h, h.Role == "same-city")
}

func (x *exchange) remote(string) {
	h := x.g.o.Health.Health()
	x.health(h, h.Role == "remote")
}

func (x *exchange) quorum(string) {
	h := x.g.o.Health.Health()
	x.health(h, h.Quorum)
}
