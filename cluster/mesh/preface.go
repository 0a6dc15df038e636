package mesh

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/go-json-experiment/json"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// Kind is what a connection of the rpc port carries.
type Kind string

// The kinds of connections.
const (
	KindRaft Kind = "raft"
	KindGRPC Kind = "grpc"
	KindHTTP Kind = "http"
	// KindTunnel asks the acceptor to relay to the node that the preface names as
	// target. After the acceptor's reply comes a second one, which says whether that
	// node was reached. All later bytes are between the dialler and that node.
	KindTunnel Kind = "tunnel"
	// KindRelayed is the connection from the relay to the target. After the
	// acceptor's reply comes the handshake of the node that asked for the tunnel.
	KindRelayed Kind = "relayed"
)

func (k Kind) known() bool {
	switch k {
	case KindRaft, KindGRPC, KindHTTP, KindTunnel, KindRelayed:
		return true
	}
	return false
}

// ofTunnel reports whether such a connection is one of the two legs of a tunnel
// and so carries another connection.
func (k Kind) ofTunnel() bool { return k == KindTunnel || k == KindRelayed }

// Membership says which cluster and generation a node belongs to. The zero value
// is that of a node that has not joined a cluster.
type Membership struct {
	ClusterID  string
	Generation agreed.Generation
	// Admitted is the raft index of the entry that made the node a member, 0 for the
	// founder.
	Admitted uint64
	// Ticket proves the admission to a node whose agreed state is older; nil: it has none.
	Ticket *agreed.Ticket
}

// The codes of a refusal, for metrics and programs. "This node" is the one that
// refuses.
const (
	CodeUnknownFormat   = "unknown_format"   // this node can't read the preface's format
	CodeUnknownKind     = "unknown_kind"     // no such kind of connection
	CodeMalformed       = "malformed"        // the preface is invalid, or a member of it is too long
	CodeIdentity        = "identity"         // the preface and the certificate name different nodes
	CodeNotMember       = "not_member"       // the acceptor has not joined a cluster
	CodePeerNotMember   = "peer_not_member"  // the dialler has not joined, and the kind is not the one for joining
	CodeOtherCluster    = "other_cluster"    // another cluster id
	CodeOlderGeneration = "older_generation" // the cluster was recovered without the peer
	CodeNewerGeneration = "newer_generation" // the cluster was recovered without this node
	CodeForkGeneration  = "fork_generation"  // two recoveries made the same generation number
	CodeRemoved         = "removed"          // the peer was removed from the cluster
	CodeNotAdmitted     = "not_admitted"     // the peer is no member of the cluster
	CodeKindClosed      = "kind_closed"      // this node accepts no connections of that kind now
	CodeIsolated        = "isolated"         // Options.Admit refuses the site
	CodeNoTunnel        = "no_tunnel"        // this node relays nothing to that target, or has no capacity left
	CodeUnreached       = "unreached"        // this node can't reach the tunnel's target directly
)

// RefusedError means that one of the two nodes refused the connection after TLS
// had succeeded. ByPeer: the other node did, not this one.
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

func refuse(code, format string, args ...any) *RefusedError {
	return &RefusedError{Code: code, Message: fmt.Sprintf(format, args...)}
}

// checkMembership returns nil if a node may have a connection of that kind with
// its peer. The message is written from the view of the node self.
func checkMembership(self, peer Membership, kind Kind) *RefusedError {
	switch {
	case !kind.known():
		return refuse(CodeUnknownKind, "this node does not know connections of kind %q", kind)
	case self.ClusterID == "" && kind != KindGRPC:
		return refuse(CodeNotMember, "this node has not joined a cluster yet and accepts only %s", KindGRPC)
	case self.ClusterID != "" && peer.ClusterID == "" && kind != KindGRPC:
		return refuse(CodePeerNotMember, "a node that has not joined the cluster may open only %s, to join", KindGRPC)
	case self.ClusterID == "" || peer.ClusterID == "":
		return nil
	case self.ClusterID != peer.ClusterID:
		// Without this node's id: only who shows it already may learn it.
		return refuse(CodeOtherCluster, "the peer belongs to cluster %s, this node to another one", peer.ClusterID)
	case peer.Generation.Number < self.Generation.Number:
		return refuse(CodeOlderGeneration, "the peer has generation %d, the cluster was recovered since and has generation %d: the peer must rejoin",
			peer.Generation.Number, self.Generation.Number)
	case peer.Generation.Number > self.Generation.Number:
		return refuse(CodeNewerGeneration, "the peer has generation %d, this node has %d: the cluster was recovered without this node, which must rejoin",
			peer.Generation.Number, self.Generation.Number)
	case peer.Generation.ID != self.Generation.ID:
		return refuse(CodeForkGeneration, "generation %d exists twice, as %s here and as %s at the peer: two recoveries were made, and the nodes of one of them must rejoin the other",
			self.Generation.Number, self.Generation.ID, peer.Generation.ID)
	}
	return nil
}

// A preface on the wire, in both directions: the magic bytes, the length of the
// JSON in two bytes (big endian), the JSON.
const (
	prefaceMagic  = "dsn1"
	prefaceFormat = 1
	prefaceMax    = 4096 // bytes of JSON; most have about 400

	// prefaceFieldMax bounds each member, so that a refusal whose message quotes two
	// of them still fits into a reply.
	prefaceFieldMax = 128
)

// prefaceRequest is the dialler's preface.
type prefaceRequest struct {
	Format     int               `json:"format"`
	Kind       Kind              `json:"kind"`
	ClusterID  string            `json:"cluster_id"`
	Generation agreed.Generation `json:"generation"`
	Node       string            `json:"node"`
	Site       string            `json:"site"`
	Target     string            `json:"target,omitzero"` // only of KindTunnel
	Admitted   uint64            `json:"admitted,omitzero"`
	Ticket     *agreed.Ticket    `json:"ticket,omitzero"`
}

