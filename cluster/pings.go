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

// pinging asks one peer again and again what it knows. All pings go through one
// call that stays open: a call of its own for each costs about as much again.
type pinging struct {
	c    *Cluster
	name string

	channel *mesh.Client // what call goes through
	call    clusterpb.Peer_PingsClient
	end     context.CancelFunc // of call
}

// run pings until ctx ends.
func (p *pinging) run(ctx context.Context) {
	defer func() { p.hangUp() }()
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		tick.Reset(clock.UntilTick(clock.Boottime(), p.c.Timing().Tick))
		if err := p.ping(ctx); err != nil && ctx.Err() == nil {
			p.c.metrics.pingFailures.Inc()
			p.c.log.Debug("ping failed", "peer", p.name, "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// ping asks once. When there is no answer in time the next one asks in a new
// call.
func (p *pinging) ping(ctx context.Context) (err error) {
	channel, err := p.c.mesh.Client(p.name)
	if err != nil {
		return fmt.Errorf("connect to %s: %w", p.name, err)
	}
	fresh := channel != p.channel
	if fresh {
		p.hangUp()
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		// A ping that waits on the old way would be heard too late on the new one.
		stop := context.AfterFunc(channel.Replaced, cancel)
		p.channel, p.end = channel, func() { cancel(); stop() }
	}
	late := time.AfterFunc(pingTimeout, p.end)
	defer func() {
		if !late.Stop() || err != nil {
			p.hangUp()
		}
	}()
	if fresh {
		if p.call, err = clusterpb.NewPeerClient(channel).Pings(ctx); err != nil {
			return fmt.Errorf("ping %s: %w", p.name, err)
		}
	}
	sent := clock.Boottime()
	var got *clusterpb.PingResponse
	// Sending fails with io.EOF when the call is over; receiving has the reason.
	if err = p.call.Send(&clusterpb.PingRequest{Format: rpcFormat, Node: infoOf(p.c.self()), Health: p.c.health()}); err == nil || errors.Is(err, io.EOF) {
		got, err = p.call.Recv()
	}
	if err != nil {
		return fmt.Errorf("ping %s: %w", p.name, err)
	}
	if got.GetNode().GetName() != p.name {
		return fmt.Errorf("ping %s: answered by %q: %w", p.name, got.GetNode().GetName(), ErrForeignNode)
	}
	p.c.metrics.pingSeconds.Observe((clock.Boottime() - sent).Seconds())
	p.c.book.heard(nodeOf(got.GetNode()))
	p.c.lease.relayed(sent, time.Duration(got.GetLeaseUs())*time.Microsecond,
		fences{epoch: got.GetEpoch(), ownership: got.GetOwnership()})
	p.c.peers.put(p.name, answer{sent: sent, got: got})
	return nil
}

// hangUp ends the call, if there is one.
func (p *pinging) hangUp() {
	if p.end != nil {
		p.end()
	}
	p.channel, p.call, p.end = nil, nil, nil
}

// Ping answers with this node's view, and takes the caller's addresses from the
// caller itself.
func (s *peerServer) Ping(ctx context.Context, r *clusterpb.PingRequest) (*clusterpb.PingResponse, error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	return s.answer(id, r)
}

// Pings is Ping until the caller hangs up.
func (s *peerServer) Pings(call clusterpb.Peer_PingsServer) error {
	id, err := caller(call.Context())
	if err != nil {
		return err
	}
	answered := s.c.metrics.rpcs.WithLabelValues(clusterpb.Peer_Pings_FullMethodName, codes.OK.String())
	for {
		r, err := call.Recv()
		if err != nil {
			return nil //nolint:nilerr // it has hung up, or its connection is gone
		}
		got, err := s.answer(id, r)
		if err != nil {
			return err
		}
		if err := call.Send(got); err != nil {
			return err
		}
		answered.Inc()
	}
}

func (s *peerServer) answer(id mesh.Identity, r *clusterpb.PingRequest) (*clusterpb.PingResponse, error) {
	n := nodeOf(r.GetNode())
	if n.Name != id.Node || n.Site != id.Site {
		return nil, status.Errorf(codes.PermissionDenied, "certificate of %s/%s, ping of %s/%s", id.Site, id.Node, n.Site, n.Name)
	}
	if s.c.knows(n.Name) {
		s.c.book.heard(n)
	}
	return s.c.answerPing(), nil
}
