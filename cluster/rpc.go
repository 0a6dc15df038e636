package cluster

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// rpcFormat is the version of the messages in cluster.proto that this build sends.
const rpcFormat = 1

// maxRPCBytes bounds one message. The largest is a proposal with a configuration.
const maxRPCBytes = 4 << 20

// serveRPC answers peers until ctx ends.
func (c *Cluster) serveRPC(ctx context.Context) error {
	s := grpc.NewServer(append(c.mesh.GRPCServerOptions(),
		grpc.MaxRecvMsgSize(maxRPCBytes), grpc.MaxConcurrentStreams(1024),
		grpc.ChainUnaryInterceptor(c.metrics.observeRPC, c.guardCall), grpc.StreamInterceptor(c.guardStream))...)
	clusterpb.RegisterPeerServer(s, &peerServer{c: c})
	if c.opts.Services != nil {
		c.opts.Services(s)
	}
	g := errgroup.Group{}
	g.Go(func() error {
		err := s.Serve(c.mesh.Listener(mesh.KindGRPC))
		if ctx.Err() != nil || errors.Is(err, grpc.ErrServerStopped) {
			return nil
		}
		return fmt.Errorf("serve peers: %w", err)
	})
	<-ctx.Done()
	s.Stop()
	return g.Wait()
}

// peerServer implements clusterpb.PeerServer for a Cluster.
type peerServer struct {
	clusterpb.UnimplementedPeerServer
	c *Cluster
}

// caller returns the caller's identity from its certificate.
func caller(ctx context.Context) (mesh.Identity, error) {
	id, ok := mesh.PeerFromContext(ctx)
	if !ok {
		return mesh.Identity{}, status.Error(codes.Unauthenticated, "no peer identity")
	}
	return id, nil
}

// Propose commits a command for a member that is not the leader.
func (s *peerServer) Propose(ctx context.Context, r *clusterpb.ProposeRequest) (*clusterpb.ProposeResponse, error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	cmd, err := agreed.DecodeCommand(r.GetCommand())
	var index uint64
	if err == nil && s.c.membersOnly() {
		err = agreed.MayPropose(agreed.Proposer{Node: id.Node, Site: id.Site}, cmd)
	}
	if err == nil {
		index, err = s.c.commit(ctx, cmd, r.GetCommand())
	}
	refused, err := refusal(err)
	return &clusterpb.ProposeResponse{Format: rpcFormat, Refused: refused, Index: index}, err
}

// Join admits the caller, here or through the leader.
func (s *peerServer) Join(ctx context.Context, r *clusterpb.JoinRequest) (*clusterpb.JoinResponse, error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	n := nodeOf(r.GetNode())
	var resp *clusterpb.JoinResponse
	switch {
	case r.GetFormat() > rpcFormat:
		err = fmt.Errorf("%w: join format %d, this node reads %d: upgrade the cluster first", ErrNewerPeer, r.GetFormat(), rpcFormat)
	case r.GetForwarded() && !s.c.forwards(ctx, id):
		err = fmt.Errorf("%w: node %s of site %s is no member and can't forward the request of another node", ErrForeignNode, id.Node, id.Site)
	// A forwarded request has the joining node's data, but a member as its caller. Only
	// a direct caller must be the joining node itself.
	case !r.GetForwarded() && (n.Name != id.Node || n.Site != id.Site):
		err = fmt.Errorf("%w: the certificate is of site %s node %s, the configuration of site %s node %s", ErrForeignNode, id.Site, id.Node, n.Site, n.Name)
	default:
		resp, err = s.c.join(ctx, r)
	}
	if err == nil {
		return resp, nil
	}
	refused, err := refusal(err)
	return &clusterpb.JoinResponse{Format: rpcFormat, Refused: refused}, err
}

// Yield transfers leadership from this node.
func (s *peerServer) Yield(ctx context.Context, r *clusterpb.YieldRequest) (*clusterpb.YieldResponse, error) {
	refused, err := refusal(s.c.yield(ctx, r.GetTo()))
	return &clusterpb.YieldResponse{Format: rpcFormat, Refused: refused}, err
}

func (c *Cluster) requestYield(ctx context.Context, leader, to string) error {
	client, err := c.client(leader)
	if err != nil {
		return err
	}
	got, err := client.Yield(ctx, &clusterpb.YieldRequest{Format: rpcFormat, To: to})
	if err != nil {
		return fmt.Errorf("ask %s to transfer leadership to %s: %w", leader, to, err)
	}
	return unrefuse(got.GetRefused())
}

// OnRelease sets the function that releases the role of primary on this node. Call it
// before Run.
func (c *Cluster) OnRelease(release func(ctx context.Context, switchoverID string) error) {
	c.release = release
}

// Release asks a node, which may be this one, to release the role of primary.
func (c *Cluster) Release(ctx context.Context, node, switchoverID string) error {
	if node == c.opts.Name {
		return c.release(ctx, switchoverID)
	}
	client, err := c.client(node)
	if err != nil {
		return err
	}
	got, err := client.Release(ctx, &clusterpb.ReleaseRequest{Format: rpcFormat, Switchover: switchoverID})
	if err != nil {
		return fmt.Errorf("ask %s to release the role of primary: %w", node, err)
	}
	return unrefuse(got.GetRefused())
}

// Release releases the role of primary on this node.
func (s *peerServer) Release(ctx context.Context, r *clusterpb.ReleaseRequest) (*clusterpb.ReleaseResponse, error) {
	refused, err := refusal(s.c.release(ctx, r.GetSwitchover()))
	return &clusterpb.ReleaseResponse{Format: rpcFormat, Refused: refused}, err
}