func (p prefaceRequest) membership() Membership {
	return Membership{ClusterID: p.ClusterID, Generation: p.Generation, Admitted: p.Admitted, Ticket: p.Ticket}
}

// prefaceReply is the acceptor's preface. It is sent on a refusal too, so that both
// sides know the reason. An empty code means accepted. Cluster id, generation and what
// follows them are left out for a dialler that does not show the same cluster id.
type prefaceReply struct {
	Format     int               `json:"format"`
	Code       string            `json:"code"`
	Message    string            `json:"message"`
	ClusterID  string            `json:"cluster_id"`
	Generation agreed.Generation `json:"generation"`
	Admitted   uint64            `json:"admitted,omitzero"`
	Ticket     *agreed.Ticket    `json:"ticket,omitzero"`
	// Founded says that the acceptor belongs to a cluster, to those that are not told to
	// which one.
	Founded bool `json:"founded,omitzero"`
}

func (p prefaceReply) membership() Membership {
	return Membership{ClusterID: p.ClusterID, Generation: p.Generation, Admitted: p.Admitted, Ticket: p.Ticket}
}

var errPreface = errors.New("not a dsnode preface")

// encodeReply encodes the acceptor's preface for a dialler that shows a cluster id. A nil
// refused means accepted.
func (m *Mesh) encodeReply(self Membership, shown string, refused *RefusedError) ([]byte, error) {
	reply := prefaceReply{Format: prefaceFormat, Founded: self.ClusterID != ""}
	if shown == self.ClusterID {
		reply.ClusterID, reply.Generation, reply.Admitted, reply.Ticket = self.ClusterID, self.Generation, self.Admitted, self.Ticket
	}
	if refused != nil {
		// The message says "this node", so the peer must see whose message it is.
		reply.Code, reply.Message = refused.Code, m.opts.Credentials.Identity().Node+" says: "+refused.Message
	}
	return encodePreface(reply)
}

func encodePreface(message any) ([]byte, error) {
	body, err := json.Marshal(message)
	if err != nil {
		return nil, fmt.Errorf("encode preface: %w", err)
	}
	if len(body) > prefaceMax {
		return nil, fmt.Errorf("encode preface: %d bytes, at most %d are allowed", len(body), prefaceMax)
	}
	b := binary.BigEndian.AppendUint16([]byte(prefaceMagic), uint16(len(body)))
	return append(b, body...), nil
}

// readPreface reads one preface and returns its JSON. It reads no byte beyond it.
// The caller has set a deadline.
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
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, fmt.Errorf("read preface: %w", err)
	}
	return body, nil
}

// decodeRequest parses a dialler's preface and compares it with its certificate.
// Unknown members are ignored: a later version may add some to format 1.
func decodeRequest(body []byte, cert Identity) (prefaceRequest, *RefusedError) {
	var version struct {
		Format int `json:"format"`
	}
	malformed := refuse(CodeMalformed, "the preface is not valid JSON of its format")
	if json.Unmarshal(body, &version) != nil {
		return prefaceRequest{}, malformed
	}
	if version.Format != prefaceFormat {
		return prefaceRequest{}, refuse(CodeUnknownFormat,
			"the preface has format %d, this node understands %d: upgrade the older of the two nodes", version.Format, prefaceFormat)
	}
	var p prefaceRequest
	if json.Unmarshal(body, &p) != nil {
		return prefaceRequest{}, malformed
	}
	if len(p.Kind) > prefaceFieldMax || len(p.ClusterID) > prefaceFieldMax || len(p.Generation.ID) > prefaceFieldMax ||
		len(p.Node) > prefaceFieldMax || len(p.Site) > prefaceFieldMax || len(p.Target) > prefaceFieldMax || tooLong(p.Ticket) {
		return prefaceRequest{}, refuse(CodeMalformed, "a member of the preface is longer than %d bytes", prefaceFieldMax)
	}
	if (p.Kind == KindTunnel) != (p.Target != "") {
		return prefaceRequest{}, refuse(CodeMalformed,
			"a %s connection must name a target, and no other kind may: kind %q, target %q", KindTunnel, p.Kind, p.Target)
	}
	if p.Node != cert.Node || p.Site != cert.Site {
		return prefaceRequest{}, refuse(CodeIdentity, "the preface names node %q of site %q, the certificate names %s", p.Node, p.Site, cert)
	}
	return p, nil
}

// decodeReply parses an acceptor's preface. A refusal is accepted in any format.
func decodeReply(body []byte) (prefaceReply, *RefusedError) {
	var p prefaceReply
	if err := json.Unmarshal(body, &p); err != nil && p.Code == "" && p.Format <= prefaceFormat {
		return prefaceReply{}, refuse(CodeMalformed, "the peer's reply is not valid JSON of its format")
	}
	switch {
	case p.Code != "":
		return p, &RefusedError{Code: p.Code, Message: p.Message, ByPeer: true}
	case p.Format != prefaceFormat:
		return prefaceReply{}, refuse(CodeUnknownFormat,
			"the peer replied in format %d, this node understands %d: upgrade the older of the two nodes", p.Format, prefaceFormat)
	case len(p.ClusterID) > prefaceFieldMax || len(p.Generation.ID) > prefaceFieldMax || tooLong(p.Ticket):
		return prefaceReply{}, refuse(CodeMalformed, "a member of the peer's reply is longer than %d bytes", prefaceFieldMax)
	}
	return p, nil
}

func tooLong(t *agreed.Ticket) bool { return t != nil && len(t.Signature) > prefaceFieldMax }
