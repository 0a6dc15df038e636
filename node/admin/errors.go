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

// How an operator's request fails, besides the sentinels of packages cluster, failover
// and drill. A Cluster wraps them; a Client gives the same ones back.
var (
	// ErrUnknownVersion: no such version in the configuration's history.
	ErrUnknownVersion = errors.New("no such configuration version")
	// ErrWrongNode: only the node itself can do this, and another was asked.
	ErrWrongNode = errors.New("only the node itself can do this")
	// ErrNodeAlive: a living node is not removed.
	ErrNodeAlive = errors.New("the node is alive")
	// ErrNothingToAck: there was no failover, or it was acknowledged.
	ErrNothingToAck = errors.New("no failover waits to be acknowledged")
	// ErrNotQuarantined: there is no quarantine to end.
	ErrNotQuarantined = errors.New("the cluster is not quarantined")
	// ErrInvalidRequest: what was asked makes no sense, in the words around it.
	ErrInvalidRequest = errors.New("invalid request")
	// ErrInvalidConfig: the configuration has problems; errors.As finds them
	// as config.Problems.
	ErrInvalidConfig = errors.New("the configuration is not valid")
	// ErrUnauthorized: the operator's token is missing or wrong.
	ErrUnauthorized = errors.New("the operator's token is missing or wrong")
	// ErrForbidden: a browser that a foreign page has sent, or a foreign Host.
	ErrForbidden = errors.New("refused")
	// ErrTooLarge: the body is over its bound.
	ErrTooLarge = errors.New("the request body is too large")
	// ErrBusy: too many requests at this port at once.
	ErrBusy = errors.New("too many requests at this port at once")
	// ErrTimeout: the node did not get it done in time; a change may still happen.
	ErrTimeout = errors.New("not done in time")
	// ErrNoRoute: this version has no such path.
	ErrNoRoute = errors.New("no such path")
	// ErrMethod: the path exists, for other methods.
	ErrMethod = errors.New("method not allowed")
	// ErrInternal is what has no better name.
	ErrInternal = errors.New("internal error")
)

// refusal is how a sentinel travels.
type refusal struct {
	err    error
	status int
	code   string
	hint   string
}

const (
	hintBootstrap = "start a new cluster with dsnode bootstrap --config cluster.yaml, or wait until this node has joined through its seeds"
	hintLook      = "see whether it happened before you try again"
	hintAgain     = "try again in a few seconds"
	hintOwnPort   = "ask the node's own admin port with --admin"
)

