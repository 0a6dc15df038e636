package serving

import (
	"context"
	"log/slog"
	"time"

	"github.com/dsnode/dsnode/node/upstream"
)

// pool is the last stage: it asks one server of the fleet after another until one has
// answered, or the request can only fail. Once content was shown, no other one is
// asked.
type pool struct {
	fleet   *upstream.Fleet
	budget  *budget
	now     func() time.Time
	metrics *metrics
	log     *slog.Logger
}

// Serve asks the servers in the order of the fleet's search.
func (s *pool) Serve(ctx context.Context, r Request, sink Sink) error {
	start := time.Now()
	s.budget.deposit(s.now(), r.RetryCount > 0)
	search := s.fleet.Search(upstream.Query{
		Table: r.table, Model: r.model, Tenant: r.Principal.Tenant, Prompt: r.PromptAt.In(r.Body), OwnSite: r.Hops > 0,
	})
	var met failures
	attempts := 0
	for {
		permit, ok := search.Next()
		if !ok {
			return met.err(search, attempts)
		}
		if attempts > 0 && !s.mayRetry(&met) {
			permit.Withdraw()
			return met.err(search, attempts)
		}
		a := &attempt{r: r, permit: permit, sink: sink, now: s.now, start: start}
		a.head.Attempts, a.head.Cache.Status = attempts+1, r.cached
		o := a.run(ctx)
		s.observe(a, &o)
		attempts += max(o.attempts, 1)
		switch {
		case o.Result == upstream.OK:
			return nil
		case o.sent || !consequences[o.Result].next:
			return a.finalError(&o)
		}
		met.add(a, &o)
		s.log.LogAttrs(ctx, slog.LevelInfo, "upstream failed, asking another", a.logAttrs(&o)...)
		if o.Result == upstream.Refused || o.Result == upstream.ConnectTimeout {
			search.Unreached(&a.permit)
		}
	}
}

// mayRetry asks the retry budget, unless the server that failed is known to be down:
// asking another one is no retry then.
func (s *pool) mayRetry(met *failures) bool {
	switch {
	case met.free:
		s.metrics.retries.WithLabelValues("free").Inc()
	case s.budget.withdraw(s.now()):
		s.metrics.retries.WithLabelValues("budget").Inc()
	default:
		s.metrics.retries.WithLabelValues("refused").Inc()
		return false
	}
	return true
}

// observe measures an attempt that has ended.
func (s *pool) observe(a *attempt, o *outcome) {
	if o.sent && a.head.Stream && a.r.Hops == 0 && a.first > 0 {
		s.metrics.firstToken.Observe(a.first.Seconds())
	}
	if a.in+a.out == 0 {
		return
	}
	s.metrics.tokens.WithLabelValues(a.permit.Model.Name, "in").Add(float64(a.in))
	s.metrics.tokens.WithLabelValues(a.permit.Model.Name, "out").Add(float64(a.out))
	if a.head.Stream && a.out > 1 && o.Result == upstream.OK {
		s.metrics.perToken.Observe((time.Since(a.start) - a.first).Seconds() / float64(a.out-1))
	}
}
