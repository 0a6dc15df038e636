//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

// slowUpstream is the response time of the model server for the fixed rate.
const slowUpstream = 60 * time.Millisecond

// round starts all proxies and runs each load on one after the other, so that compared
// figures are measured within seconds. Every second round has the reverse order.
type round struct {
	sandbox  *sandbox
	set      *settings
	number   int
	upstream string
	progress io.Writer

	node    *dsnode
	targets []target
	runs    []measurement
}

func (r *round) burst() burst {
	return burst{streams: r.set.Streams, within: time.Second / 2, events: r.set.Events, every: 20 * time.Millisecond}
}

func (r *round) run(ctx context.Context) ([]measurement, error) {
	defer r.stop()
	if err := r.start(ctx); err != nil {
		return nil, err
	}
	for _, l := range r.loads() {
		for _, t := range r.targets {
			run := l.run
			if t.name == nameDsnode && r.set.profile != "" && l.length > 0 {
				run = r.profiled(l)
			}
			m, err := r.measure(ctx, t, l.name, run)
			if err != nil {
				return r.runs, fmt.Errorf("%s, %s: %w", t.name, l.name, err)
			}
			r.runs = append(r.runs, m)
		}
	}
	return r.runs, nil
}

// load is what runs on one target at a time.
type load struct {
	name   string
	length time.Duration // 0: too short for a profile
	run    func(context.Context, target) (result, error)
}

func (r *round) loads() []load {
	closed, rate, streaming := r.set.length(), r.set.length(), r.burst()
	all := []load{
		// First, before requests have grown the memory.
		{loadIdle, 0, func(context.Context, target) (result, error) { return result{}, nil }},
		{"warm-up", 0, func(ctx context.Context, t target) (result, error) {
			return closedLoop(ctx, t, modelAtOnce, r.set.Connections, closed/5), nil
		}},
	}
	if r.set.wants("cpu", "rps") {
		all = append(all, load{loadClosed, closed, r.closed})
	}
	if r.set.wants("latency") {
		// Enough connections for answers that take four times as long.
		connections := max(1, int(4*r.set.Rate*slowUpstream.Seconds()))
		all = append(all, load{loadRate, rate, func(ctx context.Context, t target) (result, error) {
			return openLoop(ctx, t, modelAfter(slowUpstream), r.set.Rate, connections, rate), nil
		}})
	}
	if r.set.wants("streams", "memory") {
		all = append(all, load{loadStreams, streaming.length(), func(ctx context.Context, t target) (result, error) {
			return streams(ctx, t, streaming), nil
		}})
	}
	return all
}

// start starts the proxies and waits until each of them answers.
func (r *round) start(ctx context.Context) error {
	name := func(n string) string { return fmt.Sprintf("%s-%d", n, r.number+1) }
	models := []string{modelAtOnce, modelAfter(slowUpstream), modelStream(r.set.Events, r.burst().every)}
	text := clusterText(r.upstream, models) + r.set.conf + "\n"
	var err error
	if r.node, err = r.sandbox.startNode(ctx, name(nameDsnode), r.set.binary, text); err != nil {
		return err
	}
	proxy, addr, err := r.sandbox.startSelf(name(nameGoProxy), childReverseProxy, "http://"+r.upstream)
	if err != nil {
		return err
	}
	r.targets = []target{
		{name: nameDirect, addr: r.upstream},
		{name: nameDsnode, addr: r.node.api, key: r.node.key, proc: r.node.process},
		{name: nameGoProxy, addr: addr, proc: proxy},
	}
	if r.set.beside != "" {
		n, err := r.sandbox.startNode(ctx, name(nameBeside), r.set.beside, text)
		if err != nil {
			return err
		}
		r.targets = append(r.targets, target{name: nameBeside, addr: n.api, key: n.key, proc: n.process})
	}
	if r.set.nginx != "" {
		p, addr, err := r.sandbox.startNginx(name(nameNginx), r.set.nginx, nginxProxy, r.upstream)
		if err != nil {
			return err
		}
		r.targets = append(r.targets, target{name: nameNginx, addr: addr, proc: p})
	}
	for i := range r.targets {
		t := &r.targets[i]
		if t.key == "" {
			t.key = r.node.key // they ignore it
		}
		if t.proc == nil {
			continue
		}
		if err := t.answers(ctx, t.proc); err != nil {
			return err
		}
	}
	if r.number%2 == 1 {
		slices.Reverse(r.targets)
	}
	return nil
}

