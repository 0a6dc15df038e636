package gateway

import (
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/shares"
)

// share is what a request has of its tenant's shares.
type share struct {
	counted bool // in Gateway.inFlightOf, and its body in heldOf
	tenant  string
	percent int
	spent   bool // the share of the memory was too small
}

// enterShare counts a request as one of its tenant's, unless that has as many as its share.
// release ends it. Operators have no share.
func (x *exchange) enterShare(who serving.Principal) *failure {
	cfg := x.g.config()
	s := share{tenant: who.Tenant, percent: cfg.ShareOf(who.KeyID, who.Tenant)}
	if s.percent == 0 || x.from == operators {
		return nil
	}
	most := shares.Part(int64(x.g.mostInFlight()), s.percent)
	if !x.g.inFlightOf.Take(s.tenant, 1, most) {
		return x.shareSpent(&shares.Error{Tenant: s.tenant, Of: "requests in progress", Most: most, Percent: s.percent})
	}
	s.counted = true
	x.share = s
	return nil
}

// memoryShare is a tenant's share of the memory for bodies. One body of the largest size
// always fits, with a copy.
func (x *exchange) memoryShare() int64 {
	return max(shares.Part(x.g.o.BodyMemory, x.share.percent), 2*(x.g.config().Limits.BodyBytes+slack))
}

func (x *exchange) holdOfShare(n int64) bool {
	if !x.share.counted {
		return true
	}
	x.share.spent = !x.g.heldOf.Take(x.share.tenant, n, x.memoryShare())
	return !x.share.spent
}

func (x *exchange) giveOfShare(n int64) {
	if x.share.counted {
		x.g.heldOf.Add(x.share.tenant, -n)
	}
}

func (x *exchange) leaveShare() {
	if x.share.counted {
		x.g.heldOf.Add(x.share.tenant, -x.held)
		x.g.inFlightOf.Add(x.share.tenant, -1)
	}
}

// noMemory says why hold refused.
func (x *exchange) noMemory() *failure {
	if x.share.spent {
		return x.shareSpent(&shares.Error{Tenant: x.share.tenant, Of: "memory for bodies, in bytes", Most: x.memoryShare(), Percent: x.share.percent})
	}
	return x.g.shed(shedMemory)
}

// shareSpent counts a refusal for a tenant's share. Another node gets the answer of a full
// one, and asks the next.
func (x *exchange) shareSpent(e *shares.Error) *failure {
	if x.from == peers {
		return x.g.shed(shedTenant)
	}
	x.g.metrics.shed[shedTenant].Inc()
	return tenantShare(e)
}
