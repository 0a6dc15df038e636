package mesh

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/agreed"
)

var (
	first     = Membership{ClusterID: "c1", Generation: agreed.Generation{Number: 1, ID: "g1"}}
	recovered = Membership{ClusterID: "c1", Generation: agreed.Generation{Number: 2, ID: "g2"}}
	forked    = Membership{ClusterID: "c1", Generation: agreed.Generation{Number: 2, ID: "g2-other"}}
	foreign   = Membership{ClusterID: "c2", Generation: agreed.Generation{Number: 1, ID: "g1"}}
	noCluster = Membership{}
)

// Dialler and acceptor use the same function, so each row is checked in both
// directions.
func TestCheckMembership(t *testing.T) {
	for _, tc := range []struct {
		name     string
		a, b     Membership
		kind     Kind
		aRefuses string // a's code about b; "" admits
		bRefuses string
	}{
		{"same", first, first, KindRaft, "", ""},
		{"same, after a recovery", recovered, recovered, KindHTTP, "", ""},
		{"another cluster", first, foreign, KindGRPC, CodeOtherCluster, CodeOtherCluster},
		{"another cluster and generation", recovered, foreign, KindRaft, CodeOtherCluster, CodeOtherCluster},
		{"a is behind", first, recovered, KindRaft, CodeNewerGeneration, CodeOlderGeneration},
		{"a is behind, grpc", first, recovered, KindGRPC, CodeNewerGeneration, CodeOlderGeneration},
		{"two recoveries", recovered, forked, KindGRPC, CodeForkGeneration, CodeForkGeneration},
		{"joining", noCluster, first, KindGRPC, "", ""},
		{"not joined, raft", noCluster, first, KindRaft, CodeNotMember, CodePeerNotMember},
		{"not joined, http", noCluster, recovered, KindHTTP, CodeNotMember, CodePeerNotMember},
		{"not joined, a tunnel", noCluster, first, KindTunnel, CodeNotMember, CodePeerNotMember},
		{"a is behind, a tunnel", first, recovered, KindRelayed, CodeNewerGeneration, CodeOlderGeneration},
		{"both not joined", noCluster, noCluster, KindGRPC, "", ""},
		{"both not joined, raft", noCluster, noCluster, KindRaft, CodeNotMember, CodeNotMember},
		{"unknown kind", first, first, "telnet", CodeUnknownKind, CodeUnknownKind},
		{"no kind", first, first, "", CodeUnknownKind, CodeUnknownKind},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, direction := range []struct {
				self, peer Membership
				want       string
			}{{tc.a, tc.b, tc.aRefuses}, {tc.b, tc.a, tc.bRefuses}} {
				got := checkMembership(direction.self, direction.peer, tc.kind)
				switch {
				case direction.want == "" && got != nil:
					t.Errorf("%v about %v: %v, want admitted", direction.self, direction.peer, got)
				case direction.want != "" && (got == nil || got.Code != direction.want || got.Message == ""):
					t.Errorf("%v about %v: got %v, want %s", direction.self, direction.peer, got, direction.want)
				}
			}
		})
	}
}

