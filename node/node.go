// Package node puts a dsnode together: it is the only package that knows all
// others. New opens what a node needs and starts nothing, Run runs it until its
// context ends and then drains. Start at Node.Run.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/datakeys"
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/operate"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Options are what a Node needs besides its configuration.
type Options struct {
	Logger  *slog.Logger // required
	Version string
}

// Node is one peer.
type Node struct {
	cfg     *Config
	log     *slog.Logger
	version string
	reg     *prometheus.Registry

	cluster  *cluster.Cluster
	fleet    *upstream.Fleet
	pipeline *serving.Pipeline
	gateway  *gateway.Gateway
	operator *operate.Operator
	admin    *admin.Server
	keys     *datakeys.Keys
	cache    *cache.Cache
	work     *work
	doors    doors
	fence    *failover.Fence

	isolation *drill.Isolator
	coldStart *failover.ColdStart

	draining atomic.Bool
	view     atomic.Pointer[peerView]
	command  atomic.Pointer[operate.Command] // nil until this node is a member

	stops []stop
}

// stop is the undo of something that New did.
type stop struct {
	what string
	undo func() error
}

// onStop is called right after a thing was opened. Close runs them last in,
// first out.
func (n *Node) onStop(what string, undo func() error) {
	n.stops = append(n.stops, stop{what, undo})
}

// Close undoes New. Run calls it; who never runs a Node must call it.
func (n *Node) Close() error {
	var errs []error
	for i := len(n.stops) - 1; i >= 0; i-- {
		if err := n.stops[i].undo(); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", n.stops[i].what, err))
		}
	}
	n.stops = nil
	return errors.Join(errs...)
}

// New opens the stores and the ports of a node; after an error nothing stays
// open.
func New(cfg *Config, o Options) (*Node, error) {
	n := &Node{cfg: cfg, log: o.Logger.With("node", cfg.Name, "site", cfg.Site), version: o.Version, reg: prometheus.NewRegistry()}
	n.view.Store(&peerView{})
	if err := n.open(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Node) open() error {
	n.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), n.buildInfo())
	if err := os.MkdirAll(n.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("make data_dir: %w", err)
	}
	lock, err := storage.Lock(n.cfg.DataDir)
	if err != nil {
		return err
	}
	n.onStop("data directory lock", lock.Unlock)
	operator, err := datakeys.LoadOperator(keyring.KeyRef(n.cfg.OperatorKey), keyring.KeyRef(n.cfg.OperatorKeyPrevious))
	if err != nil {
		return err
	}
	sealer, err := operator.OpenNodeKey(n.cfg.DataDir, n.log)
	if err != nil {
		return err
	}
	if n.keys, err = datakeys.New(n.cfg.Name, n.cfg.DataDir, sealer, operator, n.log); err != nil {
		return err
	}
	if err := n.openWork(); err != nil {
		return err
	}
	o := storage.Options{Dir: n.cfg.DataDir, Sealer: sealer, Logger: n.log, Metrics: storage.NewMetrics(n.reg)}
	store, err := storage.OpenRaftStore(o)
	if err != nil {
		return err
	}
	n.onStop("raft store", store.Close)
	snapshots, err := storage.OpenSnapshotStore(o)
	if err != nil {
		return err
	}
	if err := storage.CheckTogether(store, snapshots); err != nil {
		return err
	}
	credentials, err := mesh.LoadCredentials(n.cfg.RPC.TLS.CertFile, n.cfg.RPC.TLS.KeyFile, n.cfg.RPC.TLS.CAFile, n.log, n.reg)
	if err != nil {
		return err
	}
	gossipKey, err := readGossipKey(n.cfg.Gossip.KeyFile)
	if err != nil {
		return err
	}
	if err := n.listen(); err != nil {
		return err
	}
	n.isolation = drill.NewIsolator(n.cfg.Site, func() { n.cluster.Sever() }, clock.Boottime, time.Now, n.log)
	n.cluster, err = cluster.New(cluster.Options{
		ClusterName: n.cfg.Cluster, Name: n.cfg.Name, Site: n.cfg.Site, Version: n.version,
		DataDir: n.cfg.DataDir, Seeds: n.cfg.Seeds,
		Listener: n.doors.rpc, RPC: n.doors.rpcAddr, API: n.doors.apiAddr, Admin: n.doors.adminAddr,
		Gossip: n.cfg.Gossip.Advertise, GossipBind: n.cfg.Gossip.Bind, GossipKey: gossipKey,
		Credentials: credentials,
		OperatorKey: operator.Current.Fingerprint(), OperatorKeyPrevious: operator.Previous.Fingerprint(),
		Logs: store, Stable: store, Snapshots: snapshots, StoreFailed: store.Failed(), StoreError: store.Err,
		Health: func() cluster.Health { return n.view.Load().health },
		Logger: n.log, Registerer: n.reg, Admit: n.isolation.Admit,
		Quarantined: func() (string, bool) { return n.coldStart.Quarantined() },
		Services:    func(r grpc.ServiceRegistrar) { n.work.replication.Register(r) },
	})
	if err != nil {
		return err
	}
	n.coldStart = failover.NewColdStart(n.cfg.Name, n.cfg.Site, n.cluster)
	n.fence = failover.NewFence(n.cfg.Name, n.cfg.Site, n.cluster,
		func() time.Duration { return n.cluster.Timing().NewLeaderWait }, clock.Boottime, n.log)
	n.cluster.OnRelease(n.release)
	if err := n.work.connect(); err != nil {
		return err
	}
	n.keys.Connect(n.cluster)
	n.cluster.OnCarried(n.keys.Carried)
	n.reg.MustRegister(drill.Metrics{State: n.cluster.State})
	if err := n.openCache(); err != nil {
		return err
	}
	n.fleet = upstream.New(upstream.Options{
		Site: n.cfg.Site, Peers: func() []upstream.Peer { return n.view.Load().peers },
		Logger: n.log, Registerer: n.reg,
		ReadFile: func(path string) ([]byte, error) { return os.ReadFile(n.cfg.Path(path)) },
	})
	n.onStop("upstream connections", func() error { n.fleet.Close(); return nil })
	n.pipeline = serving.New(serving.Options{Fleet: n.fleet, Cache: n.cache, Logger: n.log, Registerer: n.reg})
	n.onStop("shared requests", func() error { n.pipeline.Close(); return nil })
	if err := n.work.openJobs(); err != nil {
		return err
	}
	n.gateway = gateway.New(gateway.Options{
		Server: n.pipeline, Config: func() *config.Config { return n.cluster.State().Parsed },
		Auth: keyCheck{n.cluster}, Health: n, Jobs: n.work.jobs, Site: n.cfg.Site, Node: n.cfg.Name, Logger: n.log, Registerer: n.reg,
	})
	n.operator = operate.New(operate.Options{
		ClusterName: n.cfg.Cluster, Name: n.cfg.Name, Site: n.cfg.Site, Version: n.version,
		Cluster: n.cluster, Jobs: n.work, Fleet: n.fleet, Cache: n.cache, Keys: n.keys, Command: n.command.Load,
		Isolator: n.isolation, ColdStart: n.coldStart, Health: func() cluster.Health { return n.view.Load().health },
		SetDraining: n.setDraining, Logger: n.log,
	})
	n.admin = admin.New(admin.Options{
		Cluster: n.operator, Gatherer: n.reg, Health: n.gateway, Jobs: n.gateway.OperatorHandler(), Token: n.doors.adminToken, Logger: n.log,
	})
	n.equip()
	return nil
}

