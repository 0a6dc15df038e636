package admin

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/failover/drill"
)

// Errors of an operator's request, besides those of packages cluster, failover and
// drill. A Cluster wraps them, and a Client returns the same ones.
var (
	// ErrUnknownVersion: no such version in the configuration's history.
	ErrUnknownVersion = errors.New("no such configuration version")
	// ErrWrongNode: only a certain node can do this, and another one was asked.
	ErrWrongNode = errors.New("only the node itself can do this")
	// ErrNodeAlive: a node that is alive can't be removed.
	ErrNodeAlive = errors.New("the node is alive")
	// ErrOnlyThere: the node to be removed has records that no other node has, or may have.
	ErrOnlyThere = errors.New("what only this node has would be lost")
	// ErrNothingToAck: there was no failover, or it is acknowledged already.
	ErrNothingToAck = errors.New("no failover waits to be acknowledged")
	// ErrNotQuarantined: there is no quarantine to end.
	ErrNotQuarantined = errors.New("the cluster is not quarantined")
	// ErrInvalidRequest: the request is malformed; the error that wraps this says how.
	ErrInvalidRequest = errors.New("invalid request")
	// ErrInvalidConfig: the configuration has problems. errors.As finds them as
	// config.Problems.
	ErrInvalidConfig = errors.New("the configuration is not valid")
	// ErrUnauthorized: the operator's token is missing or wrong.
	ErrUnauthorized = errors.New("the operator's token is missing or wrong")
	// ErrForbidden: the request has a foreign Host, or comes from a page of another origin.
	ErrForbidden = errors.New("refused")
	// ErrTooLarge: the body exceeds its bound.
	ErrTooLarge = errors.New("the request body is too large")
	// ErrBusy: too many requests at this port at once.
	ErrBusy = errors.New("too many requests at this port at once")
	// ErrTimeout: the node did not finish in time. A change may still be made.
	ErrTimeout = errors.New("the node did not finish in time")
	// ErrNoRoute: this version has no such path.
	ErrNoRoute = errors.New("no such path")
	// ErrMethod: the path exists, for other methods.
	ErrMethod = errors.New("method not allowed")
	// ErrInternal: any other error.
	ErrInternal = errors.New("internal error")
)

// refusal is how an error is sent over HTTP.
type refusal struct {
	err    error
	status int
	code   string
	hint   string
}

const (
	hintBootstrap = "start a new cluster with dsnode bootstrap --config cluster.yaml, or wait until this node has joined through its seeds"
	hintLook      = "check whether the change was made before you try again"
	hintAgain     = "try again in a few seconds"
	hintOwnPort   = "ask the node's own admin port with --admin"
)

