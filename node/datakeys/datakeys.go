// Package datakeys keeps a node's data-encryption keys in step with what the cluster
// agreed on: it opens and confirms agreed keys, re-seals records whose key retires,
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
	"github.com/dsnode/dsnode/storage/keyring"
)

// Agreement is what Keys needs of the cluster.
type Agreement interface {
	State() *agreed.State
	Changed() <-chan struct{}
	Instance() string
	Propose(ctx context.Context, t agreed.CommandType, data any) (uint64, error)
	Carried(ctx context.Context, node string) (map[string]int64, error)
}

var _ Agreement = (*cluster.Cluster)(nil)

// operatorKeys are the ones that this node was started with.
type Operator struct {
	Current  keyring.OperatorKey
	Previous keyring.OperatorKey // may be none
}

// named gives the one of a fingerprint.
func (o Operator) named(fingerprint string) (keyring.OperatorKey, bool) {
	for _, k := range []keyring.OperatorKey{o.Current, o.Previous} {
		if fingerprint != "" && k.Fingerprint() == fingerprint {
			return k, true
		}
	}
	return keyring.OperatorKey{}, false
}

// Keys is this node's part in the cluster's data keys: it opens what is
// agreed, says so, and keeps the ring in step. On the raft leader it also takes
// the steps that somebody must take (keyring_leader.go). Start at follow.
type Keys struct {
	node     string
	Ring     *keyring.Ring
	dir      string         // of data.keys
	sealer   keyring.Sealer // the node's own
	operator Operator
	agreed   Agreement
	log      *slog.Logger

	// How often a node asks what its records are sealed with while a key is to
	// go, and how long nobody must carry one before it goes.
	Every, Grace time.Duration

	mu       sync.Mutex // guards what follows
	carriers []carrier
	kept     keyring.Kept
	adopted  adoption
	problem  string // why some key can't be opened; empty: all can
}

// adoption is which list of keys the ring shows.
type adoption struct {
	cluster             string
	generation, version uint64
}

func (a adoption) newerThan(b adoption) bool {
	if a.generation != b.generation {
		return a.generation > b.generation
	}
	return a.version > b.version
}

const (
	carriedEvery = 5 * time.Second
	// Far longer than a record is under way between two nodes.
	carriedGrace = 30 * time.Second
	// retryEvery is the pause after something that may work a moment later.
	retryEvery = time.Second
	// maxRetained bounds the keys that the cluster has given up and this node
	// still needs.
	maxRetained = 16
)

// newDataKeys fills the ring with what the node kept from its last run: it opens
// its records before it has heard of anybody. agreed is set before any loop runs.
func New(node, dir string, sealer keyring.Sealer, operator Operator, log *slog.Logger) (*Keys, error) {
	d := &Keys{
		node: node, Ring: keyring.NewRing(), dir: dir, sealer: sealer, operator: operator, log: log,
		Every: carriedEvery, Grace: carriedGrace,
	}
	kept, err := keyring.ReadKept(dir, sealer)
	switch {
	case errors.Is(err, keyring.ErrDamaged), errors.Is(err, keyring.ErrWrongKey):
		log.Warn("the data keys kept here can't be read; they come again with the agreed state", "err", err)
		kept = keyring.Kept{}
	case err != nil:
		return nil, err
	}
	d.kept = kept
	d.adopted = adoption{cluster: kept.ClusterID, generation: kept.Generation, version: kept.Version}
	if err := d.Ring.Set(kept.Current, kept.Keys...); err != nil {
		return nil, fmt.Errorf("data keys kept from the last run: %w", err)
	}
	return d, nil
}

// Connect sets the cluster that the keys are agreed on in. Call it before Run.
func (d *Keys) Connect(a Agreement) { d.agreed = a }

// Run keeps this node's ring, re-seals its records and, while it is the Raft
// leader, takes the steps that only one node may take. It blocks until ctx ends, or
// until a key that is in use can't be opened.
func (d *Keys) Run(ctx context.Context, whileLeader func(context.Context, func(context.Context, cluster.Leadership) error) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.follow(ctx) })
	g.Go(func() error { return d.reseal(ctx) })
	g.Go(func() error { return whileLeader(ctx, d.tend) })
	return g.Wait()
}

// follow keeps the ring in step with what is agreed and confirms each key that
// could be opened, until ctx ends. It fails when a key that is in use can't be
// opened: such a node could read nothing, and must not run.
func (d *Keys) follow(ctx context.Context) error {
	for {
		changed := d.agreed.Changed()
		s := d.agreed.State()
		opened, err := d.adopt(s)
		if err != nil {
			d.log.Error("this node can't go on", "err", err)
			return err
		}
		again := time.Duration(0)
		if err := d.confirm(ctx, s, opened); err != nil && ctx.Err() == nil {
			d.log.Debug("data keys not confirmed yet", "err", err)
			again = retryEvery
		}
		if !wait(ctx, changed, again) {
			return nil
		}
	}
}

// wait returns when something has changed or, if there is one, a time has
// passed; false when ctx has ended.
func wait(ctx context.Context, changed <-chan struct{}, atMost time.Duration) bool {
	var late <-chan time.Time
	if atMost > 0 {
		t := time.NewTimer(atMost)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-changed:
	case <-late:
	}
	return ctx.Err() == nil
}

// fresh reports whether a state is no older than this process: it knows that the
// process has started. While the log is replayed older ones pass by.
func (d *Keys) fresh(s *agreed.State) bool {
	n, member := s.Nodes[d.node]
	return member && n.Instance == d.agreed.Instance()
}

