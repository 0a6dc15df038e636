package cluster

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// A certificate of the CA that was never admitted gets nothing but Join, from the leader and
// from others, whatever cluster id it shows.
func TestAnOutsiderGetsOnlyJoin(t *testing.T) {
	a, b, c := threeMembers(t)
	for _, m := range []*member{a, b, c} {
		eventually(t, m.name+" serves members only and has a ticket", 20*time.Second, func() bool {
			return m.State().MembersOnly() && m.member.Load().Ticket != nil
		}, a, b, c)
	}
	id := mesh.Identity{Cluster: "test", Site: "b", Node: "b-9"}
	shown := mesh.Membership{}
	outsider := mesh.New(mesh.Options{
		Credentials: a.ca.issue(t, id), Membership: func() mesh.Membership { return shown },
		Address: func(string) (string, bool) { return "", false }, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	defer func() { _ = outsider.Close() }()
	put, err := agreed.NewCommand(agreed.CmdAPIKeyPut, time.Now(), agreed.APIKey{ID: "stolen"})
	if err != nil {
		t.Fatal(err)
	}
	command, err := put.Encode()
	if err != nil {
		t.Fatal(err)
	}
	ctx := deadline(t, 30*time.Second)
	for _, m := range []*member{a, b, c} {
		shown = mesh.Membership{}
		conn, err := outsider.SeedConn(m.opts.RPC)
		if err != nil {
			t.Fatal(err)
		}
		peer := clusterpb.NewPeerClient(conn)
		for method, call := range map[string]func() error{
			"Propose": func() error {
				_, err := peer.Propose(ctx, &clusterpb.ProposeRequest{Format: 1, Command: command})
				return err
			},
			"Ping": func() error { _, err := peer.Ping(ctx, &clusterpb.PingRequest{}); return err },
			"Pings": func() error {
				s, err := peer.Pings(ctx)
				if err == nil {
					_, err = s.Recv()
				}
				return err
			},
			"Yield":       func() error { _, err := peer.Yield(ctx, &clusterpb.YieldRequest{To: "b-1"}); return err },
			"Release":     func() error { _, err := peer.Release(ctx, &clusterpb.ReleaseRequest{}); return err },
			"CarriedKeys": func() error { _, err := peer.CarriedKeys(ctx, &clusterpb.CarriedKeysRequest{}); return err },
		} {
			if err := call(); status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s at %s: %v, want PermissionDenied", method, m.name, err)
			}
		}
		forged, err := peer.Join(ctx, &clusterpb.JoinRequest{Format: 1, Forwarded: true, Fresh: true, Node: &clusterpb.NodeInfo{Name: "c-9", Site: "c", Feature: 3}})
		if err != nil || forged.GetRefused() == nil {
			t.Errorf("a forwarded join at %s: %v, %v", m.name, forged, err)
		}
		_ = conn.Close()
		shown = mesh.Membership{ClusterID: a.State().ClusterID, Generation: a.State().Generation, Admitted: 1 << 60}
		for _, kind := range []mesh.Kind{mesh.KindGRPC, mesh.KindRaft, mesh.KindRelayed} {
			var leg net.Conn
			if leg, err = outsider.DialAddr(context.Background(), kind, m.opts.RPC); err == nil {
				_ = leg.Close()
				t.Errorf("%s with the cluster's id was accepted by %s", kind, m.name)
			}
		}
	}
	if _, committed := a.State().APIKeys["stolen"]; committed {
		t.Error("an outsider's key was committed")
	}
}

// With access.join: approve a node that nobody has admitted waits, and every member knows it.
func TestANewNodeWaitsForApproval(t *testing.T) {
	a, b, c := threeMembers(t)
	eventually(t, "members only are served", 20*time.Second, func() bool { return a.State().MembersOnly() && c.State().MembersOnly() }, a, b, c)
	text := testSites + "access: {join: approve}\n"
	if _, err := c.Propose(deadline(t, 15*time.Second), agreed.CmdConfigSet, agreed.ConfigSet{Expect: 1, Text: text, Hash: HashConfig([]byte(text)), Author: "test"}); err != nil {
		t.Fatal(err)
	}
	late := newMember(t, a.ca, "b", "b-2").start(t, c.opts.RPC)
	eventually(t, "b-2 waits", 20*time.Second, func() bool {
		_, waits := c.State().Applicant("b-2")
		return waits && strings.Contains(late.Waiting(), "dsnode node admit b-2")
	}, a, b, c)
	if _, member := a.State().Nodes["b-2"]; member || late.Membership().ClusterID != "" {
		t.Fatal("b-2 has joined by itself")
	}
	if _, err := b.Propose(deadline(t, 15*time.Second), agreed.CmdNodeAdmit, agreed.NodeAdmit{Name: "b-2", By: "test"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "b-2 is a member with a ticket", 20*time.Second, func() bool {
		m := late.member.Load()
		_, member := a.State().Nodes["b-2"]
		return member && m != nil && m.Ticket != nil && m.Ticket.Index == m.VoteFrom
	}, a, b, c)
}