// refusals are tried in order. The first one that errors.Is finds is used.
var refusals = []refusal{
	// How a switchover failed is tried first: its cause, such as cluster.ErrNoQuorum, is
	// wrapped too, and is not the answer.
	{failover.ErrUnknownOutcome, http.StatusGatewayTimeout, "unknown_outcome", "dsnode status shows the primary; an open switchover clears itself within seconds"},
	{failover.ErrRolledBack, http.StatusServiceUnavailable, "rolled_back", "nothing has changed; see what hindered it, then try again"},
	{failover.ErrNotActing, http.StatusServiceUnavailable, "not_acting", "dsnode status shows what is wrong at the new site; dsnode failover --to SITE moves the primary to another one"},
	{failover.ErrOvertaken, http.StatusConflict, "overtaken", "dsnode status shows the primary"},
	{failover.ErrPrecheck, http.StatusConflict, "precheck_failed", "dsnode failover --plan and dsnode drill plan show all checks; --waive CHECK goes on without one that is waivable"},
	{cluster.ErrNoQuorum, http.StatusServiceUnavailable, "no_quorum", "dsnode status shows which nodes are missing; start a majority of the voters"},
	{cluster.ErrNotMember, http.StatusServiceUnavailable, "not_member", hintBootstrap},
	{agreed.ErrNotFounded, http.StatusServiceUnavailable, "not_member", hintBootstrap},
	{cluster.ErrQuarantined, http.StatusServiceUnavailable, "quarantined", "dsnode status shows which sites have not been heard yet"},
	{cluster.ErrDiskStalled, http.StatusServiceUnavailable, "disk_stalled", "check the disk of the node's data directory"},
	{cluster.ErrNotLeader, http.StatusServiceUnavailable, "not_leader", hintAgain},
	{cluster.ErrStopped, http.StatusServiceUnavailable, "stopping", "ask another node with --admin"},
	{cluster.ErrLeadershipMoved, http.StatusServiceUnavailable, "leadership_moved", hintLook},
	{cluster.ErrSeedKnows, http.StatusConflict, "cluster_known", "this node joins that cluster by itself; to start a new cluster, remove the seeds from node.yaml"},
	{agreed.ErrAlreadyFounded, http.StatusConflict, "already_bootstrapped", "dsnode config diff FILE shows what differs, dsnode config apply FILE changes it"},
	{agreed.ErrVersionConflict, http.StatusConflict, "version_conflict", "dsnode config diff FILE shows what has changed; then apply again"},
	{cluster.ErrUnknownSite, http.StatusConflict, "unknown_site", "add the node's site to cluster.yaml, or correct site in its node.yaml"},
	{cluster.ErrWrongCluster, http.StatusConflict, "wrong_cluster", "correct cluster in node.yaml and issue a certificate for that name"},
	{cluster.ErrNodeRemoved, http.StatusConflict, "node_removed", "run dsnode node admit NODE at a member and start the node; to start anew, empty its data directory first"},
	{cluster.ErrNameTaken, http.StatusConflict, "name_taken", "give the node another name, with a certificate for it"},
	{cluster.ErrFeatureLevel, http.StatusConflict, "feature_level", "dsnode node list shows the version of each node"},
	{agreed.ErrOverBound, http.StatusBadRequest, "over_bound", "send a shorter value; cluster/agreed/DESIGN.md lists the bounds"},
	{agreed.ErrBadPurge, http.StatusBadRequest, "bad_purge", "send exactly one of all, model and key"},
	{agreed.ErrLastVoter, http.StatusConflict, "last_voter", "let another node join first"},
	{agreed.ErrOperatorKeyMissing, http.StatusConflict, "operator_key_missing", "give these nodes the new key as operator_key and the present one as operator_key_previous, restart them, and ask one of them"},
	{agreed.ErrOperatorKey, http.StatusConflict, "operator_key", "dsnode keyring list shows which operator key each node has"},
	{agreed.ErrDataKeysChanged, http.StatusConflict, "data_keys_changed", hintAgain},
	{agreed.ErrDataKeyPending, http.StatusConflict, "data_key_pending", "dsnode keyring list shows which nodes have not confirmed it"},
	{agreed.ErrUnknownDataKey, http.StatusNotFound, "unknown_data_key", "dsnode keyring list shows the keys"},
	{ErrNodeAlive, http.StatusConflict, "node_alive", "stop the node first; --force removes it while it runs, and it ends itself"},
	{ErrOnlyThere, http.StatusConflict, "records_at_risk", "start the node, so that others get them; or remove it with --accept-loss, and dsnode node admit lets it come back with them"},
	{agreed.ErrNotRemoved, http.StatusNotFound, "not_removed", "dsnode node list shows the members; the cluster remembers the 64 nodes that were removed last"},
	{agreed.ErrUnknownNode, http.StatusNotFound, "unknown_node", "dsnode node list shows the names"},
	{agreed.ErrUnknownUpstream, http.StatusNotFound, "unknown_upstream", "dsnode upstream list shows the names"},
	{agreed.ErrUnknownKey, http.StatusNotFound, "unknown_key", "dsnode apikey list shows the ids"},
	{ErrUnknownVersion, http.StatusNotFound, "unknown_version", "dsnode config history lists the versions that are kept"},
	{drill.ErrUnknown, http.StatusNotFound, "unknown_drill", "dsnode drill list shows the ids"},
	{ErrNothingToAck, http.StatusConflict, "nothing_to_acknowledge", "dsnode status shows the last failover"},
	{ErrNotQuarantined, http.StatusConflict, "not_quarantined", "dsnode status shows the state of the cluster"},
	{agreed.ErrDrillRunning, http.StatusConflict, "drill_running", "dsnode drill list shows it; dsnode drill abort ID ends it"},
	{agreed.ErrDrillEnded, http.StatusConflict, "drill_ended", "dsnode drill report ID shows its result"},
	{agreed.ErrSwitchover, http.StatusConflict, "switchover", hintAgain},
	{agreed.ErrStaleEpoch, http.StatusConflict, "stale_epoch", "the primary changed meanwhile: look at dsnode status, then try again"},
	{ErrWrongNode, http.StatusMisdirectedRequest, "wrong_node", hintOwnPort},
	{drill.ErrWrongPlace, http.StatusMisdirectedRequest, "wrong_node", hintOwnPort},
	{agreed.ErrStateFull, http.StatusInsufficientStorage, "state_full", "remove what is no longer needed"},
	{ErrUnauthorized, http.StatusUnauthorized, "unauthorized", "give the token with --admin-token-file FILE or in DSNODE_ADMIN_TOKEN"},
	{ErrForbidden, http.StatusForbidden, "forbidden", "use dsnode or curl, or a page of this port"},
	{ErrTooLarge, http.StatusRequestEntityTooLarge, "too_large", "send a smaller body"},
	{ErrBusy, http.StatusServiceUnavailable, "busy", hintAgain},
	{ErrNoRoute, http.StatusNotFound, "not_found", "the routes are listed in node/API.md"},
	{ErrMethod, http.StatusMethodNotAllowed, "method_not_allowed", "the routes and their methods are listed in node/API.md"},
	{ErrInvalidConfig, http.StatusUnprocessableEntity, "invalid_config", ""},
	{ErrInvalidRequest, http.StatusBadRequest, "invalid_request", ""},
	{drill.ErrInvalid, http.StatusBadRequest, "invalid_request", ""},
	{ErrTimeout, http.StatusGatewayTimeout, "timeout", hintLook},
	{context.DeadlineExceeded, http.StatusGatewayTimeout, "timeout", hintLook},
	{ErrInternal, http.StatusInternalServerError, "internal", "the node's log says more"},
}

