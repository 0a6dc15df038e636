package mesh

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/go-json-experiment/json"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// Kind says what a connection of the rpc port carries.
type Kind string

// The kinds of connections.
const (
	KindRaft Kind = "raft"
	KindGRPC Kind = "grpc"
	KindHTTP Kind = "http"
	// KindTunnel asks the acceptor for a way to the node that the preface names
	// as target. After the welcome a second answer follows: whether that node was
	// reached. What comes then is between the dialler and that node.
	KindTunnel Kind = "tunnel"
	// KindRelayed is the other half: the dialler speaks for a third node, whose
	// own handshake follows the welcome.
	KindRelayed Kind = "relayed"
)

func (k Kind) known() bool {
	switch k {
	case KindRaft, KindGRPC, KindHTTP, KindTunnel, KindRelayed:
		return true
	}
	return false
}

// ofTunnel reports whether such a connection is half of a tunnel, and carries
// another one.
func (k Kind) ofTunnel() bool { return k == KindTunnel || k == KindRelayed }

// Membership is what a node knows of the cluster it belongs to. The zero value
// is a node that has not joined any.
type Membership struct {
	ClusterID  string
	Generation agreed.Generation
}

// The codes of a refusal, for metrics and for programs; the message is for
// people. "This node" is the one that refuses.
const (
	CodeUnknownFormat   = "unknown_format"   // the preface is of a format this node can't read
	CodeUnknownKind     = "unknown_kind"     // no such kind of connection
	CodeMalformed       = "malformed"        // the preface is no preface, or too long in some part
	CodeIdentity        = "identity"         // the preface and the certificate name different nodes
	CodeNotMember       = "not_member"       // the acceptor has not joined a cluster
	CodePeerNotMember   = "peer_not_member"  // the dialler has not joined and asked for more than to join
	CodeOtherCluster    = "other_cluster"    // another cluster id
	CodeOlderGeneration = "older_generation" // the peer was left behind by a recovery
	CodeNewerGeneration = "newer_generation" // this node was left behind by a recovery
	CodeForkGeneration  = "fork_generation"  // two recoveries of the same number
	CodeKindClosed      = "kind_closed"      // nobody takes connections of that kind now
	CodeIsolated        = "isolated"         // the site is cut off on purpose
	CodeNoTunnel        = "no_tunnel"        // this node makes no tunnel there, or no more of them
	CodeUnreached       = "unreached"        // this node does not reach the tunnel's target directly
)

// RefusedError is a connection that one of both nodes didn't want, though TLS
// was fine. ByPeer tells who refused: the other node, or this one.
type RefusedError struct {
	Code    string
	Message string
	ByPeer  bool
}

func (e *RefusedError) Error() string {
	if e.ByPeer {
		return fmt.Sprintf("refused by the peer (%s): %s", e.Code, e.Message)
	}
	return fmt.Sprintf("refused (%s): %s", e.Code, e.Message)
}

// LeftBehind reports that this node, the one that holds the error, was left
// behind by a recovery: the other one is of a higher generation.
func (e *RefusedError) LeftBehind() bool {
	if e.ByPeer {
		return e.Code == CodeOlderGeneration
	}
	return e.Code == CodeNewerGeneration
}

// judge decides whether a connection of that kind may stand between a node and
// its peer. nil: it may. The words are those of the node self, about its peer.
func judge(self, peer Membership, kind Kind) *RefusedError {
	refuse := func(code, format string, args ...any) *RefusedError {
		return &RefusedError{Code: code, Message: fmt.Sprintf(format, args...)}
	}
	switch {
	case !kind.known():
		return refuse(CodeUnknownKind, "connections of kind %q are not known here", kind)
	case self.ClusterID == "" && kind != KindGRPC:
		return refuse(CodeNotMember, "this node has not joined a cluster yet and takes nothing but %s", KindGRPC)
	case self.ClusterID != "" && peer.ClusterID == "" && kind != KindGRPC:
		return refuse(CodePeerNotMember, "a node that has not joined the cluster may open nothing but %s, to join", KindGRPC)
	case self.ClusterID == "" || peer.ClusterID == "":
		return nil
	case self.ClusterID != peer.ClusterID:
		return refuse(CodeOtherCluster, "this node belongs to cluster %s, the peer to cluster %s", self.ClusterID, peer.ClusterID)
	case peer.Generation.Number < self.Generation.Number:
		return refuse(CodeOlderGeneration, "the peer is of generation %d, the cluster was recovered since and is at %d: the peer must rejoin",
			peer.Generation.Number, self.Generation.Number)
	case peer.Generation.Number > self.Generation.Number:
		return refuse(CodeNewerGeneration, "the peer is of generation %d, this node was left behind by a recovery at %d and must rejoin",
			peer.Generation.Number, self.Generation.Number)
	case peer.Generation.ID != self.Generation.ID:
		return refuse(CodeForkGeneration, "generation %d exists twice, as %s here and as %s at the peer: one of both recoveries must be given up",
			self.Generation.Number, self.Generation.ID, peer.Generation.ID)
	}
	return nil
}

// What goes over the wire, in both directions: a magic word, the length of the
// JSON in two bytes (big endian), the JSON.
const (
	prefaceMagic  = "dsn1"
	prefaceFormat = 1
	prefaceMax    = 4096 // bytes of JSON; a full one has about 400

	// prefaceFieldMax bounds each member, so that words which quote two of them
	// still fit into an answer.
	prefaceFieldMax = 128
)

