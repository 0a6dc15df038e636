//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/node/modelsim"
)

// Models of the soak, each with its own upstream.
const (
	modelBusy = "busy" // answers in about 120 ms
	modelSlow = "slow" // clients disconnect before it answers
)

// soak is one node, two simulated model servers in this process, and clients that
// disconnect at any time.
type soak struct {
	sandbox *sandbox
	node    *dsnode
	slow    *modelsim.Server
	clients int
	settle  time.Duration // time before a look; idle connections to upstreams close after seconds
	before  look          // after the warm-up
	counts  counts
	stops   []time.Duration // how long the slow upstream worked after its clients disconnected
	marked  atomic.Pointer[string]
}

// counts of requests by outcome.
type counts struct {
	served, aborted, hungUp atomic.Int64
	failures                tally // of patient clients
}

var (
	errLeft   = errors.New("a leak")
	errMarked = errors.New("an upstream was marked as failed because of its clients")
)

const (
	// stopWithin is the target for an upstream to stop work for disconnected clients.
	stopWithin = 100 * time.Millisecond
	// settleWithin bounds the time until all connections are closed. Idle connections to
	// an upstream stay open for seconds.
	settleWithin = 30 * time.Second
)

func runSoak(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	flags.SetOutput(stderr)
	length := flags.Duration("for", 10*time.Minute, "how long")
	clients := flags.Int("clients", 256, "clients that disconnect together, every two seconds; a quarter as many disconnect at random")
	binary := flags.String("binary", "", "dsnode binary (default: build it)")
	if err := parse(flags, args); err != nil {
		return err
	}
	if *clients < 4 || *length <= 0 {
		return fmt.Errorf("%w: at least 4 clients and some time are needed", errUsage)
	}
	s := &soak{clients: *clients, settle: max(time.Second/2, min(6*time.Second, *length/10))}
	if s.sandbox, err = newSandbox(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.sandbox.close()) }()
	simCtx, stopSims := context.WithCancel(ctx)
	var sims sync.WaitGroup
	defer sims.Wait()
	defer stopSims()
	if err := s.start(ctx, *binary, func(m *modelsim.Server, ln net.Listener) {
		sims.Go(func() {
			if err := m.Run(simCtx, ln); err != nil {
				fmt.Fprintln(stderr, "the simulated model server ended:", err)
			}
		})
	}); err != nil {
		return err
	}
	warm := max(time.Second, min(30*time.Second, *length/10))
	fmt.Fprintf(stderr, "warming up for %v\n", warm)
	if err := s.load(ctx, warm); err != nil {
		return err
	}
	if s.before, err = s.settled(ctx, look{}); err != nil {
		return err
	}
	fmt.Fprintf(stderr, "clients connect and disconnect for %v\n", *length)
	if err := s.load(ctx, *length); err != nil {
		return err
	}
	after, err := s.settled(ctx, s.before)
	if err != nil {
		return err
	}
	return s.report(stdout, after)
}

// start starts the model servers and the node.
func (s *soak) start(ctx context.Context, binary string, serve func(*modelsim.Server, net.Listener)) (err error) {
	text := fmt.Sprintf("version: 1\nsites: {%s: {city: here, priority: 1}}\nupstreams:\n", siteName)
	models := "models:\n"
	for _, name := range []string{modelBusy, modelSlow} {
		o := modelsim.Options{FirstToken: 20 * time.Millisecond, Rate: 200, Tokens: 20, Keep: 1}
		if name == modelSlow {
			o.FirstToken = answerWithin
		}
		sim := modelsim.New(o)
		if name == modelSlow {
			s.slow = sim
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("listen for a simulated model server: %w", err)
		}
		serve(sim, ln) // closes it
		text += fmt.Sprintf("  %s-server: {site: %s, url: \"http://%s/v1\", max_concurrency: 4096}\n", name, siteName, ln.Addr())
		models += fmt.Sprintf("  %s: {serve: [{upstream: %s-server}]}\n", name, name)
	}
	if binary == "" {
		if binary, err = s.sandbox.buildNode(ctx); err != nil {
			return err
		}
	}
	s.node, err = s.sandbox.startNode(ctx, nameDsnode, binary, text+models)
	return err
}