// Error is a refusal as it is sent in the body
// {"error":{"code","message","hint","problems"}}. A Cluster may return one to choose
// its message and hint. A Client returns one for each refusal of a node. It wraps the
// errors of its code, and its problems.
type Error struct {
	Code     string          `json:"code"`
	Message  string          `json:"message"`
	Hint     string          `json:"hint,omitempty"`
	Problems config.Problems `json:"problems,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Unwrap is for errors.Is and errors.As.
func (e *Error) Unwrap() []error {
	var wrapped []error
	for _, r := range refusals {
		if r.code == e.Code {
			wrapped = append(wrapped, r.err)
		}
	}
	if len(e.Problems) > 0 {
		wrapped = append(wrapped, e.Problems)
	}
	return wrapped
}

// errorBody is the body of every refusal.
type errorBody struct {
	Error Error `json:"error"`
}

// describe finds the status, code, message and hint of an error.
func describe(err error) (status int, body errorBody) {
	var problems config.Problems
	if errors.As(err, &problems) {
		err = errors.Join(ErrInvalidConfig, err)
	}
	found := refusals[len(refusals)-1]
	for _, r := range refusals {
		if errors.Is(err, r.err) {
			found = r
			break
		}
	}
	said := Error{Code: found.code, Message: err.Error(), Hint: found.hint, Problems: problems}
	if found.code == "invalid_config" {
		said.Message = ErrInvalidConfig.Error() // the problems are listed separately
	}
	var worded *Error
	if errors.As(err, &worded) {
		said.Message = worded.Message
		if worded.Hint != "" {
			said.Hint = worded.Hint
		}
	}
	return found.status, errorBody{Error: said}
}

// readError parses the body that describe made.
func readError(body []byte) (*Error, bool) {
	var wire errorBody
	if err := json.Unmarshal(body, &wire); err != nil || wire.Error.Code == "" {
		return nil, false
	}
	return &wire.Error, true
}
