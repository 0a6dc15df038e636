package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/cluster/config"
)

const (
	probeEvery   = 5 * time.Second
	probeTimeout = 2 * time.Second
	// probesToDie in a row must fail before a plain answer is no longer waited for.
	probesToDie  = 2
	probesAtOnce = 16
)

// Probe makes a round of probes, as Run does from time to time: it reads keys again,
// asks each instance for a sign of life unless its traffic has just given one, and
// asks those that have a choice beside them how busy they are.
func (f *Fleet) Probe(ctx context.Context) {
	f.repair()
	slots := make(chan struct{}, probesAtOnce)
	var all sync.WaitGroup
	for i := range f.Table().instances() {
		if i.broken != nil {
			continue
		}
		if err := i.refreshKey(f.o.LookupEnv, f.o.ReadFile); err != nil {
			f.log.Error("could not read api key", append(i.logAttrs(), "err", err)...)
		}
		now := f.o.Now()
		idle := i.open(now) || !i.goodSince(now.Add(-probeEvery))
		if !idle {
			i.probed.Store(&probe{at: now})
		}
		reports := i.compared.Load() && i.reports(now)
		if !idle && !reports {
			continue
		}
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			if idle {
				f.probe(ctx, i)
			}
			if reports {
				f.readLoad(ctx, i)
			}
		})
	}
	all.Wait()
}

func (f *Fleet) probe(ctx context.Context, i *instance) {
	err := i.ping(ctx)
	if ctx.Err() != nil {
		return
	}
	now := f.o.Now()
	before := i.probed.Load()
	known := before != nil
	next := &probe{at: now, err: err}
	if err != nil {
		next.fails = 1
		if known {
			next.fails += before.fails
		}
	}
	i.probed.Store(next)
	switch {
	case err != nil && (!known || before.err == nil):
		f.log.Warn("probe failed", append(i.logAttrs(), "err", err)...)
	case err == nil && known && before.err != nil:
		f.log.Info("probe succeeds again", i.logAttrs()...)
		i.probeSucceeded(now)
	}
}

var errProbe = errors.New("probe")

// ping is a request that costs no token.
func (i *instance) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	at := i.probeURL()
	resp, err := i.get(ctx, at)
	if err != nil {
		return fmt.Errorf("%w: %w", errProbe, cause.Of(err))
	}
	defer func() { _ = resp.Body.Close() }()
	discard(resp.Body)
	// 4xx is an answer: a page that a server lacks says nothing about its health.
	if resp.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("%w: %s answered %d", errProbe, at.Path, resp.StatusCode)
	}
	return nil
}

// discard reads a body to its end, within reason, so that the connection is kept.
func discard(body io.Reader) { _, _ = io.Copy(io.Discard, io.LimitReader(body, 256<<10)) }

// get asks for one page of the server.
func (i *instance) get(ctx context.Context, at *url.URL) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, err
	}
	if key := i.key.Load(); key != nil {
		req.Header.Set("Authorization", *key)
	}
	return i.client.RoundTrip(req)
}

func (i *instance) probeURL() *url.URL {
	switch i.def.Kind {
	case config.KindVLLM, config.KindSGLang, config.KindLlamaCPP:
		return i.base.join("/health")
	}
	return i.base.join("/v1/models")
}
