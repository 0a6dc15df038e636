package node

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/datakeys"
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/operate"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage"
	"github.com/dsnode/dsnode/storage/keyring"
)

// open opens the parts of a node. Each part needs only parts above it, except where it
// gets a function that is called after New.
func (n *Node) open() error {
	n.registerMetrics()
	for _, part := range []func() error{
		n.openDataDir,
		n.openKeys,
		n.openJournals,
		n.openCluster,
		n.openReplication,
		n.openCache,
		n.openPipeline,
		n.openJobs,
		n.openHandlers,
	} {
		if err := part(); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) registerMetrics() {
	version := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dsnode_build_info", Help: "1, with the version.",
		ConstLabels: prometheus.Labels{"version": n.version, "go": runtime.Version()},
	}, func() float64 { return 1 })
	n.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), version)
}

func (n *Node) openDataDir() error {
	if err := os.MkdirAll(n.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("make data_dir: %w", err)
	}
	lock, err := storage.Lock(n.cfg.DataDir)
	if err != nil {
		return err
	}
	n.dataDir = lock
	n.onStop("data directory lock", lock.Unlock)
	return nil
}

func (n *Node) openKeys() (err error) {
	n.operatorKeys, err = datakeys.LoadOperatorKeys(keyring.KeyRef(n.cfg.OperatorKey), keyring.KeyRef(n.cfg.OperatorKeyPrevious))
	if err != nil {
		return err
	}
	if n.sealer, err = n.operatorKeys.OpenNodeKey(n.cfg.DataDir, n.log); err != nil {
		return err
	}
	n.keys, err = datakeys.New(datakeys.Options{
		Node: n.cfg.Name, Dir: n.cfg.DataDir, Sealer: n.sealer, Operator: n.operatorKeys, Boottime: n.host.Boottime, Logger: n.log,
	})
	return err
}

// isolationFile keeps the cut of a drill over a restart.
const isolationFile = "isolation.json"

// openCluster opens Raft's files and the ports, which the cluster advertises.
func (n *Node) openCluster() error {
	o := storage.Options{
		Dir: n.cfg.DataDir, Sealer: n.sealer, Logger: n.log, Metrics: storage.NewMetrics(n.reg),
		BeforeWrite: n.host.BeforeWrite(host.WriteRaft),
	}
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
	n.isolation = drill.NewIsolator(n.cfg.Site, filepath.Join(n.cfg.DataDir, isolationFile), func() { n.cluster.Sever() }, n.host.Boottime, n.host.Now, n.log)
	n.cluster, err = cluster.New(cluster.Options{
		ClusterName: n.cfg.Cluster, Name: n.cfg.Name, Site: n.cfg.Site, Version: n.version,
		DataDir: n.cfg.DataDir, Seeds: n.cfg.Seeds,
		Listener: n.listeners.rpc, RPC: n.listeners.rpcAddr, API: n.listeners.apiAddr, Admin: n.listeners.adminAddr,
		Gossip: n.cfg.Gossip.Advertise, GossipBind: n.cfg.Gossip.Bind, GossipKey: gossipKey,
		Credentials: credentials,
		OperatorKey: n.operatorKeys.Current.Fingerprint(), OperatorKeyPrevious: n.operatorKeys.Previous.Fingerprint(),
		ClusterKeys: n.operatorKeys, FeatureLevel: n.cfg.FeatureLevel,
		PeerConns: n.shares.Peers, PeerHandshakes: n.shares.Handshakes,
		DataIntact: n.dataDir.Intact,
		Logs:       store, Stable: store, Snapshots: snapshots, StoreFailed: store.Failed(), StoreError: store.Err,
		Host: n.host, Health: n.ownHealth, Logger: n.log, Registerer: n.reg, Admit: n.isolation.Admit,
		Quarantined: func() (string, bool) { return n.coldStart.Quarantined() },
		Services:    func(r grpc.ServiceRegistrar) { n.jobs.replication.Register(r) },
	})
	if err != nil {
		return err
	}
	n.coldStart = failover.NewColdStart(n.cfg.Name, n.cfg.Site, n.cluster)
	n.fence = failover.NewFence(n.cfg.Name, n.cfg.Site, n.cluster,
		func() time.Duration { return n.cluster.Timing().NewLeaderWait }, n.host.Boottime, n.log)
	n.cluster.OnRelease(n.release)
	n.cluster.OnActing(n.fence.ActingEpoch)
	n.keys.Connect(n.cluster)
	n.cluster.OnCarried(n.keys.CountRecords)
	n.reg.MustRegister(drill.Metrics{State: n.cluster.State})
	return nil
}

func readGossipKey(path string) ([]byte, error) {
	text, err := readBounded(path)
	if err != nil {
		return nil, fmt.Errorf("read gossip key: %w", err)
	}
	return ParseGossipKey(text)
}

func (n *Node) openPipeline() error {
	n.fleet = upstream.New(upstream.Options{
		Site: n.cfg.Site, Peers: func() []upstream.Peer { return n.view.Load().peers },
		Host: n.host, Now: n.host.Now, Logger: n.log, Registerer: n.reg,
		ReadFile: func(path string) ([]byte, error) { return os.ReadFile(n.cfg.Path(path)) },
	})
	n.onStop("upstream connections", func() error { n.fleet.Close(); return nil })
	n.pipeline = serving.New(serving.Options{Fleet: n.fleet, Cache: n.cache, Now: n.host.Now, Logger: n.log, Registerer: n.reg})
	n.onStop("shared requests", func() error { n.pipeline.Close(); return nil })
	return nil
}

func (n *Node) openHandlers() error {
	n.gateway = gateway.New(gateway.Options{
		Server: n.pipeline, Config: func() *config.Config { return n.cluster.State().Parsed },
		Auth: keyCheck{n.cluster, n.host}, Health: n, Jobs: n.jobs.service, Site: n.cfg.Site, Node: n.cfg.Name, Logger: n.log, Registerer: n.reg,
		InFlight: n.shares.InFlight, BodyMemory: bodyMemory(os.DirFS("/")),
	})
	n.operator = &operate.Operator{
		ClusterName: n.cfg.Cluster, Name: n.cfg.Name, Site: n.cfg.Site, Version: n.version,
		Cluster: n.cluster, Jobs: n.jobs, Fleet: n.fleet, Cache: n.cache, Keys: n.keys, Control: n.control.Load,
		Reconnect: n.isolation.Heal, EndQuarantine: n.coldStart.Release, Health: n.ownHealth, Starting: n.starting, SetDraining: n.setDraining, Host: n.host, Log: n.log,
	}
	n.admin = admin.New(admin.Options{
		Cluster: n.operator, Gatherer: n.reg, Health: n.gateway, Jobs: n.gateway.OperatorHandler(), Token: n.listeners.adminToken, Logger: n.log,
	})
	n.setHandlers()
	return nil
}
