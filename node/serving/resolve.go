package serving

import (
	"context"

	"github.com/dsnode/dsnode/node/upstream"
)

// resolve takes the configuration for a request, once, and finds its model.
type resolve struct {
	next  Server
	fleet *upstream.Fleet
}

// Serve refuses models that don't exist for the principal: one that its key doesn't
// allow looks unknown.
func (s *resolve) Serve(ctx context.Context, r Request, sink Sink) error {
	if r.Hops > MaxHops {
		return ErrHopLimit
	}
	r.table = s.fleet.Table()
	r.model = r.table.Model(r.Model)
	if r.model == nil || !r.Principal.Allows(r.Model) {
		return ErrUnknownModel
	}
	return s.next.Serve(ctx, r, sink)
}
