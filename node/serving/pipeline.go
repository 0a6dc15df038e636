package serving

import (
	"cmp"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/upstream"
)

// Options are what a Pipeline is made of. Fleet is required.
type Options struct {
	Fleet      *upstream.Fleet
	Cache      *cache.Cache // nil: none
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time // the process's own by default
}

// Pipeline is the whole chain of stages.
type Pipeline struct {
	Server
	flights *flights
}

// New puts the stages together. A request meets the last line first.
func New(o Options) *Pipeline {
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	o.Registerer = cmp.Or[prometheus.Registerer](o.Registerer, prometheus.NewRegistry())
	if o.Now == nil {
		o.Now = time.Now
	}
	shared := &flights{}
	var s Server
	s = &pool{fleet: o.Fleet, budget: &budget{}, now: o.Now, metrics: newMetrics(o.Registerer), log: o.Logger}
	s = &cached{next: s, cache: o.Cache, flights: shared, log: o.Logger}
	s = &resolve{next: s, fleet: o.Fleet}
	return &Pipeline{Server: s, flights: shared}
}

// Close waits until shared requests whose clients have all left have ended. Call it
// when no request is under way.
func (p *Pipeline) Close() { p.flights.work.Wait() }
