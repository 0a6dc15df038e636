// Package datakeys keeps a node's data keys in step with those that the cluster has
// agreed on. It opens and confirms agreed keys, re-seals the records of retired ones
// and, on the Raft leader, adds, activates and drops keys. Start at Keys.Run.
package datakeys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Agreement is what Keys needs of *cluster.Cluster.
type Agreement interface {
	State() *agreed.State
	Changed() <-chan struct{}
	// Instance identifies this process.
	Instance() string
	Propose(ctx context.Context, t agreed.CommandType, data any) (uint64, error)
	// Carried asks a node how many of its records are sealed with each data key.
	Carried(ctx context.Context, node string) (map[string]int64, error)
	WhileLeader(ctx context.Context, lead func(context.Context, cluster.Leadership) error) error
}

// Keys is a node's part in the cluster's data keys.
type Keys struct {
	// Ring holds the opened keys. It has those of the node's last run as soon as New
	// returns.
	Ring *keyring.Ring
	// PollInterval is the pause between two counts of the records that are sealed with
	// retired keys, and between two attempts to re-seal them: 5 s unless it is changed
	// before Run.
	PollInterval time.Duration
	// DropGrace is for how long every node must have reported no record of a retired
	// key before the leader drops that key: 30 s unless it is changed before Run. It is
	// far longer than a record is under way between two nodes.
	DropGrace time.Duration

	node     string
	dir      string
	sealer   keyring.Sealer
	operator OperatorKeys
	boottime func() time.Duration
	agreed   Agreement
	log      *slog.Logger

	mu      sync.Mutex // guards what follows
	stores  []namedStore
	kept    keyring.Kept // what the ring and the file of kept keys hold
	version listVersion  // of the agreed list that kept was made from
	problem string       // why some key can't be opened; empty: all can
}

// listVersion identifies an agreed list of data keys.
type listVersion struct {
	cluster             string
	generation, version uint64
}

func (v listVersion) newerThan(o listVersion) bool {
	if v.generation != o.generation {
		return v.generation > o.generation
	}
	return v.version > o.version
}

const (
	defaultPollInterval = 5 * time.Second
	defaultDropGrace    = 30 * time.Second
	// retryPause is the pause after a proposal that failed.
	retryPause = time.Second
	// maxRetained bounds the keys that the cluster has dropped and this node still
	// needs.
	maxRetained = 16
)

// Options are what New needs. All but Boottime are required.
type Options struct {
	Node     string
	Dir      string         // data directory
	Sealer   keyring.Sealer // seals the file of kept keys
	Operator OperatorKeys
	Boottime func() time.Duration // nil: that of this machine
	Logger   *slog.Logger
}

// New fills the ring with the keys that the node kept from its last run, so that it can
// open its records before it has contact to another node.
func New(o Options) (*Keys, error) {
	ks := &Keys{
		Ring: keyring.NewRing(), PollInterval: defaultPollInterval, DropGrace: defaultDropGrace,
		node: o.Node, dir: o.Dir, sealer: o.Sealer, operator: o.Operator, boottime: o.Boottime, log: o.Logger,
	}
	if ks.boottime == nil {
		ks.boottime = clock.Boottime
	}
	kept, err := keyring.ReadKept(o.Dir, o.Sealer)
	switch {
	case errors.Is(err, keyring.ErrDamaged), errors.Is(err, keyring.ErrWrongKey):
		ks.log.Warn("can't read the data keys kept on disk, waiting for those of the agreed state", "err", err)
		kept = keyring.Kept{}
	case err != nil:
		return nil, err
	}
	ks.kept = kept
	ks.version = listVersion{cluster: kept.ClusterID, generation: kept.Generation, version: kept.Version}
	if err := ks.Ring.Set(kept.Current, kept.Keys...); err != nil {
		return nil, fmt.Errorf("data keys kept from the last run: %w", err)
	}
	return ks, nil
}

