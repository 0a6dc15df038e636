package cluster

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// A certificate of the CA is not a membership. From feature level agreed.MembershipLevel on
// each side of a connection checks that the other one stands in its agreed state, or shows a
// ticket that is newer than that (Cluster.isMemberPeer). Whoever is no member can ask to
// join, and the leader decides whether it must wait for an operator (Cluster.admit).

// ClusterKeys seals and uses the key that signs tickets; the operator key is needed for
// both.
type ClusterKeys interface {
	// NewClusterKey makes a key, sealed with the operator key of that fingerprint; "": the
	// node's own.
	NewClusterKey(clusterID, operatorKey string) (agreed.ClusterKey, error)
	ResealClusterKey(clusterID string, k agreed.ClusterKey, operatorKey string) (agreed.ClusterKey, error)
	SignTicket(clusterID string, k agreed.ClusterKey, text []byte) ([]byte, error)
}

// membersOnly reports whether outsiders get nothing but Join. A node whose agreed state is
// not restored yet knows it by the key in its member file.
func (c *Cluster) membersOnly() bool {
	if s := c.State(); s.ClusterID != "" {
		return s.MembersOnly()
	}
	m := c.member.Load()
	return m != nil && m.ClusterKey != nil
}

// isMemberPeer reports whether a peer, which said theirs of itself, may use this node's
// services. Removed nodes are refused before that; see wasRemoved.
func (c *Cluster) isMemberPeer(peer mesh.Identity, theirs mesh.Membership) bool {
	m := c.member.Load()
	if m == nil || !c.membersOnly() {
		return true
	}
	return theirs.ClusterID == m.ClusterID && c.standing().Member(peer.Node, peer.Site, theirs.Ticket)
}

// standing is what this node knows of the members: by its agreed state or, before that is
// restored, by its member file.
func (c *Cluster) standing() agreed.Standing {
	applied := c.fsm.applied.Load() // before the state, which may be newer then, not older
	if s := c.State(); s.ClusterID != "" {
		return s.Standing(applied)
	}
	return c.member.Load().standing()
}

// permit returns why a caller may not use a method of the rpc port.
func (c *Cluster) permit(ctx context.Context, method string) error {
	id, err := caller(ctx)
	if err != nil {
		return err
	}
	theirs, _ := mesh.MembershipFromContext(ctx)
	switch {
	case method == clusterpb.Peer_Join_FullMethodName:
		return nil
	case c.member.Load() == nil:
		if method == clusterpb.Peer_Ping_FullMethodName || method == clusterpb.Peer_Pings_FullMethodName {
			return nil // a leader asks whether the node that it knows by this address lives
		}
		return status.Error(codes.PermissionDenied, "this node has not joined a cluster yet")
	case theirs.ClusterID != "" && c.membersOnly() && c.wasRemoved(id, theirs.Admitted) != "", !c.isMemberPeer(id, theirs):
		c.metrics.outsiders.Inc()
		return status.Errorf(codes.PermissionDenied, "node %s of site %s is not a member of the cluster: it may only ask to join", id.Node, id.Site)
	}
	return nil
}