func (n *Node) buildInfo() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dsnode_build_info", Help: "1, with the version.",
		ConstLabels: prometheus.Labels{"version": n.version, "go": runtime.Version()},
	}, func() float64 { return 1 })
}

func readGossipKey(path string) ([]byte, error) {
	text, err := readBounded(path)
	if err != nil {
		return nil, fmt.Errorf("read gossip key: %w", err)
	}
	return ParseGossipKey(text)
}

// Addresses are where a running node can be reached, with real ports.
type Addresses struct{ API, Admin, RPC string }

// Addresses are known as soon as New has returned.
func (n *Node) Addresses() Addresses {
	return Addresses{API: n.doors.apiAddr, Admin: n.doors.adminAddr, RPC: n.doors.rpcAddr}
}

// Run blocks until ctx ends, drains, hands over and closes everything. It
// returns early with the reason when the node can't go on; when that is
// cluster.ErrDiskStalled something still waits for the disk, and only the end of
// the process frees it.
func (n *Node) Run(ctx context.Context) error {
	// Doors and cluster outlive ctx: a node that drains still answers.
	living, stopLiving := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLiving()
	g, living := errgroup.WithContext(living)
	inner, stopCluster := context.WithCancel(living)
	defer stopCluster()

	n.look()
	for _, loop := range []func(context.Context) error{n.fleet.Run, n.cache.Run, n.keepLooking, n.keepConfigured, n.commandWhenMember, n.work.run} {
		g.Go(func() error { return loop(living) })
	}
	g.Go(func() error { return n.keys.Run(living, n.cluster.WhileLeader) })
	clusterDone := make(chan struct{})
	g.Go(func() error {
		defer close(clusterDone)
		return n.cluster.Run(inner)
	})
	n.doors.serve(g)
	n.log.Info("node started", "version", n.version, "api", n.doors.apiAddr, "admin", n.doors.adminAddr, "rpc", n.doors.rpcAddr, "pid", os.Getpid())

	select {
	case <-ctx.Done():
		n.drain(living)
	case <-living.Done(): // something failed; g.Wait says what
	}
	stopCluster()
	<-clusterDone
	n.doors.close()
	if err := context.Cause(living); errors.Is(err, cluster.ErrDiskStalled) {
		// What is left would wait for the disk. The process ends without it, and
		// nothing is lost: what counts was fsynced, or has not happened.
		n.log.Error("node stopped, its disk hangs", "err", err)
		return err
	}
	stopLiving()
	err := errors.Join(g.Wait(), n.Close())
	n.log.Info("node stopped", "err", err)
	return err
}