// refusals are tried in order; the first that errors.Is finds wins.
var refusals = []refusal{
	// How a switchover failed comes first: what it failed of inside, such as
	// cluster.ErrNoQuorum, is not the answer.
	{failover.ErrUnknownOutcome, http.StatusGatewayTimeout, "unknown_outcome", "dsnode status shows the primary; an open switchover clears itself within seconds"},
	{failover.ErrRolledBack, http.StatusServiceUnavailable, "rolled_back", "nothing has changed; see what hindered it, then try again"},
	{failover.ErrOvertaken, http.StatusConflict, "overtaken", "dsnode status shows the primary"},
	{failover.ErrPrecheck, http.StatusConflict, "precheck_failed", "dsnode failover --plan and dsnode drill plan show all checks; --waive CHECK goes on without one that is waivable"},
	{cluster.ErrNoQuorum, http.StatusServiceUnavailable, "no_quorum", "dsnode status shows which nodes are missing; bring a majority of the voters back"},
	{cluster.ErrNotMember, http.StatusServiceUnavailable, "not_member", hintBootstrap},
	{agreed.ErrNotFounded, http.StatusServiceUnavailable, "not_member", hintBootstrap},
	{cluster.ErrQuarantined, http.StatusServiceUnavailable, "quarantined", "dsnode status shows which sites were not heard of yet"},
	{cluster.ErrDiskStalled, http.StatusServiceUnavailable, "disk_stalled", "look at the disk under the data directory"},
	{cluster.ErrNotLeader, http.StatusServiceUnavailable, "not_leader", hintAgain},
	{cluster.ErrStopped, http.StatusServiceUnavailable, "stopping", "ask another node with --admin"},
	{cluster.ErrLeadershipMoved, http.StatusServiceUnavailable, "leadership_moved", hintLook},
	{cluster.ErrSeedKnows, http.StatusConflict, "cluster_known", "this node joins by itself; take the seeds out of node.yaml if a new cluster is what you want"},
	{agreed.ErrAlreadyFounded, http.StatusConflict, "already_bootstrapped", "dsnode config diff FILE shows what differs, dsnode config apply FILE changes it"},
	{agreed.ErrVersionConflict, http.StatusConflict, "version_conflict", "look at what has changed with dsnode config diff FILE, then apply again"},
	{cluster.ErrUnknownSite, http.StatusConflict, "unknown_site", "add the node's site to cluster.yaml, or correct site in its node.yaml"},
	{cluster.ErrWrongCluster, http.StatusConflict, "wrong_cluster", "correct cluster in node.yaml and issue a certificate for that name"},
	{cluster.ErrNodeRemoved, http.StatusConflict, "node_removed", "stop the node, empty its data directory, and start it again"},
	{cluster.ErrNameTaken, http.StatusConflict, "name_taken", "give the node another name, with a certificate for it"},
	{cluster.ErrFeatureLevel, http.StatusConflict, "feature_level", "dsnode node list shows the version of each node"},
	{agreed.ErrBadPurge, http.StatusBadRequest, "bad_purge", ""},
	{agreed.ErrLastVoter, http.StatusConflict, "last_voter", "let another node join first"},
	{agreed.ErrOperatorKeyMissing, http.StatusConflict, "operator_key_missing", "give these nodes the new key as operator_key and the present one as operator_key_previous, restart them, and ask one of them"},
	{agreed.ErrOperatorKey, http.StatusConflict, "operator_key", "dsnode keyring list shows which operator key each node has"},
	{agreed.ErrDataKeysChanged, http.StatusConflict, "data_keys_changed", hintAgain},
	{agreed.ErrDataKeyPending, http.StatusConflict, "data_key_pending", "dsnode keyring list shows which nodes have not confirmed it"},
	{agreed.ErrUnknownDataKey, http.StatusNotFound, "unknown_data_key", "dsnode keyring list shows the keys"},
	{ErrNodeAlive, http.StatusConflict, "node_alive", "stop the node first"},
	{agreed.ErrUnknownNode, http.StatusNotFound, "unknown_node", "dsnode node list shows the names"},
	{agreed.ErrUnknownUpstream, http.StatusNotFound, "unknown_upstream", "dsnode upstream list shows the names"},
	{agreed.ErrUnknownKey, http.StatusNotFound, "unknown_key", "dsnode apikey list shows the ids"},
	{ErrUnknownVersion, http.StatusNotFound, "unknown_version", "dsnode config history lists the versions that are kept"},
	{drill.ErrUnknown, http.StatusNotFound, "unknown_drill", "dsnode drill list shows the ids"},
	{ErrNothingToAck, http.StatusConflict, "nothing_to_acknowledge", "dsnode status shows the last failover"},
	{ErrNotQuarantined, http.StatusConflict, "not_quarantined", "dsnode status says what is not well"},
	{agreed.ErrDrillRunning, http.StatusConflict, "drill_running", "dsnode drill list shows it; dsnode drill abort ID ends it"},
	{agreed.ErrDrillEnded, http.StatusConflict, "drill_ended", "dsnode drill report ID shows how"},
	{agreed.ErrSwitchover, http.StatusConflict, "switchover", hintAgain},
	{agreed.ErrStaleEpoch, http.StatusConflict, "stale_epoch", "the primary changed meanwhile: look at dsnode status, then try again"},
	{ErrWrongNode, http.StatusMisdirectedRequest, "wrong_node", hintOwnPort},
	{drill.ErrWrongPlace, http.StatusMisdirectedRequest, "wrong_node", hintOwnPort},
	{agreed.ErrStateFull, http.StatusInsufficientStorage, "state_full", "remove what is no longer needed"},
	{ErrUnauthorized, http.StatusUnauthorized, "unauthorized", "give the token with --admin-token-file FILE or in DSNODE_ADMIN_TOKEN"},
	{ErrForbidden, http.StatusForbidden, "forbidden", ""},
	{ErrTooLarge, http.StatusRequestEntityTooLarge, "too_large", ""},
	{ErrBusy, http.StatusServiceUnavailable, "busy", hintAgain},
	{ErrNoRoute, http.StatusNotFound, "not_found", "the routes are listed in node/API.md"},
	{ErrMethod, http.StatusMethodNotAllowed, "method_not_allowed", ""},
	{ErrInvalidConfig, http.StatusUnprocessableEntity, "invalid_config", ""},
	{ErrInvalidRequest, http.StatusBadRequest, "invalid_request", ""},
	{drill.ErrInvalid, http.StatusBadRequest, "invalid_request", ""},
	{ErrTimeout, http.StatusGatewayTimeout, "timeout", hintLook},
	{context.DeadlineExceeded, http.StatusGatewayTimeout, "timeout", hintLook},
	{ErrInternal, http.StatusInternalServerError, "internal", "the node's log says more"},
}

// Error is a refusal in words, as it travels in the body
// {"error":{"code","message","hint","problems"}}. A Cluster may return one to
// choose message and hint itself; a Client returns one for whatever a node has
// refused. It wraps the sentinels that its code stands for, and its problems.
type Error struct {
	Code     string          `json:"code"`
	Message  string          `json:"message"`
	Hint     string          `json:"hint,omitempty"`
	Problems config.Problems `json:"problems,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Unwrap gives what errors.Is and errors.As look for.
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

// errorBody is the body of every answer that is a refusal.
type errorBody struct {
	Error Error `json:"error"`
}

// describe finds the status, code and words for an error.
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
		said.Message = ErrInvalidConfig.Error() // the problems follow one by one
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

// readError is describe's way back: what the body of a refused request says.
func readError(body []byte) (*Error, bool) {
	var wire errorBody
	if err := json.Unmarshal(body, &wire); err != nil || wire.Error.Code == "" {
		return nil, false
	}
	return &wire.Error, true
}