func (c *Cluster) guardCall(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := c.permit(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (c *Cluster) guardStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := c.permit(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	return next(srv, stream)
}

// MembersOnly is a handler for HTTP requests of peers, on connections of mesh.KindHTTP. It
// asks for each request: the agreed state may have changed since the handshake.
func (c *Cluster) MembersOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c.membersOnly() {
			id, known := mesh.HTTPPeer(r)
			theirs, _ := mesh.HTTPMembership(r)
			if !known || c.wasRemoved(id, theirs.Admitted) != "" || !c.isMemberPeer(id, theirs) {
				c.metrics.outsiders.Inc()
				http.Error(w, "only members of the cluster are answered here", http.StatusForbidden)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// forwards reports whether a caller may forward the request of another node: only a member
// has checked whose certificate that node has.
func (c *Cluster) forwards(ctx context.Context, id mesh.Identity) bool {
	s := c.State()
	n, member := s.Nodes[id.Node]
	theirs, _ := mesh.MembershipFromContext(ctx)
	return member && n.Site == id.Site && theirs.ClusterID == s.ClusterID && c.wasRemoved(id, theirs.Admitted) == ""
}

// admit is the leader's decision about a node that asks to join. The first request of a node
// that must wait is agreed on, so that every node can tell operators of it.
func (c *Cluster) admit(ctx context.Context, s *agreed.State, n agreed.Node) error {
	approve := s.Parsed == nil || s.Parsed.Access.Join == config.JoinApprove
	if _, known := s.Nodes[n.Name]; approve && !known && s.Parsed != nil && !s.MembersOnly() {
		return fmt.Errorf("%w: access.join in the configuration needs feature level %d, which the cluster has not reached yet", ErrFeatureLevel, agreed.MembershipLevel)
	}
	switch s.MayJoin(n.Name, n.Site, approve) {
	case agreed.RefusedRemoved:
		return fmt.Errorf("%w: %s; dsnode node admit %s lets it join again", ErrNodeRemoved, removalText(s, n.Name), n.Name)
	case agreed.Wait:
		if a, waits := s.Applicant(n.Name); !waits || a.Site != n.Site {
			if _, err := c.Propose(ctx, agreed.CmdNodeWait, agreed.NodeWait{Name: n.Name, Site: n.Site, RPC: n.RPC, Version: n.Version}); err != nil {
				return err
			}
			c.metrics.joins.WithLabelValues("waiting").Inc()
			c.log.Warn("a node asks to join and waits for an operator", "event", "node_waits", "node", n.Name, "site", n.Site, "rpc", n.RPC, "version", n.Version)
		}
		return fmt.Errorf("%w: if %s of site %s, at %s, is yours, run dsnode node admit %s", agreed.ErrAwaitsAdmission, n.Name, n.Site, n.RPC, n.Name)
	}
	return nil
}

// ticket signs a member's ticket; nil if there is no cluster key yet, or this node can't
// open it.
func (c *Cluster) ticket(s *agreed.State, name string) *agreed.Ticket {
	n, member := s.Nodes[name]
	if !member || s.ClusterKey == nil {
		return nil
	}
	t := &agreed.Ticket{Index: n.Admitted}
	var err error
	if t.Signature, err = c.opts.ClusterKeys.SignTicket(s.ClusterID, *s.ClusterKey, holder(s, n).Text(t.Index)); err != nil {
		c.log.Warn("can't sign the ticket of a member", "node", name, "err", err)
		return nil
	}
	return t
}

func holder(s *agreed.State, n agreed.Node) agreed.Holder {
	return agreed.Holder{ClusterID: s.ClusterID, Generation: s.Generation, Node: n.Name, Site: n.Site}
}

// lacksTicket reports whether this member has no ticket for its admission, signed with the
// present cluster key.
func lacksTicket(s *agreed.State, n agreed.Node, t *agreed.Ticket) bool {
	return s.ClusterKey != nil && (t == nil || t.Index != n.Admitted || !t.Proves(holder(s, n), s.PublicKey()))
}

func ticketOf(r *clusterpb.JoinResponse) *agreed.Ticket {
	if len(r.GetTicket()) == 0 {
		return nil
	}
	return &agreed.Ticket{Index: r.GetTicketIndex(), Signature: r.GetTicket()}
}

// keepTicket stores the ticket that a join's answer brought.
func (c *Cluster) keepTicket(r *clusterpb.JoinResponse) error {
	t := ticketOf(r)
	if t == nil {
		return nil
	}
	c.memberMu.Lock()
	defer c.memberMu.Unlock()
	m := *c.member.Load()
	if m.Ticket != nil && m.Ticket.Index == t.Index && bytes.Equal(m.Ticket.Signature, t.Signature) {
		return nil
	}
	m.Ticket = t
	return c.setMember(m)
}

type keyStep int

const (
	keepKey keyStep = iota
	makeKey
	resealKey
)

// nextKeyStep is what the leader does about the cluster key: it is sealed with the operator
// key that wraps the data keys.
func nextKeyStep(s *agreed.State) keyStep {
	switch want := s.OperatorKey(); {
	case !s.MembersOnly():
		return keepKey
	case s.ClusterKey == nil:
		return makeKey
	case want != "" && want != s.ClusterKey.OperatorKey:
		return resealKey
	}
	return keepKey
}

// keepClusterKey takes the leader's next step.
func (c *Cluster) keepClusterKey(ctx context.Context) error {
	s := c.State()
	var k agreed.ClusterKey
	var err error
	step := nextKeyStep(s)
	switch step {
	case keepKey:
		return nil
	case resealKey:
		if k, err = c.opts.ClusterKeys.ResealClusterKey(s.ClusterID, *s.ClusterKey, s.OperatorKey()); err == nil {
			break
		}
		// The operator key that opened it is gone. All members get new tickets. Only a node
		// that is down meanwhile can't verify those of nodes that join before it returns.
		c.log.Warn("can't open the cluster key, making a new one", "err", err)
		fallthrough
	case makeKey:
		if k, err = c.opts.ClusterKeys.NewClusterKey(s.ClusterID, s.OperatorKey()); err != nil {
			return err
		}
	}
	_, err = c.Propose(ctx, agreed.CmdClusterKey, agreed.ClusterKeySet{
		Expect: s.PublicKey(), Public: k.Public, Sealed: k.Sealed, OperatorKey: k.OperatorKey,
	})
	if err == nil {
		c.log.Info("cluster key set", "sealed_again", step == resealKey, "operator_key", k.OperatorKey)
	}
	return err
}

// waiting are the nodes that wait for an operator who has not admitted them yet.
func waiting(s *agreed.State) []agreed.Applicant {
	return slices.DeleteFunc(slices.Clone(s.Waiting), func(a agreed.Applicant) bool { return !a.AdmittedAt.IsZero() })
}
