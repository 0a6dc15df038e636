package mesh

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/test/async"
)

// Nobody but members gets a connection, in either direction, of any kind.
func TestOnlyMembersPassTheHandshake(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	ticket := &agreed.Ticket{Index: 7, Signature: []byte("by the cluster's key")}
	member := func(peer Identity, theirs Membership) bool {
		return peer.Node == "a-1" || theirs.Ticket != nil && theirs.Ticket.Index == ticket.Index && slices.Equal(theirs.Ticket.Signature, ticket.Signature)
	}
	a := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, func(o *Options) { o.Member = member })
	b := newTestPeer(t, ca, book, Identity{"dev", "b", "b-1"}, nil)
	kinds := []Kind{KindRaft, KindGRPC, KindHTTP}
	for _, p := range []*testPeer{a, b} {
		p.serve(t, book)
		for _, kind := range kinds {
			p.Listener(kind)
		}
	}
	ctx := async.Context(t)
	dial := func(p *testPeer, kind Kind) error {
		request := dialRequest{kind: kind, node: a.id.Node}
		if kind == KindTunnel {
			request.target = "c-1"
		}
		conn, err := p.dial(ctx, request, a.addr)
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	var refused *RefusedError
	for i, kind := range append(kinds, KindTunnel, KindRelayed) {
		if err := dial(b, kind); !errors.As(err, &refused) || refused.Code != CodeNotAdmitted || !refused.ByPeer {
			t.Errorf("%s: %v, want refused with code %s", kind, err, CodeNotAdmitted)
		}
		async.Await(t, "the refusal to be counted", func() bool {
			return testutil.ToFloat64(a.metrics.turnedAway.WithLabelValues(CodeNotAdmitted)) == float64(i+1)
		})
	}
	for _, kind := range kinds {
		if _, err := a.Dial(ctx, kind, b.id.Node); !errors.As(err, &refused) || refused.Code != CodeNotAdmitted || refused.ByPeer {
			t.Errorf("%s from a member: %v, want refused by the dialler", kind, err)
		}
	}
	admitted := first
	admitted.Ticket = ticket
	b.setMembership(admitted)
	for _, kind := range kinds {
		if err := dial(b, kind); err != nil {
			t.Errorf("%s with a ticket: %v", kind, err)
		}
		if conn, err := a.Dial(ctx, kind, b.id.Node); err != nil {
			t.Errorf("%s to a node with a ticket: %v", kind, err)
		} else {
			_ = conn.Close()
		}
	}
}

// Only a dialler that shows the cluster id is told id and generation. Others learn no more
// than that the node belongs to a cluster.
func TestClusterIsToldOnlyToThoseThatKnowIt(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	a := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	secret := Membership{ClusterID: "secret-id", Generation: agreed.Generation{Number: 3, ID: "secret-generation"}, Admitted: 4, Ticket: &agreed.Ticket{Index: 4}}
	a.setMembership(secret)
	a.serve(t, book)
	a.Listener(KindGRPC)
	b := newTestPeer(t, ca, book, Identity{"dev", "b", "b-1"}, nil)
	ctx := async.Context(t)

	b.setMembership(noCluster)
	conn, err := b.DialAddr(ctx, KindGRPC, a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if conn.Membership() != noCluster || !conn.Founded() {
		t.Errorf("a node that has not joined learns %+v, founded %t", conn.Membership(), conn.Founded())
	}
	for _, kind := range []Kind{KindGRPC, KindRaft, "other"} {
		for _, shown := range []Membership{noCluster, foreign} {
			b.setMembership(shown)
			conn, err := b.DialAddr(ctx, kind, a.addr)
			if err == nil {
				_ = conn.Close()
				continue
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("%s with cluster %q: %v", kind, shown.ClusterID, err)
			}
		}
	}
	var met uint64
	b.opts.OnNewerGeneration = func(_ Identity, theirs agreed.Generation) { met = theirs.Number }
	b.setMembership(Membership{ClusterID: "secret-id", Generation: agreed.Generation{Number: 2, ID: "g"}})
	if _, err := b.DialAddr(ctx, KindGRPC, a.addr); err == nil || met != 3 {
		t.Errorf("a node that a recovery left behind: %v, learned generation %d", err, met)
	}
}