// adopt opens the agreed keys and gives the ids of those that it could open as
// they are wrapped now. What it shows in the ring never goes back.
func (d *Keys) adopt(s *agreed.State) (opened []string, err error) {
	if s.ClusterID == "" {
		return nil, nil
	}
	now := adoption{cluster: s.ClusterID, generation: s.Generation.Number, version: s.DataKeysVersion}
	fresh := d.fresh(s)
	d.mu.Lock()
	defer d.mu.Unlock()
	same := d.adopted.cluster == now.cluster
	if !fresh && (!same || d.adopted.newerThan(now)) {
		return nil, nil
	}
	next := keyring.Kept{ClusterID: now.cluster, Generation: now.generation, Version: now.version}
	var problems []error
	for _, k := range s.DataKeys {
		key, err := d.open(s.ClusterID, k)
		if err == nil {
			opened = append(opened, k.ID)
		} else {
			problems = append(problems, err)
			held, ok := d.held(k.ID)
			if !ok && fresh && k.State() != agreed.DataKeyPending {
				d.problem = err.Error()
				return nil, err
			}
			if !ok {
				continue
			}
			key = held
		}
		// A MAC key is not shown before it is in use: its sums are for ever.
		if key.Kind() == keyring.KindMAC && k.State() == agreed.DataKeyPending {
			continue
		}
		next.Keys = append(next.Keys, key)
		if k.Kind == agreed.DataKeySeal && k.State() == agreed.DataKeyActive {
			next.Current = key.ID()
		}
	}
	if same {
		next.Keys = append(next.Keys, d.retained(s)...)
	}
	if fresh { // else it may be an old list that passes by
		d.note(errors.Join(problems...))
	}
	return opened, d.show(next, now)
}

// open unwraps an agreed key.
func (d *Keys) open(clusterID string, k agreed.DataKey) (keyring.DataKey, error) {
	id, err := keyring.ParseKeyID(k.ID)
	if err != nil {
		return keyring.DataKey{}, err
	}
	op, ok := d.operator.named(k.OperatorKey)
	if ok {
		var key keyring.DataKey
		if key, err = keyring.UnwrapDataKey(op, clusterID, id, keyring.Kind(k.Kind), k.Wrapped); err == nil {
			return key, nil
		}
		return keyring.DataKey{}, fmt.Errorf("%w, although operator key %s is the right one: the agreed state is damaged, or a newer version wrote it", err, k.OperatorKey)
	}
	return keyring.DataKey{}, fmt.Errorf("%w: data key %s of the cluster is wrapped with operator key %s, this node was started with %s: "+
		"give it the cluster's operator key, as operator_key_previous while the cluster changes to another one, and start it again",
		keyring.ErrWrongOperatorKey, k.ID, k.OperatorKey, d.operator.Current.Fingerprint())
}

// held finds a key that the ring shows already.
func (d *Keys) held(id string) (keyring.DataKey, bool) {
	i := slices.IndexFunc(d.kept.Keys, func(k keyring.DataKey) bool { return k.ID().String() == id })
	if i < 0 {
		return keyring.DataKey{}, false
	}
	return d.kept.Keys[i], true
}

// retained are the sealing keys that the cluster has given up and some record
// here may still need: shed lets them go.
func (d *Keys) retained(s *agreed.State) []keyring.DataKey {
	var keep []keyring.DataKey
	for _, k := range d.kept.Keys {
		if _, agreed := s.DataKey(k.ID().String()); !agreed && k.Kind() == keyring.KindSeal {
			keep = append(keep, k)
		}
	}
	return keep[max(0, len(keep)-maxRetained):]
}

// note remembers what can't be opened, and logs it once.
func (d *Keys) note(err error) {
	words := ""
	if err != nil {
		words = err.Error()
	}
	if words != d.problem && words != "" {
		d.log.Error("a data key can't be opened; this node does not confirm it", "err", err)
	}
	d.problem = words
}

// show makes the ring and the kept file say the same; the file is first, so that
// nothing is sealed with a key that a restart would not find.
func (d *Keys) show(next keyring.Kept, now adoption) error {
	if !slices.Equal(next.Keys, d.kept.Keys) || next.Current != d.kept.Current || next.ClusterID != d.kept.ClusterID {
		if err := keyring.WriteKept(d.dir, d.sealer, next); err != nil {
			return err
		}
		if next.Current != d.kept.Current {
			d.log.Info("records are sealed with another data key from now on", "key", next.Current.String(), "before", d.kept.Current.String())
		}
	}
	d.kept, d.adopted = next, now
	return d.Ring.Set(next.Current, next.Keys...)
}

// Problem says which data key can't be opened here and why; empty when all can.
func (d *Keys) Problem() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.problem
}

// confirm tells the cluster which keys this node has opened, unless it knows.
func (d *Keys) confirm(ctx context.Context, s *agreed.State, opened []string) error {
	if !d.fresh(s) {
		return nil
	}
	opened = slices.DeleteFunc(slices.Clone(opened), func(id string) bool {
		k, _ := s.DataKey(id)
		_, confirmed := k.Confirmed[d.node]
		return confirmed
	})
	if len(opened) == 0 {
		return nil
	}
	_, err := d.agreed.Propose(ctx, agreed.CmdDataKeyConfirm, agreed.DataKeyConfirm{Node: d.node, IDs: opened, OperatorKey: s.OperatorKey()})
	if err == nil {
		d.log.Info("data keys opened and confirmed", "keys", opened, "operator_key", s.OperatorKey())
	}
	return err
}
