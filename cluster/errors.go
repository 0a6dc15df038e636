package cluster

import (
	"errors"
	"fmt"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
)

// What a proposal or a join can die of, besides the refusals in apply.go.
var (
	ErrNotMember       = errors.New("this node belongs to no cluster yet: run dsnode bootstrap on the first node, or check its seeds")
	ErrNoQuorum        = errors.New("no quorum")
	ErrNotLeader       = errors.New("not the raft leader")
	ErrLeadershipMoved = errors.New("the raft leader changed while the change was under way: it may or may not have been made, read again")
	ErrFeatureLevel    = errors.New("not every member supports this yet: upgrade all nodes first")
	ErrQuarantined     = errors.New("this cluster restarted cold and has not yet compared generations with every site")
	ErrDiskStalled     = errors.New("the disk under raft does not answer")
	ErrStopped         = errors.New("the node is stopping")

	ErrNameTaken    = errors.New("the name is taken by a living node")
	ErrUnknownSite  = errors.New("the site is not in the configuration")
	ErrNodeRemoved  = errors.New("the node was removed from the cluster: wipe its data directory to join again")
	ErrWrongCluster = errors.New("this cluster has another name")
	ErrForeignNode  = errors.New("the certificate is another node's")
	ErrSeedKnows    = errors.New("a seed already belongs to a cluster: this node will join that one")
	ErrNewerPeer    = errors.New("the peer speaks a newer format")
)

// wire gives the refusals that cross the rpc port a code, so that errors.Is
// works on the far side as on the near one.
var wire = []struct {
	code string
	err  error
}{
	{"not_member", ErrNotMember},
	{"no_quorum", ErrNoQuorum},
	{"not_leader", ErrNotLeader},
	{"leadership_moved", ErrLeadershipMoved},
	{"feature_level", ErrFeatureLevel},
	{"quarantined", ErrQuarantined},
	{"disk_stalled", ErrDiskStalled},
	{"stopped", ErrStopped},
	{"name_taken", ErrNameTaken},
	{"unknown_site", ErrUnknownSite},
	{"node_removed", ErrNodeRemoved},
	{"wrong_cluster", ErrWrongCluster},
	{"foreign_node", ErrForeignNode},
	{"newer_peer", ErrNewerPeer},
	{"already_founded", agreed.ErrAlreadyFounded},
	{"not_founded", agreed.ErrNotFounded},
	{"version_conflict", agreed.ErrVersionConflict},
	{"unknown_node", agreed.ErrUnknownNode},
	{"unknown_key", agreed.ErrUnknownKey},
	{"unknown_upstream", agreed.ErrUnknownUpstream},
	{"state_full", agreed.ErrStateFull},
	{"stale_epoch", agreed.ErrStaleEpoch},
	{"stale_term", agreed.ErrStaleTerm},
	{"switchover", agreed.ErrSwitchover},
	{"no_switchover", agreed.ErrNoSwitchover},
	{"drill_running", agreed.ErrDrillRunning},
	{"drill_ended", agreed.ErrDrillEnded},
	{"last_voter", agreed.ErrLastVoter},
	{"unknown_data_key", agreed.ErrUnknownDataKey},
	{"data_key_refused", agreed.ErrDataKeyRefused},
	{"data_key_pending", agreed.ErrDataKeyPending},
	{"data_key_unconfirmed", agreed.ErrDataKeyUnconfirmed},
	{"data_key_in_use", agreed.ErrDataKeyInUse},
	{"data_keys_changed", agreed.ErrDataKeysChanged},
	{"operator_key", agreed.ErrOperatorKey},
	{"operator_key_missing", agreed.ErrOperatorKeyMissing},
	{"bad_purge", agreed.ErrBadPurge},
	{"unknown_stream", agreed.ErrUnknownStream},
	{"stale_token", agreed.ErrStaleToken},
	{"still_member", agreed.ErrStillMember},
}

// refusal puts an expected error on the wire; nil for any other.
func refusal(err error) *clusterpb.Refusal {
	for _, w := range wire {
		if errors.Is(err, w.err) {
			return &clusterpb.Refusal{Code: w.code, Message: err.Error()}
		}
	}
	return nil
}

// unrefuse is the error that refusal put on the wire.
func unrefuse(r *clusterpb.Refusal) error {
	if r == nil {
		return nil
	}
	for _, w := range wire {
		if w.code == r.GetCode() {
			return &remoteError{sentinel: w.err, message: r.GetMessage()}
		}
	}
	return fmt.Errorf("refused by peer (%s): %s", r.GetCode(), r.GetMessage())
}

// remoteError keeps the peer's words and the sentinel's identity.
type remoteError struct {
	sentinel error
	message  string
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.sentinel }