// drain takes the node out of the balancers' sight, then lets what runs finish.
func (n *Node) drain(ctx context.Context) {
	delay, grace := n.cfg.Shutdown.Delay.D(), n.cfg.Shutdown.Grace.D()
	n.log.Info("draining", "delay", delay, "grace", grace)
	n.setDraining(true)
	n.work.stopStarting()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if err := n.doors.shutdown(ctx); err != nil {
		n.log.Warn("requests were cut off at the end of shutdown.grace", "grace", grace, "err", err)
	}
}

func (n *Node) setDraining(draining bool) {
	if n.draining.Swap(draining) == draining {
		return
	}
	if draining {
		n.gateway.Drain()
	} else {
		n.gateway.Resume()
	}
	n.look()
	n.cluster.Announce()
}

// Reload reads certificates again: what SIGHUP asks for. The old ones stay in
// use where the new ones can't be read.
func (n *Node) Reload() error {
	err := errors.Join(n.cluster.ReloadCredentials(), n.doors.reload())
	if err != nil {
		n.log.Warn("reload", "err", err)
		return err
	}
	n.log.Info("certificates reloaded")
	return nil
}

// keepConfigured gives the agreed configuration, and what is drained of it, to
// the fleet and the cache whenever they change.
func (n *Node) keepConfigured(ctx context.Context) error {
	var current *config.Config
	var drained map[string]agreed.DrainedUpstream
	for {
		changed := n.cluster.Changed()
		s := n.cluster.State()
		if !maps.Equal(drained, s.Drained) {
			drained = s.Drained
			names := slices.Sorted(maps.Keys(drained))
			n.fleet.SetDrained(names)
			n.log.Info("upstreams that get no new request", "drained", names)
		}
		if s.Parsed != nil && s.Parsed != current {
			current = s.Parsed
			n.cache.Configure(current)
			err := n.fleet.Configure(current)
			n.log.Info("configuration in force", "version", s.Config.Version, "hash", s.Config.Hash, "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

func (n *Node) commandWhenMember(ctx context.Context) error {
	if err := n.cluster.AwaitMember(ctx); err != nil {
		return nil // ctx ended first
	}
	boottime := clock.Boottime
	c := &operate.Command{}
	c.Coordinator = failover.NewCoordinator(failover.Options{
		Name: n.cfg.Name, Site: n.cfg.Site, Agreement: n.cluster, Releaser: n.cluster,
		Health:   func() cluster.Health { return n.view.Load().health },
		Boottime: boottime, Now: time.Now, Quarantined: func() bool { return n.cluster.Quarantined() != "" },
		Logger: n.log, Registerer: n.reg,
	})
	c.Drills = n.newDrills(c)
	n.command.Store(c)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.fence.Run(ctx) })
	g.Go(func() error { return c.Coordinator.Run(ctx) })
	g.Go(func() error { return c.Drills.Run(ctx) })
	g.Go(func() error { return n.isolation.Run(ctx, n.cluster.State, n.cluster.Changed) })
	voters := failover.NewVoters(n.cfg.Name, n.cluster, func() map[string]time.Duration { return n.view.Load().heardSince }, boottime, n.log)
	g.Go(func() error { return n.cluster.WhileLeader(ctx, voters.Lead) })
	return g.Wait()
}

// release ends what runs here as primary, for a switchover; the cluster calls
// it when the leader asks.
func (n *Node) release(ctx context.Context, switchoverID string) error {
	if n.command.Load() == nil {
		return cluster.ErrNotMember
	}
	return n.fence.Release(ctx, switchoverID)
}

func (n *Node) newDrills(c *operate.Command) *drill.Runner {
	return drill.NewRunner(drill.Options{
		Node: n.cfg.Name, Site: n.cfg.Site, API: n.doors.apiAddr, Agreement: n.cluster, Switcher: c.Coordinator,
		Quarantined: func() bool { return n.cluster.Quarantined() != "" },
		Health:      func() cluster.Health { return n.view.Load().health },
		Unhealthy:   n.operator.Reasons,
		NewAsker: func(model string) (drill.Asker, func()) {
			a := drill.NewHTTPAsker(model, n.cfg.API.TLS.On())
			return a, a.Close
		},
		Boottime: clock.Boottime, Now: time.Now, Logger: n.log,
	})
}