// clusterText returns a cluster.yaml that serves the upstream's models by their names.
func clusterText(upstream string, models []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "version: 1\nsites: {%s: {city: here, priority: 1}}\n", siteName)
	fmt.Fprintf(&b, "upstreams: {model-server: {site: %s, url: \"http://%s/v1\", max_concurrency: 4096}}\nmodels:\n", siteName, upstream)
	for _, m := range models {
		fmt.Fprintf(&b, "  %q: {serve: [{upstream: model-server}]}\n", m)
	}
	return b.String()
}

func (r *round) stop() {
	for _, t := range r.targets {
		if t.proc != nil {
			t.proc.stop()
		}
	}
}

// closed is the closed loop, with wrk if it is installed.
func (r *round) closed(ctx context.Context, t target) (result, error) {
	if r.set.wrk != "" {
		return r.sandbox.wrk(ctx, r.set.wrk, t, body(modelAtOnce, false), r.set.Connections, r.set.length())
	}
	return closedLoop(ctx, t, modelAtOnce, r.set.Connections, r.set.length()), nil
}

// profiled runs a load while a CPU profile of the node is written to PREFIX.LOAD.pb.gz.
func (r *round) profiled(l load) func(context.Context, target) (result, error) {
	return func(ctx context.Context, t target) (result, error) {
		var wait sync.WaitGroup
		defer wait.Wait()
		wait.Go(func() {
			if err := r.profile(ctx, l); err != nil {
				fmt.Fprintln(r.progress, "profile:", err)
			}
		})
		return l.run(ctx, t)
	}
}

func (r *round) profile(ctx context.Context, l load) error {
	return r.node.profile(ctx, "profile", l.length, fmt.Sprintf("%s.%s.pb.gz", r.set.profile, l.name))
}

// measure runs a load on a target and measures the CPU time of its process and the
// maximum of its memory.
func (r *round) measure(ctx context.Context, t target, load string, run func(context.Context, target) (result, error)) (measurement, error) {
	m := measurement{Round: r.number + 1, Target: t.name, Load: load}
	machineBefore, err := r.sandbox.busy()
	if err != nil {
		return m, err
	}
	var before time.Duration
	if t.proc != nil {
		if before, err = cpuTime(t.proc.pid()); err != nil {
			return m, err
		}
	}
	peak := t.watchMemory()
	m.result, err = run(ctx, t)
	highest, memErr := peak()
	switch {
	case ctx.Err() != nil:
		return m, context.Cause(ctx)
	case err != nil:
		return m, err
	case memErr != nil:
		return m, memErr
	}
	m.Anonymous = highest
	if t.proc != nil {
		after, err := cpuTime(t.proc.pid())
		if err != nil {
			return m, err
		}
		m.CPU = (after - before).Seconds()
	}
	machineAfter, err := r.sandbox.busy()
	if err != nil {
		return m, err
	}
	m.Elsewhere = elsewhere(machineBefore, machineAfter)
	if load != loadIdle {
		fmt.Fprintf(r.progress, "round %d, %s: %-8s %d done, %d failed in %.1f s; other processes used %.2f CPUs\n",
			m.Round, load, t.name, m.Done, m.Failed, m.Seconds, m.Elsewhere)
	}
	return m, nil
}

// watchMemory samples the anonymous memory of the target's process ten times a second
// until the returned function is called, which returns the maximum.
func (t target) watchMemory() func() (int64, error) {
	if t.proc == nil {
		return func() (int64, error) { return 0, nil }
	}
	var highest int64
	var err error
	look := func() {
		n, e := anonymous(t.proc.pid())
		if e != nil {
			err = e
		}
		highest = max(highest, n)
	}
	end := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			look()
			select {
			case <-end:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
	return func() (int64, error) {
		close(end)
		watch.Wait()
		return highest, err
	}
}