// Connect sets the cluster that agrees on the keys. It must be called before Run.
func (ks *Keys) Connect(a Agreement) { ks.agreed = a }

// Run keeps the ring in step with the agreed keys, re-seals records and, while this node
// is the Raft leader, takes the leader's steps. It blocks until ctx ends, or until a key
// that is in use can't be opened.
func (ks *Keys) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ks.follow(ctx) })
	g.Go(func() error { return ks.reseal(ctx) })
	g.Go(func() error { return ks.agreed.WhileLeader(ctx, ks.lead) })
	return g.Wait()
}

// follow applies each agreed list and confirms the keys that it could open, until ctx
// ends. It returns an error when a key that is in use can't be opened: the node could
// read none of the new records and must not run.
func (ks *Keys) follow(ctx context.Context) error {
	for {
		changed := ks.agreed.Changed()
		s := ks.agreed.State()
		opened, err := ks.apply(s)
		if err != nil {
			ks.log.Error("can't use the agreed data keys, this node stops", "err", err)
			return err
		}
		retry := time.Duration(0)
		if err := ks.confirm(ctx, s, opened); err != nil && ctx.Err() == nil {
			ks.log.Debug("can't confirm data keys yet", "err", err)
			retry = retryPause
		}
		if !wait(ctx, changed, retry) {
			return nil
		}
	}
}

// wait returns true at a change or, unless timeout is 0, after the timeout. It returns
// false when ctx has ended.
func wait(ctx context.Context, changed <-chan struct{}, timeout time.Duration) bool {
	var expired <-chan time.Time
	if timeout > 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		expired = t.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-changed:
	case <-expired:
	}
	return ctx.Err() == nil
}

// caughtUp reports whether a state is at least as new as this process: it contains the
// process's own registration. While the Raft log is replayed, older states pass by.
func (ks *Keys) caughtUp(s *agreed.State) bool {
	n, member := s.Nodes[ks.node]
	return member && n.Instance == ks.agreed.Instance()
}

// apply opens the agreed keys and puts them into the ring, unless the ring has a newer
// list. It returns the ids of the keys that it could open as they are wrapped now.
func (ks *Keys) apply(s *agreed.State) (opened []string, err error) {
	if s.ClusterID == "" {
		return nil, nil
	}
	version := listVersion{cluster: s.ClusterID, generation: s.Generation.Number, version: s.DataKeysVersion}
	caughtUp := ks.caughtUp(s)
	ks.mu.Lock()
	defer ks.mu.Unlock()
	sameCluster := ks.version.cluster == version.cluster
	if !caughtUp && (!sameCluster || ks.version.newerThan(version)) {
		return nil, nil
	}
	next := keyring.Kept{ClusterID: version.cluster, Generation: version.generation, Version: version.version}
	var problems []error
	for _, k := range s.DataKeys {
		key, err := ks.unwrap(s.ClusterID, k)
		if err == nil {
			opened = append(opened, k.ID)
		} else {
			problems = append(problems, err)
			kept, ok := ks.keptKey(k.ID)
			if !ok && caughtUp && k.State() != agreed.DataKeyPending {
				ks.problem = err.Error()
				return nil, err
			}
			if !ok {
				continue
			}
			key = kept
		}
		// A pending MAC key is left out. Ids and digests that are made with it are permanent,
		// so all nodes must be able to open it first.
		if key.Kind() == keyring.KindMAC && k.State() == agreed.DataKeyPending {
			continue
		}
		next.Keys = append(next.Keys, key)
		if k.Kind == agreed.DataKeySeal && k.State() == agreed.DataKeyActive {
			next.Current = key.ID()
		}
	}
	if sameCluster {
		next.Keys = append(next.Keys, ks.retained(s)...)
	}
	if caughtUp { // an older list may have keys that are no longer in use
		ks.setProblem(errors.Join(problems...))
	}
	return opened, ks.setRing(next, version)
}