// prefaceRequest is the dialler's half.
type prefaceRequest struct {
	Format     int               `json:"format"`
	Kind       Kind              `json:"kind"`
	ClusterID  string            `json:"cluster_id"`
	Generation agreed.Generation `json:"generation"`
	Node       string            `json:"node"`
	Site       string            `json:"site"`
	Target     string            `json:"target,omitzero"` // of KindTunnel, and of no other
}

// prefaceReply is the acceptor's half. It comes before a refusal too, so that
// both sides learn why. An empty code welcomes.
type prefaceReply struct {
	Format     int               `json:"format"`
	Code       string            `json:"code"`
	Message    string            `json:"message"`
	ClusterID  string            `json:"cluster_id"`
	Generation agreed.Generation `json:"generation"`
}

var errPreface = errors.New("not a dsnode preface")

func appendPreface(to []byte, message any) ([]byte, error) {
	text, err := json.Marshal(message)
	if err != nil {
		return nil, fmt.Errorf("encode preface: %w", err)
	}
	if len(text) > prefaceMax {
		return nil, fmt.Errorf("encode preface: %d bytes, at most %d are allowed", len(text), prefaceMax)
	}
	to = append(to, prefaceMagic...)
	to = binary.BigEndian.AppendUint16(to, uint16(len(text)))
	return append(to, text...), nil
}

// readPreface reads exactly one message and nothing behind it. The caller has
// set a deadline.
func readPreface(r io.Reader) ([]byte, error) {
	var head [len(prefaceMagic) + 2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("read preface: %w", err)
	}
	if string(head[:len(prefaceMagic)]) != prefaceMagic {
		return nil, fmt.Errorf("%w: it begins with %q", errPreface, head[:len(prefaceMagic)])
	}
	size := int(binary.BigEndian.Uint16(head[len(prefaceMagic):]))
	if size > prefaceMax {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are allowed", errPreface, size, prefaceMax)
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(r, text); err != nil {
		return nil, fmt.Errorf("read preface: %w", err)
	}
	return text, nil
}

// decodeRequest reads a dialler's half and checks it against its certificate.
// Unknown members pass: a later format 1 may add some. What can't be
// understood is refused with words, never guessed.
func decodeRequest(text []byte, cert Identity) (prefaceRequest, *RefusedError) {
	var version struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(text, &version); err != nil {
		return prefaceRequest{}, &RefusedError{Code: CodeMalformed, Message: "the preface is not the JSON that it should be"}
	}
	if version.Format != prefaceFormat {
		return prefaceRequest{}, &RefusedError{Code: CodeUnknownFormat, Message: fmt.Sprintf(
			"the preface has format %d, this node understands %d: upgrade the older of both nodes", version.Format, prefaceFormat)}
	}
	var p prefaceRequest
	if err := json.Unmarshal(text, &p); err != nil {
		return prefaceRequest{}, &RefusedError{Code: CodeMalformed, Message: "the preface is not the JSON that it should be"}
	}
	if len(p.Kind) > prefaceFieldMax || len(p.ClusterID) > prefaceFieldMax || len(p.Generation.ID) > prefaceFieldMax ||
		len(p.Node) > prefaceFieldMax || len(p.Site) > prefaceFieldMax || len(p.Target) > prefaceFieldMax {
		return prefaceRequest{}, &RefusedError{Code: CodeMalformed, Message: fmt.Sprintf(
			"a member of the preface is longer than %d bytes", prefaceFieldMax)}
	}
	if (p.Kind == KindTunnel) != (p.Target != "") {
		return prefaceRequest{}, &RefusedError{Code: CodeMalformed, Message: fmt.Sprintf(
			"a %s connection names a target, and no other does: kind %q, target %q", KindTunnel, p.Kind, p.Target)}
	}
	if p.Node != cert.Node || p.Site != cert.Site {
		return prefaceRequest{}, &RefusedError{Code: CodeIdentity, Message: fmt.Sprintf(
			"the preface says node %q of site %q, the certificate says %s", p.Node, p.Site, cert)}
	}
	return p, nil
}

// decodeReply reads an acceptor's half. A refusal is understood in any format.
func decodeReply(text []byte) (prefaceReply, *RefusedError) {
	var p prefaceReply
	if err := json.Unmarshal(text, &p); err != nil && p.Code == "" && p.Format <= prefaceFormat {
		return prefaceReply{}, &RefusedError{Code: CodeMalformed, Message: "the peer's answer is not the JSON that it should be"}
	}
	switch {
	case p.Code != "":
		return p, &RefusedError{Code: p.Code, Message: p.Message, ByPeer: true}
	case p.Format != prefaceFormat:
		return prefaceReply{}, &RefusedError{Code: CodeUnknownFormat, Message: fmt.Sprintf(
			"the peer answered in format %d, this node understands %d: upgrade the older of both nodes", p.Format, prefaceFormat)}
	case len(p.ClusterID) > prefaceFieldMax || len(p.Generation.ID) > prefaceFieldMax:
		return prefaceReply{}, &RefusedError{Code: CodeMalformed, Message: fmt.Sprintf(
			"a member of the peer's answer is longer than %d bytes", prefaceFieldMax)}
	}
	return p, nil
}
