package cluster

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
)

// Errors of proposals and joins, besides the refusals of agreed.Apply.
var (
	ErrNotMember       = errors.New("this node belongs to no cluster yet: run dsnode bootstrap on the first node, or check its seeds")
	ErrNoQuorum        = errors.New("no quorum")
	ErrNotLeader       = errors.New("not the raft leader")
	ErrLeadershipMoved = errors.New("the raft leader changed in the meantime: the change may or may not have been made, check before you repeat it")
	ErrFeatureLevel    = errors.New("not every member supports this yet: upgrade all nodes first")
	ErrQuarantined     = errors.New("this cluster restarted cold and has not yet compared generations with every site")
	ErrDiskStalled     = errors.New("raft's disk does not respond")
	ErrStopped         = errors.New("the node is stopping")
	// ErrRefused is a refusal of agreed.Apply that has no name of its own: nothing was
	// changed.
	ErrRefused = errors.New("refused")

	ErrNameTaken    = errors.New("the name is used by another node")
	ErrUnknownSite  = errors.New("the site is not in the configuration")
	ErrNodeRemoved  = errors.New("the node was removed from the cluster")
	ErrWrongCluster = errors.New("the cluster has another name")
	ErrForeignNode  = errors.New("the certificate is that of another node")
	ErrSeedKnows    = errors.New("a seed already belongs to a cluster: this node will join that one")
	ErrNewerPeer    = errors.New("the peer uses a newer format")
)

// wire has a code for each refusal that is sent over the rpc port, so that errors.Is
// works for the caller too.
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
	{"not_following", ErrNotFollowing},
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
	{"over_bound", agreed.ErrOverBound},
	{"stale_epoch", agreed.ErrStaleEpoch},
	{"stale_term", agreed.ErrStaleTerm},
	{"switchover", agreed.ErrSwitchover},
	{"no_switchover", agreed.ErrNoSwitchover},
	{"drill_running", agreed.ErrDrillRunning},
	{"drill_ended", agreed.ErrDrillEnded},
	{"last_voter", agreed.ErrLastVoter},
	{"not_removed", agreed.ErrNotRemoved},
	{"awaits_admission", agreed.ErrAwaitsAdmission},
	{"foreign", agreed.ErrForeign},
	{"cluster_key_change", agreed.ErrClusterKeyChange},
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
	{"refused", ErrRefused},
}

// refusedByApply gives a refusal of agreed.Apply without a code ErrRefused. Otherwise the
// node that forwarded the proposal could not tell it from a lost call, whose outcome is
// unknown.
func refusedByApply(err error) error {
	for _, w := range wire {
		if errors.Is(err, w.err) {
			return err
		}
	}
	return &remoteError{sentinel: ErrRefused, message: err.Error()}
}

// refusal encodes an error in wire for a response. Any other error becomes that of the
// call. nil is neither.
func refusal(err error) (*clusterpb.Refusal, error) {
	if err == nil {
		return nil, nil
	}
	for _, w := range wire {
		if errors.Is(err, w.err) {
			return &clusterpb.Refusal{Code: w.code, Message: err.Error()}, nil
		}
	}
	return nil, status.Error(codes.Internal, err.Error())
}

// unrefuse decodes the error that refusal encoded.
func unrefuse(r *clusterpb.Refusal) error {
	if r == nil {
		return nil
	}
	for _, w := range wire {
		if w.code == r.GetCode() {
			return &remoteError{sentinel: w.err, message: r.GetMessage()}
		}
	}
	return fmt.Errorf("the peer refused (%s): %s", r.GetCode(), r.GetMessage())
}

// remoteError has the message of the node that refused, and wraps the sentinel.
type remoteError struct {
	sentinel error
	message  string
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.sentinel }