func TestCheckMembershipIsSymmetric(t *testing.T) {
	membership := rapid.Custom(func(t *rapid.T) Membership {
		return Membership{
			ClusterID: rapid.SampledFrom([]string{"", "c1", "c2"}).Draw(t, "cluster"),
			Generation: agreed.Generation{
				Number: rapid.Uint64Range(1, 3).Draw(t, "number"),
				ID:     rapid.SampledFrom([]string{"x", "y"}).Draw(t, "id"),
			},
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		a, b := membership.Draw(t, "a"), membership.Draw(t, "b")
		kind := rapid.SampledFrom([]Kind{KindRaft, KindGRPC, KindHTTP, KindTunnel, KindRelayed}).Draw(t, "kind")
		if (checkMembership(a, b, kind) == nil) != (checkMembership(b, a, kind) == nil) {
			t.Fatalf("only one of %v and %v admits %s", a, b, kind)
		}
	})
}

func TestDecodeRequest(t *testing.T) {
	id := Identity{"dev", "a", "a-1"}
	for _, tc := range []struct{ name, text, code string }{
		{"complete", `{"format":1,"kind":"grpc","cluster_id":"c1","generation":{"number":1,"id":"g"},"node":"a-1","site":"a"}`, ""},
		{"unknown members", `{"format":1,"kind":"grpc","node":"a-1","site":"a","colour":{"x":[1]}}`, ""},
		{"later format", `{"format":2,"kind":{"name":"grpc"},"node":["a-1"]}`, CodeUnknownFormat},
		{"no format", `{"kind":"grpc","node":"a-1","site":"a"}`, CodeUnknownFormat},
		{"another node", `{"format":1,"kind":"grpc","node":"a-2","site":"a"}`, CodeIdentity},
		{"another site", `{"format":1,"kind":"grpc","node":"a-1","site":"b"}`, CodeIdentity},
		{"a member twice", `{"format":1,"kind":"grpc","kind":"raft","node":"a-1","site":"a"}`, CodeMalformed},
		{"a wrong type", `{"format":1,"kind":7,"node":"a-1","site":"a"}`, CodeMalformed},
		{"a negative number", `{"format":1,"kind":"grpc","generation":{"number":-1},"node":"a-1","site":"a"}`, CodeMalformed},
		{"a long id", `{"format":1,"kind":"grpc","node":"a-1","site":"a","cluster_id":"` + strings.Repeat("c", 200) + `"}`, CodeMalformed},
		{"a tunnel", `{"format":1,"kind":"tunnel","node":"a-1","site":"a","target":"b-1"}`, ""},
		{"a tunnel without a target", `{"format":1,"kind":"tunnel","node":"a-1","site":"a"}`, CodeMalformed},
		{"a tunnel to a name that is too long", `{"format":1,"kind":"tunnel","node":"a-1","site":"a","target":"` + strings.Repeat("b", 200) + `"}`, CodeMalformed},
		{"a tunnel with two targets", `{"format":1,"kind":"tunnel","node":"a-1","site":"a","target":["b-1","c-1"]}`, CodeMalformed},
		{"a target of another kind", `{"format":1,"kind":"relayed","node":"a-1","site":"a","target":"b-1"}`, CodeMalformed},
		{"no JSON", `GET / HTTP/1.1`, CodeMalformed},
		{"empty", ``, CodeMalformed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, refused := decodeRequest([]byte(tc.text), id)
			code := ""
			if refused != nil {
				code = refused.Code
			}
			if code != tc.code {
				t.Fatalf("got %v, want code %q", refused, tc.code)
			}
		})
	}
}

func TestDecodeReply(t *testing.T) {
	for _, tc := range []struct {
		name, text, code string
		byPeer           bool
	}{
		{"accepted", `{"format":1,"cluster_id":"c1","generation":{"number":1,"id":"g"}}`, "", false},
		{"refusal", `{"format":1,"code":"other_cluster","message":"no"}`, CodeOtherCluster, true},
		{"refusal in a later format", `{"format":9,"code":"other_cluster","message":"no","generation":"g2"}`, CodeOtherCluster, true},
		{"accepted in a later format", `{"format":9,"generation":"g2"}`, CodeUnknownFormat, false},
		{"no format", `{}`, CodeUnknownFormat, false},
		{"no JSON", `HTTP/1.1 400 Bad Request`, CodeMalformed, false},
		{"a long id", `{"format":1,"cluster_id":"` + strings.Repeat("c", 200) + `"}`, CodeMalformed, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, refused := decodeReply([]byte(tc.text))
			if refused == nil {
				refused = &RefusedError{}
			}
			if refused.Code != tc.code || refused.ByPeer != tc.byPeer {
				t.Fatalf("got %v, want code %q, by peer %v", refused, tc.code, tc.byPeer)
			}
		})
	}
}