// load runs clients for a time. When it returns all of them have disconnected.
func (s *soak) load(ctx context.Context, d time.Duration) error {
	during, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var all sync.WaitGroup
	for range s.clients / 4 {
		all.Go(func() { s.comeAndGo(during) })
	}
	all.Go(func() { s.watchUpstreams(during) })
	err := s.hangUps(during)
	all.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(err, s.node.alive())
}

// hangUps repeats hangUp until ctx ends.
func (s *soak) hangUps(ctx context.Context) error {
	for i := 0; ctx.Err() == nil; i++ {
		took, err := s.hangUp(ctx, i%2 == 0)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		s.stops = append(s.stops, took)
		_ = pause(ctx, 2*time.Second) // the loop ends with ctx
	}
	return nil
}

// hangUp lets many clients ask a slow model and closes all connections at once. It
// returns the time until the upstream works for none of them.
func (s *soak) hangUp(ctx context.Context, streamed bool) (time.Duration, error) {
	request := s.target().request(modelSlow, streamed)
	var all []*client
	defer func() {
		for _, c := range all {
			c.close()
		}
	}()
	for range s.clients {
		c, err := dial(ctx, s.node.api)
		if err != nil {
			return 0, fmt.Errorf("hang up: %w", err)
		}
		all = append(all, c)
		if _, err := c.conn.Write(request); err != nil {
			return 0, fmt.Errorf("hang up: %w", err)
		}
	}
	if err := s.slowHas(ctx, len(all)); err != nil {
		return 0, fmt.Errorf("not all of %d requests reached the upstream: %w", len(all), err)
	}
	begun := time.Now()
	for _, c := range all {
		c.close()
	}
	if err := s.slowHas(ctx, 0); err != nil {
		return 0, fmt.Errorf("an upstream still works for clients that are gone: %w", err)
	}
	s.counts.hungUp.Add(int64(len(all)))
	return time.Since(begun), nil
}

// slowHas waits until the slow model works on that many requests.
func (s *soak) slowHas(ctx context.Context, want int) error {
	return s.node.until(ctx, func() error {
		if have := s.slow.Stats().InFlight; have != want {
			return fmt.Errorf("%w: the slow upstream works on %d, want %d", errLeft, have, want)
		}
		return nil
	})
}

func (s *soak) target() target {
	return target{name: nameDsnode, addr: s.node.api, key: s.node.key, proc: s.node.process}
}

// report prints the outcome. The error lists leaks and failures.
func (s *soak) report(w io.Writer, after look) error {
	slices.Sort(s.stops)
	failures := s.counts.failures.result(0)
	_, err := fmt.Fprintf(w, `%d requests served, %d aborted at random, %d aborted together; %d patient clients failed
upstreams were free of %d clients that hung up after %.0f ms (median), %.0f ms at most (target: %d ms, %s)
                      before     after
goroutines        %10d%10d
sockets           %10d%10d
requests in flight%10d%10d
live heap, MiB    %10.1f%10.1f
anonymous, MiB    %10.1f%10.1f
breakers opened   %10d%10d
`,
		s.counts.served.Load(), s.counts.aborted.Load(), s.counts.hungUp.Load(), failures.Failed,
		s.clients, 1e3*quantile(s.stops, 0.5), 1e3*quantile(s.stops, 1), stopWithin.Milliseconds(),
		word(quantile(s.stops, 1) <= stopWithin.Seconds()),
		s.before.goroutines, after.goroutines, s.before.sockets, after.sockets, s.before.inFlight, after.inFlight,
		mib(s.before.heap), mib(after.heap), mib(s.before.anonymous), mib(after.anonymous), s.before.opened, after.opened)
	if err != nil {
		return err
	}
	problems := []error{after.returned(s.before)}
	if after.opened > 0 {
		problems = append(problems, fmt.Errorf("%w: its breaker opened %d times", errMarked, after.opened))
	}
	if why := s.marked.Load(); why != nil {
		problems = append(problems, fmt.Errorf("%w: %s", errMarked, *why))
	}
	for text, n := range failures.Errors {
		problems = append(problems, fmt.Errorf("%d patient clients failed: %s", n, text))
	}
	return errors.Join(problems...)
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }
