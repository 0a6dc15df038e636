// Package node puts a dsnode together: it is the only package that knows all others. New
// opens what a node needs and starts nothing. Run runs it until its context ends, and then
// drains it. open.go has the order in which the parts are opened, config.go is node.yaml.
// Start at Node.Run.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/datakeys"
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/operate"
	"github.com/dsnode/dsnode/node/ports"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Options are what a Node needs besides its configuration.
type Options struct {
	Logger  *slog.Logger // required
	Version string
	Host    *host.Host // the machine that the node runs on; nil: this one
}

// Node is one node of a cluster.
type Node struct {
	cfg     *Config
	log     *slog.Logger
	version string
	host    *host.Host
	reg     *prometheus.Registry

	dataDir      *storage.DirLock
	operatorKeys datakeys.OperatorKeys
	sealer       keyring.Sealer // of the node's own key
	keys         *datakeys.Keys
	cluster      *cluster.Cluster
	listeners    listeners
	shares       ports.Shares // of the files that the process may have open
	fence        *failover.Fence
	isolation    *drill.Isolator
	coldStart    *failover.ColdStart
	cache        *cache.Cache
	fleet        *upstream.Fleet
	pipeline     *serving.Pipeline
	jobs         *asyncJobs
	gateway      *gateway.Gateway
	operator     *operate.Operator
	admin        *admin.Server

	draining atomic.Bool
	started  atomic.Bool // see starting
	view     atomic.Pointer[peerView]
	control  atomic.Pointer[operate.Control] // nil until this node is a member

	stops []stop
}

// stop undoes something that New did.
type stop struct {
	what string
	undo func() error
}

// onStop is called right after something was opened. Close calls undo; what was opened
// last is closed first.
func (n *Node) onStop(what string, undo func() error) {
	n.stops = append(n.stops, stop{what, undo})
}

// Close undoes New. Run calls it. The owner of a Node that never runs must call it.
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

// ErrRemoved is the error of Run when the node was removed from the cluster. A restart
// ends with it again, unless the node was admitted again.
var ErrRemoved = cluster.ErrNodeRemoved

// New opens the stores and the ports of a node. If it fails, nothing stays open.
func New(cfg *Config, o Options) (*Node, error) {
	n := &Node{cfg: cfg, log: o.Logger.With("node", cfg.Name, "site", cfg.Site), version: o.Version, host: o.Host, reg: prometheus.NewRegistry(), shares: ports.Divide(ports.OpenFiles())}
	n.view.Store(&peerView{})
	if err := n.open(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// Addresses are where a node can be reached, with the real ports.
type Addresses struct{ API, Admin, RPC string }

// Addresses are known as soon as New has returned.
func (n *Node) Addresses() Addresses {
	return Addresses{API: n.listeners.apiAddr, Admin: n.listeners.adminAddr, RPC: n.listeners.rpcAddr}
}

// Run blocks until ctx ends, then drains the node, hands over the Raft leadership and
// closes everything. It returns early when the node can't go on. After
// cluster.ErrDiskStalled a goroutine still waits for the disk, and only the end of the
// process ends it.
func (n *Node) Run(ctx context.Context) error {
	// Everything runs longer than ctx, because a node that drains still answers.
	running, stopRunning := context.WithCancel(context.WithoutCancel(ctx))
	defer stopRunning()
	g, running := errgroup.WithContext(running)
	inCluster, leaveCluster := context.WithCancel(running)
	defer leaveCluster()

	n.updateView()
	for _, loop := range []func(context.Context) error{
		n.fleet.Run, n.cache.Run, n.keepViewFresh, n.followConfig, n.keys.Run, n.runControl, n.jobs.run,
	} {
		g.Go(func() error { return loop(running) })
	}
	clusterDone := make(chan struct{})
	g.Go(func() error {
		defer close(clusterDone)
		return n.cluster.Run(inCluster)
	})
	n.listeners.serve(g)
	n.log.Info("node started", "version", n.version, "api", n.listeners.apiAddr, "admin", n.listeners.adminAddr, "rpc", n.listeners.rpcAddr, "pid", os.Getpid())

	select {
	case <-ctx.Done():
		n.drain(running)
	case <-n.cluster.Removed():
		// cluster.Run returns why. Requests and jobs that run may end: their clients wait,
		// and no lease is needed for what has begun.
		n.log.Error("this node was removed from the cluster: it refuses requests from now on, lets running ones finish, and ends", "err", n.cluster.RemovedError())
		n.gateway.Refuse()
		n.drain(running)
	case <-running.Done(): // something failed; g.Wait returns the error
	}
	leaveCluster()
	<-clusterDone
	n.listeners.close()
	if err := context.Cause(running); errors.Is(err, cluster.ErrDiskStalled) {
		// The rest would wait for the disk, so the process ends without it. Nothing is
		// lost: whatever was acknowledged had been fsynced.
		n.log.Error("node stopped, its disk hangs", "err", err)
		return err
	}
	stopRunning()
	err := errors.Join(g.Wait(), n.Close())
	n.log.Info("node stopped", "err", err)
	return err
}

// drain makes the node not ready for load balancers, and lets running requests finish.
func (n *Node) drain(ctx context.Context) {
	delay, grace := n.cfg.Shutdown.Delay.D(), n.cfg.Shutdown.Grace.D()
	n.log.Info("draining", "delay", delay, "grace", grace)
	n.setDraining(true)
	n.jobs.stopStarting()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if err := n.listeners.shutdown(ctx); err != nil {
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
	n.updateView()
	n.cluster.Announce()
}

// Reload reads the certificates again, as SIGHUP asks. Where the new files can't be read,
// the old certificates stay in use.
func (n *Node) Reload() error {
	err := errors.Join(n.cluster.ReloadCredentials(), n.listeners.reload())
	if err != nil {
		n.log.Warn("can't reload certificates, the old ones stay in use", "err", err)
		return err
	}
	for key, file := range n.cfg.secretFiles() {
		// The new certificate is in use all the same: without it the node would fail when
		// the old one expires. Its next start would refuse it.
		if what, hint := openMode(file); what != "" {
			n.log.Warn("a file with a secret is open to others, and the node will not start again with it", "key", key, "problem", what, "hint", hint)
		}
	}
	n.log.Info("certificates reloaded")
	return nil
}

// followConfig gives each change of the agreed configuration, and of the drained upstreams,
// to the fleet and the cache.
func (n *Node) followConfig(ctx context.Context) error {
	var current *config.Config
	var drained map[string]agreed.DrainedUpstream
	for {
		changed := n.cluster.Changed()
		s := n.cluster.State()
		if !maps.Equal(drained, s.Drained) {
			drained = s.Drained
			names := slices.Sorted(maps.Keys(drained))
			n.fleet.SetDrained(names)
			n.log.Info("drained upstreams changed", "drained", names)
		}
		if s.Parsed != nil && s.Parsed != current {
			current = s.Parsed
			n.cache.Configure(current)
			err := n.fleet.Configure(current)
			n.warnOfFewFiles(current.Limits)
			n.log.Info("configuration in force", "version", s.Config.Version, "hash", s.Config.Hash, "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// warnOfFewFiles says when the limit of open files is what bounds this node.
func (n *Node) warnOfFewFiles(l config.Limits) {
	if n.shares.Clients < l.Connections || n.shares.InFlight < l.InFlight {
		n.log.Warn("the limit of open files bounds this node more than its configuration does: raise it (ulimit -n, LimitNOFILE), or lower the limits",
			"open_files", ports.OpenFiles(), "connections", min(n.shares.Clients, l.Connections), "configured_connections", l.Connections,
			"in_flight", min(n.shares.InFlight, l.InFlight), "configured_in_flight", l.InFlight)
	}
}

// runControl waits until this node is a member. Then it runs what the members do to have
// one primary: the fence, the coordinator, drills, and the placement of voters.
func (n *Node) runControl(ctx context.Context) error {
	if err := n.cluster.AwaitMember(ctx); err != nil {
		return nil // ctx ended first
	}
	coordinator := failover.NewCoordinator(n.failoverOptions())
	c := &operate.Control{Coordinator: coordinator, Drills: n.newDrills(coordinator)}
	n.control.Store(c)
	voters := failover.NewVoters(n.cfg.Name, n.cluster, func() map[string]time.Duration { return n.view.Load().heardSince }, n.host.Boottime, n.log)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.fence.Run(ctx) })
	g.Go(func() error { return c.Coordinator.Run(ctx) })
	g.Go(func() error { return c.Drills.Run(ctx) })
	g.Go(func() error { return n.isolation.Run(ctx, n.cluster.State, n.cluster.Changed) })
	g.Go(func() error { return n.cluster.WhileLeader(ctx, voters.Lead) })
	return g.Wait()
}

// failoverOptions are those of the coordinator and the adopter.
func (n *Node) failoverOptions() failover.Options {
	return failover.Options{
		Name: n.cfg.Name, Site: n.cfg.Site, Agreement: n.cluster, Releaser: n.cluster, Health: n.ownHealth,
		Boottime: n.host.Boottime, Now: n.host.Now, Quarantined: n.quarantined, Copies: jobCopies{n.jobs}, Logger: n.log, Registerer: n.reg,
	}
}

func (n *Node) newDrills(s drill.Switcher) *drill.Runner {
	return drill.NewRunner(drill.Options{
		Node: n.cfg.Name, Site: n.cfg.Site, API: n.listeners.apiAddr, Agreement: n.cluster, Switcher: s,
		Quarantined: n.quarantined, Health: n.ownHealth, Unhealthy: n.operator.Reasons,
		NewAsker: func(model string) (drill.Asker, func()) {
			a := drill.NewHTTPAsker(model, n.cfg.API.TLS.On(), n.host)
			return a, a.Close
		},
		Boottime: n.host.Boottime, Now: n.host.Now, Logger: n.log,
	})
}

// judgement is the newest one of this node's coordinator, if there is any.
func (n *Node) judgement() (failover.Judgement, bool) {
	c := n.control.Load()
	if c == nil {
		return failover.Judgement{}, false
	}
	return c.Coordinator.Judgement()
}

func (n *Node) quarantined() bool { return n.cluster.Quarantined() != "" }

// release stops what runs on this node as primary, for a switchover, and waits until the
// start of every running job is on the disk. The cluster calls it when the node that
// carries the switchover out asks for it.
func (n *Node) release(ctx context.Context, switchoverID string) error {
	if n.control.Load() == nil {
		return cluster.ErrNotMember
	}
	if err := n.fence.Release(ctx, switchoverID); err != nil {
		return err
	}
	return n.jobs.service.AwaitStarted(ctx)
}