func TestReadPrefaceReadsNoByteBeyondIt(t *testing.T) {
	wire, err := encodePreface(prefaceReply{Format: 1, ClusterID: "c1"})
	if err != nil {
		t.Fatal(err)
	}
	r := bytes.NewReader(append(wire, "what follows"...))
	if _, err := readPreface(r); err != nil {
		t.Fatal(err)
	}
	if r.Len() != len("what follows") {
		t.Fatalf("%d bytes are left to read, want those after the preface", r.Len())
	}
	if _, err := encodePreface(prefaceReply{Message: strings.Repeat("x", prefaceMax)}); err == nil {
		t.Error("a message beyond the bound was encoded")
	}
	if _, err := readPreface(strings.NewReader("dsn1\xff\xff{}")); err == nil {
		t.Error("a length beyond the bound was accepted")
	}
}

// The longest message of a refusal fits into a reply.
func TestRefusalsFitIntoAReply(t *testing.T) {
	long := strings.Repeat("\x01", prefaceFieldMax) // six bytes each in JSON
	for _, pair := range [][2]Membership{
		{{ClusterID: long, Generation: agreed.Generation{Number: 1, ID: long}}, {ClusterID: "c", Generation: agreed.Generation{Number: 1, ID: long}}},
		{{ClusterID: long, Generation: agreed.Generation{Number: 1, ID: long}}, {ClusterID: long, Generation: agreed.Generation{Number: 1, ID: "other" + long[5:]}}},
	} {
		refused := checkMembership(pair[0], pair[1], KindRaft)
		if refused == nil {
			t.Fatal("not refused")
		}
		if _, err := encodePreface(prefaceReply{
			Format: 1, Code: refused.Code, Message: strings.Repeat("n", 80) + refused.Message,
			ClusterID: pair[0].ClusterID, Generation: pair[0].Generation,
			Ticket: &agreed.Ticket{Index: math.MaxUint64, Signature: make([]byte, prefaceFieldMax)},
		}); err != nil {
			t.Error(err)
		}
	}
}

func FuzzPreface(f *testing.F) {
	id := Identity{"dev", "a", "a-1"}
	for _, message := range []any{
		prefaceRequest{Format: 1, Kind: KindRaft, ClusterID: "c1", Generation: agreed.Generation{Number: 3, ID: "g"}, Node: "a-1", Site: "a"},
		prefaceRequest{Format: 1, Kind: KindTunnel, ClusterID: "c1", Generation: first.Generation, Node: "a-1", Site: "a", Target: "b-1"},
		prefaceRequest{Format: 1, Kind: KindRelayed, ClusterID: "c1", Generation: first.Generation, Node: "a-1", Site: "a"},
		prefaceReply{Format: 1, Code: CodeOtherCluster, Message: "no", ClusterID: "c2"},
		prefaceReply{Format: 1, Code: CodeUnreached, Message: "no", ClusterID: "c1"},
		prefaceReply{Format: 2},
	} {
		wire, err := encodePreface(message)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	f.Add([]byte("dsn1\x00\x02{}"))
	f.Add([]byte("dsn1\xff\xff"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		body, err := readPreface(bytes.NewReader(wire))
		if err != nil {
			return
		}
		if request, refused := decodeRequest(body, id); refused == nil {
			// Encoded again, it decodes to the same request.
			again, err := encodePreface(request)
			if err != nil {
				t.Fatal(err)
			}
			body, err := readPreface(bytes.NewReader(again))
			if err != nil {
				t.Fatal(err)
			}
			if second, refused := decodeRequest(body, id); refused != nil || second != request {
				t.Fatalf("%+v became %+v, %v", request, second, refused)
			}
			theirs := request.membership()
			if refused := checkMembership(first, theirs, request.Kind); refused == nil && theirs != first && request.Kind != KindGRPC {
				t.Fatalf("admitted %+v", request)
			}
			if (request.Kind == KindTunnel) != (request.Target != "") || len(request.Target) > prefaceFieldMax {
				t.Fatalf("accepted %+v", request)
			}
		} else if refused.Code == "" || refused.Message == "" {
			t.Fatalf("refused without a code or a message: %+v", refused)
		}
		if reply, refused := decodeReply(body); refused == nil && reply.Format != prefaceFormat {
			t.Fatalf("accepted %+v", reply)
		}
	})
}
