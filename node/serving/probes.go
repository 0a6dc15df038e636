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

	"github.com/dsnode/dsnode/cluster"
)

const (
	probeEvery   = 5 * time.Second
	probeTimeout = 2 * time.Second
	probesAtOnce = 16
)

// Run keeps an eye on the pool until ctx ends: probes of the own site's
// upstreams, keys that change in files, peers that are lost.
func (p *Pipeline) Run(ctx context.Context) error {
	defer p.Close()
	probes := time.NewTicker(probeEvery)
	defer probes.Stop()
	peers := time.NewTicker(peersEvery)
	defer peers.Stop()
	var round sync.WaitGroup
	defer round.Wait()
	busy := make(chan struct{}, 1) // one round at a time
	start := func() {
		select {
		case busy <- struct{}{}:
			round.Go(func() { p.probeAll(ctx); <-busy })
		default:
		}
	}
	start()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.probe:
			start()
		case <-probes.C:
			start()
		case <-peers.C:
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
	for _, u := range p.table.Load().upstreams {
		if u.broken != nil {
			continue
		}
		if err := u.refreshKey(p.opts.LookupEnv, p.opts.ReadFile); err != nil {
			p.log.Error("api key can't be read", "upstream", u.name, "error", err)
		}
		now := p.now()
		if !u.open(now) && u.goodSince(now.Add(-probeEvery)) {
			u.probed.Store(&probe{at: now})
			continue
		}
		room <- struct{}{}
		all.Go(func() {
			defer func() { <-room }()
			p.probeOne(ctx, u)
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
	before := u.probed.Swap(&probe{at: now, err: err})
	known := before != nil
	switch {
	case err != nil && (!known || before.err == nil):
		p.log.Warn("probe failed", "upstream", u.name, "error", err)
	case err == nil && known && before.err != nil:
		p.log.Info("probe answers again", "upstream", u.name)
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
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.probeURL().String(), nil)
	if err != nil {
		return fmt.Errorf("%w: %w", errProbe, err)
	}
	if key := u.key.Load(); key != nil {
		req.Header.Set("Authorization", *key)
	}
	resp, err := u.client.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("%w: %w", errProbe, err)
	}
	defer func() { _ = resp.Body.Close() }()
	// Read to the end, within reason, so that the connection stays.
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 256<<10))
	// 4xx answers: it lives. A page that it lacks says nothing of its health.
	if resp.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("%w: %s answered %d", errProbe, req.URL.Path, resp.StatusCode)
	}
	return nil
}

func (u *upstream) probeURL() *url.URL {
	switch u.def.Kind {
	case cluster.KindVLLM, cluster.KindSGLang, cluster.KindLlamaCPP:
		return u.base.health()
	}
	return u.base.join("/v1/models")
}