// unwrap opens an agreed key with the operator key that wraps it.
func (ks *Keys) unwrap(clusterID string, k agreed.DataKey) (keyring.DataKey, error) {
	id, err := keyring.ParseKeyID(k.ID)
	if err != nil {
		return keyring.DataKey{}, err
	}
	op, ok := ks.operator.byFingerprint(k.OperatorKey)
	if !ok {
		return keyring.DataKey{}, fmt.Errorf("%w: data key %s of the cluster is wrapped with operator key %s, this node was started with %s: "+
			"give it the cluster's operator key, as operator_key_previous while the cluster changes to another one, and start it again",
			keyring.ErrWrongOperatorKey, k.ID, k.OperatorKey, ks.operator.Current.Fingerprint())
	}
	key, err := keyring.UnwrapDataKey(op, clusterID, id, keyring.Kind(k.Kind), k.Wrapped)
	if err != nil {
		return keyring.DataKey{}, fmt.Errorf("%w, although operator key %s is the right one: the agreed state is damaged, or a newer version wrote it", err, k.OperatorKey)
	}
	return key, nil
}

// keptKey finds a key that the ring has already. ks.mu is held.
func (ks *Keys) keptKey(id string) (keyring.DataKey, bool) {
	i := slices.IndexFunc(ks.kept.Keys, func(k keyring.DataKey) bool { return k.ID().String() == id })
	if i < 0 {
		return keyring.DataKey{}, false
	}
	return ks.kept.Keys[i], true
}

// retained returns the sealing keys that the cluster has dropped and that a record of
// this node may still need; forgetDropped removes them. ks.mu is held.
func (ks *Keys) retained(s *agreed.State) []keyring.DataKey {
	var keep []keyring.DataKey
	for _, k := range ks.kept.Keys {
		if _, agreed := s.DataKey(k.ID().String()); !agreed && k.Kind() == keyring.KindSeal {
			keep = append(keep, k)
		}
	}
	return keep[max(0, len(keep)-maxRetained):]
}

// setProblem stores why keys can't be opened, and logs each change. ks.mu is held.
func (ks *Keys) setProblem(err error) {
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	if problem != ks.problem && problem != "" {
		ks.log.Error("can't open a data key, so this node does not confirm it", "err", err)
	}
	ks.problem = problem
}

// setRing writes the file of kept keys and then sets the ring. In this order nothing is
// sealed with a key that a restart would not find. ks.mu is held.
func (ks *Keys) setRing(next keyring.Kept, version listVersion) error {
	if !slices.Equal(next.Keys, ks.kept.Keys) || next.Current != ks.kept.Current || next.ClusterID != ks.kept.ClusterID {
		if err := keyring.WriteKept(ks.dir, ks.sealer, next); err != nil {
			return err
		}
		if next.Current != ks.kept.Current {
			ks.log.Info("new records are sealed with another data key", "key", next.Current.String(), "before", ks.kept.Current.String())
		}
	}
	ks.kept, ks.version = next, version
	return ks.Ring.Set(next.Current, next.Keys...)
}

// Problem says which data key this node can't open and why; empty: it can open all.
func (ks *Keys) Problem() string {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	return ks.problem
}

// confirm tells the cluster which keys this node has opened, if the state lacks that.
func (ks *Keys) confirm(ctx context.Context, s *agreed.State, opened []string) error {
	if !ks.caughtUp(s) {
		return nil
	}
	opened = slices.DeleteFunc(slices.Clone(opened), func(id string) bool {
		k, _ := s.DataKey(id)
		_, confirmed := k.Confirmed[ks.node]
		return confirmed
	})
	if len(opened) == 0 {
		return nil
	}
	_, err := ks.agreed.Propose(ctx, agreed.CmdDataKeyConfirm, agreed.DataKeyConfirm{Node: ks.node, IDs: opened, OperatorKey: s.OperatorKey()})
	if err == nil {
		ks.log.Info("data keys opened and confirmed", "keys", opened, "operator_key", s.OperatorKey())
	}
	return err
}
