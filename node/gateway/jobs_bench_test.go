package gateway

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// alone is a cluster of one node that never gets a lease, and has no others.
type alone struct{ state agreed.State }

func (a *alone) State() *agreed.State                            { return &a.state }
func (a *alone) Changed() <-chan struct{}                        { return nil }
func (a *alone) Lease() (left time.Duration, epoch uint64)       { return 0, 0 }
func (a *alone) OwnershipLease() (left time.Duration, at uint64) { return 0, 0 }
func (a *alone) LeaseChanged() <-chan struct{}                   { return nil }
func (a *alone) Propose(context.Context, agreed.CommandType, any) (uint64, error) {
	return 0, cluster.ErrNoQuorum
}
func (a *alone) Possible(journal.Durability) error       { return nil }
func (a *alone) CaughtUp() bool                          { return true }
func (a *alone) Spread(journal.Stream) bool              { return true }
func (a *alone) Reachable(d journal.Durability) bool     { return d == journal.DurableNode }
func (a *alone) AwaitCaughtUp(ctx context.Context) error { return ctx.Err() }
func (a *alone) AwaitEnded(ctx context.Context) (func(journal.Stream) bool, error) {
	return func(journal.Stream) bool { return false }, ctx.Err()
}

func (a *alone) DurabilityOf(journal.Stream, uint64) journal.Durability {
	return journal.DurableNode
}

func (a *alone) Await(context.Context, journal.Stream, uint64, journal.Durability) error { return nil }

// BenchmarkSubmit is a durable submission of 1 KiB, executor paused: through
// gateway, jobs, journal with its fsync, and table; over HTTP and by the handler
// alone.
func BenchmarkSubmit(b *testing.B) {
	dir := b.TempDir()
	for _, sub := range []string{"journal", "table", "jobs"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			b.Fatal(err)
		}
	}
	ring, _ := keyringtest.New(b, 1)
	sealer, moment, log, reg := journal.NewSealer(ring), journal.NewHLC(time.Now, time.Minute), slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	table, err := jobtable.Open(jobtable.Options{Dir: filepath.Join(dir, "table"), Sealer: sealer, Ring: ring, Clock: moment, Registerer: reg})
	if err != nil {
		b.Fatal(err)
	}
	if err := table.SetWhole(); err != nil {
		b.Fatal(err)
	}
	disk, err := journal.Open(journal.Options{Dir: filepath.Join(dir, "journal"), Clock: moment, Logger: log, Registerer: reg, Durable: table.Apply})
	if err != nil {
		b.Fatal(err)
	}
	cfg := &config.Config{Limits: config.DefaultLimits(), Models: map[string]config.Model{"m": {}}, Jobs: config.DefaultJobs()}
	cfg.Jobs.MaxQueued, cfg.Jobs.MaxQueuedBytes = 1<<30, 1<<40
	world := &alone{agreed.State{Parsed: cfg}}
	all, err := jobs.New(jobs.Options{
		Node: "n", Site: "here", Dir: filepath.Join(dir, "jobs"), Journal: disk, Table: table, Sealer: sealer, Ring: ring, Replication: world,
		Ownership: failover.NewOwnership(failover.NewFence("n", "here", world, func() time.Duration { return time.Second }, clock.Boottime, log), world), State: world.State,
		Spare: func() int { return 0 }, Heard: func(string) bool { return false }, Registerer: reg,
	})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	var loops sync.WaitGroup
	loops.Go(func() { _ = all.Run(ctx) })
	loops.Go(func() { _ = table.Run(ctx) })
	defer func() { cancel(); loops.Wait(); _ = disk.Close(); _ = table.Close() }()
	g := New(Options{
		Config: func() *config.Config { return cfg }, Auth: keys{}, Health: healthFunc(func() Report { return Report{} }),
		Jobs: all, Site: "here", Node: "n", Registerer: prometheus.NewRegistry(),
	})
	body := fmt.Sprintf(`{"endpoint":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":"%s"}]},"durability":"node"}`, strings.Repeat("word ", 180))
	for first := true; first; { // until there is a stream
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodPost, "/v1/jobs", strings.NewReader(body))
		r.Header.Set("Authorization", "Bearer all")
		g.ServeHTTP(w, r)
		first = w.Code != http.StatusAccepted
	}
	handler := httptest.NewServer(g)
	defer handler.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	defer client.CloseIdleConnections()
	ways := map[string]func() int{
		"http": func() int {
			resp, err := client.Post(handler.URL+"/v1/jobs", "application/json", strings.NewReader(body))
			if err != nil {
				b.Error(err)
				return 0
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			return resp.StatusCode
		},
		"handler": func() int {
			w := httptest.NewRecorder()
			r := httptest.NewRequest(http.MethodPost, "/v1/jobs", strings.NewReader(body))
			r.RemoteAddr = "127.0.0.1:1"
			g.ServeHTTP(w, r)
			return w.Code
		},
	}
	for _, way := range []string{"handler", "http"} {
		b.Run(way, func(b *testing.B) {
			b.ReportAllocs()
			before := cpuTime(b)
			b.SetParallelism(32) // × GOMAXPROCS of 2: 64 in flight
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if status := ways[way](); status != http.StatusAccepted {
						b.Errorf("status %d", status)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
			b.ReportMetric(float64(cpuTime(b)-before)/float64(time.Microsecond)/float64(b.N), "cpu-µs/op")
		})
	}
}
