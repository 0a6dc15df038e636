package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// pinger pings one peer periodically. All pings use one gRPC stream: a call for each ping
// would about double the cost.
type pinger struct {
	c    *Cluster
	name string

	channel *mesh.Client // of call
	call    clusterpb.Peer_PingsClient
	end     context.CancelFunc // of call
}

// run pings until ctx ends.
func (p *pinger) run(ctx context.Context) {
	defer func() { p.closeCall() }()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		timer.Reset(clock.UntilTick(p.c.opts.Host.Boottime(), p.c.Timing().Tick))
		if err := p.ping(ctx); err != nil && ctx.Err() == nil {
			p.c.metrics.pingFailures.Inc()
			p.c.log.Debug("ping failed", "peer", p.name, "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
	}
}

// ping sends one ping and waits for its answer. After a failure the next ping makes a
// new call.
func (p *pinger) ping(ctx context.Context) (err error) {
	channel, err := p.c.mesh.Client(p.name)
	if err != nil {
		return fmt.Errorf("connect to %s: %w", p.name, err)
	}
	fresh := channel != p.channel
	if fresh {
		p.closeCall()
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		// When the channel is replaced, end a ping that waits on it, so that the next
		// one uses the new channel at once.
		stop := context.AfterFunc(channel.Replaced, cancel)
		p.channel, p.end = channel, func() { cancel(); stop() }
	}
	late := time.AfterFunc(pingTimeout, p.end)
	defer func() {
		if !late.Stop() || err != nil {
			p.closeCall()
		}
	}()
	if fresh {
		if p.call, err = clusterpb.NewPeerClient(channel).Pings(ctx); err != nil {
			return fmt.Errorf("ping %s: %w", p.name, err)
		}
	}
	sent := p.c.opts.Host.Boottime()
	var got *clusterpb.PingResponse
	// Send fails with io.EOF when the call has ended; Recv then returns the reason.
	if err = p.call.Send(p.c.pingRequest()); err == nil || errors.Is(err, io.EOF) {
		got, err = p.call.Recv()
	}
	if err != nil {
		return fmt.Errorf("ping %s: %w", p.name, err)
	}
	if got.GetNode().GetName() != p.name {
		return fmt.Errorf("ping %s: answered by %q: %w", p.name, got.GetNode().GetName(), ErrForeignNode)
	}
	p.c.metrics.pingSeconds.Observe((p.c.opts.Host.Boottime() - sent).Seconds())
	p.c.book.recordDirect(nodeOf(got.GetNode()))
	p.c.lease.relayed(sent, time.Duration(got.GetLeaseUs())*time.Microsecond,
		fences{epoch: got.GetEpoch(), ownership: got.GetOwnership()})
	p.c.peers.put(p.name, answer{sent: sent, got: got}, p.c.Timing().Patience)
	return nil
}

// closeCall ends the call if there is one.
func (p *pinger) closeCall() {
	if p.end != nil {
		p.end()
	}
	p.channel, p.call, p.end = nil, nil, nil
}

// Ping returns this node's view, and stores the addresses that the caller sent.
func (s *peerServer) Ping(ctx context.Context, r *clusterpb.PingRequest) (*clusterpb.PingResponse, error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	return s.respond(id, r)
}

// Pings answers each ping on the stream until the caller closes it.
func (s *peerServer) Pings(call clusterpb.Peer_PingsServer) error {
	id, err := caller(call.Context())
	if err != nil {
		return err
	}
	answered := s.c.metrics.rpcs.WithLabelValues(clusterpb.Peer_Pings_FullMethodName, codes.OK.String())
	for {
		r, err := call.Recv()
		if err != nil {
			return nil //nolint:nilerr // the caller closed the stream or its connection
		}
		got, err := s.respond(id, r)
		if err != nil {
			return err
		}
		if err := call.Send(got); err != nil {
			return err
		}
		answered.Inc()
	}
}

func (s *peerServer) respond(id mesh.Identity, r *clusterpb.PingRequest) (*clusterpb.PingResponse, error) {
	n := nodeOf(r.GetNode())
	if n.Name != id.Node || n.Site != id.Site {
		return nil, status.Errorf(codes.PermissionDenied, "the ping is of %s/%s, the certificate of %s/%s", n.Site, n.Name, id.Site, id.Node)
	}
	got := s.c.pingResponse()
	if s.c.isMember(n.Name) {
		s.c.book.recordDirect(n)
	}
	if _, member := s.c.State().Nodes[n.Name]; !member {
		got.LeaseUs = 0 // it was removed, or joins, or this node has no agreed state yet
	}
	return got, nil
}
