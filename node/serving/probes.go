package serving

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
)

const (
	probeEvery   = 5 * time.Second
	probeTimeout = 2 * time.Second
	// probesToDie in a row must fail before a plain answer is no longer waited for.
	probesToDie  = 2
	probesAtOnce = 16
)

// Run keeps an eye on the pool until ctx ends: probes of the own site's
// upstreams, keys that change in files, peers that are lost.
func (p *Pipeline) Run(ctx context.Context) error {
	defer p.Close()
	probes := time.NewTicker(probeEvery)
	defer probes.Stop()
	peers := time.NewTimer(peersEvery)
	defer peers.Stop()
	lookUps := time.NewTicker(p.opts.LookUpEvery)
	defer lookUps.Stop()
	var rounds sync.WaitGroup
	defer rounds.Wait()
	// One round of each at a time.
	round := func(what func(context.Context)) func() {
		busy := make(chan struct{}, 1)
		return func() {
			select {
			case busy <- struct{}{}:
				rounds.Go(func() { what(ctx); <-busy })
			default:
			}
		}
	}
	start, lookUp := round(p.probeAll), round(p.discover)
	start()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.probe:
			start()
		case <-probes.C:
			start()
		case <-lookUps.C:
			lookUp()
		case <-peers.C:
			peers.Reset(clock.UntilTick(clock.Boottime(), peersEvery))
			if !p.fleet.empty() {
				p.fleet.check(p.peers())
			}
		}
	}
}

// probeAll asks every upstream of the own site for a sign of life, unless its
// traffic has just given one.
func (p *Pipeline) probeAll(ctx context.Context) {
	p.repair()
	room := make(chan struct{}, probesAtOnce)
	var all sync.WaitGroup
	for u := range p.table.Load().instances() {
		if u.broken != nil {
			continue
		}
		if err := u.refreshKey(p.opts.LookupEnv, p.opts.ReadFile); err != nil {
			p.log.Error("api key can't be read", append(u.words(), "error", err)...)
		}
		now := p.now()
		idle := u.open(now) || !u.goodSince(now.Add(-probeEvery))
		if !idle {
			u.probed.Store(&probe{at: now})
		}
		reports := u.rivals.Load() && u.reports(now)
		if !idle && !reports {
			continue
		}
		room <- struct{}{}
		all.Go(func() {
			defer func() { <-room }()
			if idle {
				p.probeOne(ctx, u)
			}
			if reports {
				p.askLoad(ctx, u)
			}
		})
	}
	all.Wait()
}

func (p *Pipeline) probeOne(ctx context.Context, u *upstream) {
	err := u.ping(ctx)
	if ctx.Err() != nil {
		return
	}
	now := p.now()
	before := u.probed.Load()
	known := before != nil
	next := &probe{at: now, err: err}
	if err != nil {
		next.fails = 1
		if known {
			next.fails += before.fails
		}
	}
	u.probed.Store(next)
	switch {
	case err != nil && (!known || before.err == nil):
		p.log.Warn("probe failed", append(u.words(), "error", err)...)
	case err == nil && known && before.err != nil:
		p.log.Info("probe answers again", u.words()...)
		u.revive(now)
	}
}

// revive lets a trial in at once: the probe that failed answers again.
func (u *upstream) revive(now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.breaker.hasten(now) {
		u.onMove(&u.backend, u.breaker.state, reasonProbeWell)
	}
}

var errProbe = errors.New("probe")

// ping is a request that costs no token.
func (u *upstream) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	at := u.probeURL()
	resp, err := u.get(ctx, at)
	if err != nil {
		return fmt.Errorf("%w: %w", errProbe, err)
	}
	defer func() { _ = resp.Body.Close() }()
	// Read to the end, within reason, so that the connection stays.
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 256<<10))
	// 4xx answers: it lives. A page that it lacks says nothing of its health.
	if resp.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("%w: %s answered %d", errProbe, at.Path, resp.StatusCode)
	}
	return nil
}

// get asks one page of the upstream.
func (u *upstream) get(ctx context.Context, at *url.URL) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, err
	}
	if key := u.key.Load(); key != nil {
		req.Header.Set("Authorization", *key)
	}
	return u.client.RoundTrip(req)
}

// words name the upstream in the log.
func (u *upstream) words() []any {
	if u.address == "" {
		return []any{"upstream", u.name}
	}
	return []any{"upstream", u.name, "instance", u.address}
}

func (u *upstream) probeURL() *url.URL {
	switch u.def.Kind {
	case config.KindVLLM, config.KindSGLang, config.KindLlamaCPP:
		return u.base.health()
	}
	return u.base.join("/v1/models")
}
