package operate

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
)

// votersView is what the first node sees. Of "a1=V b1=V! c1=n" a1 votes, b1 votes and is
// silent, and c1 does not vote. The sites a and b are in the city x, each other one in a
// city of its own; a site is configured if one of its nodes is named.
func votersView(t *testing.T, text string) view {
	t.Helper()
	v := healthyView(t)
	v.state.Nodes, v.peers, v.raft.Servers = map[string]agreed.Node{}, map[string]cluster.PeerView{}, nil
	var sites strings.Builder
	for i, word := range strings.Fields(text) {
		name, marks, _ := strings.Cut(word, "=")
		site := name[:1]
		city := map[string]string{"a": "x", "b": "x"}[site]
		if city == "" {
			city = "city-" + site
		}
		if line := fmt.Sprintf("  %s: {city: %s, priority: %d}\n", site, city, site[0]-'a'+1); !strings.Contains(sites.String(), line) {
			sites.WriteString(line)
		}
		n := agreed.Node{Name: name, Site: site, RPC: name + ":7957"}
		v.state.Nodes[name] = n
		v.raft.Servers = append(v.raft.Servers, cluster.Server{Name: name, Voter: strings.Contains(marks, "V")})
		if i == 0 {
			v.name, v.site, v.raft.Leader = name, site, name
			continue
		}
		p := cluster.PeerView{Name: name, Site: site, Info: n, Heard: true, Ago: 100 * time.Millisecond}
		if strings.Contains(marks, "!") {
			p.Ago = time.Hour
		}
		v.peers[name] = p
	}
	cfg, err := config.Parse("cluster.yaml", []byte("version: 1\nsites:\n"+sites.String()))
	if err != nil {
		t.Fatal(err)
	}
	v.state.Parsed, v.state.Primary.Site = cfg, v.site
	v.health = cluster.Health{}
	return v
}

// The status says which single loss would cost the quorum. That is no reason to call a
// cluster unhealthy whose operator has given it no more nodes or sites.
func TestStatusNamesTheLossThatCostsTheQuorum(t *testing.T) {
	for _, tc := range []struct{ voters, warning, reason string }{
		{"a1=V", "the cluster has one node, a1", ""},
		{"a1=V a2=n", "a1 is the only voter: while it is lost, no change and no failover is possible", ""},
		{"a1=V b1=n", "with three nodes there are three voters", ""},
		{"a1=V a2=n a3=n", "a1 is the only voter", "1 of 3 voters are placed"},
		{"a1=V a2=V a3=n", "2 of 2 voters answer, and all of them are needed (a1, a2)", "2 of 3 voters are placed"},
		{"a1=V a2=V a3=V", "", ""},
		{"a1=V a2=V a3=V a4=n", "", ""},
		{"a1=V a2=V a3=V!", "2 of 3 voters answer, and all of them are needed (a1, a2)", "node a3 is dead"},
		{"a1=V a2=V b1=V", "2 of 3 voters are in site a: while it is lost, no change and no failover is possible", ""},
		{"a1=V a2=V c1=V", "; nodes in a third site would prevent that", ""},
		{"a1=V a2=V b1=V!", "2 of 3 voters answer, and all of them are needed (a1, a2)", "site b is down"},
		{"a1=V c1=V d1=V", "", ""},
		{"a1=V b1=V c1=V", "2 of 3 voters are in the city x: while it is lost", ""},
		{"a1=V a2=V b1=V b2=V c1=V", "4 of 5 voters are in the city x: while it is lost, no change and no failover is possible; nodes in a third city would prevent that", ""},
		{"a1=V a2=V b1=V! b2=V c1=V", "2 of 5 voters are in site a", "node b1 is dead"}, // so the city goes without saying
		{"a1=V b1=V c1=V c2=V d1=V", "", ""},
		{"a1=V c1=V c2=V", "2 of 3 voters are in site c", ""},
	} {
		t.Run(tc.voters, func(t *testing.T) {
			s := describe(votersView(t, tc.voters))
			for what, c := range map[string]struct {
				got  []string
				want string
			}{"warnings": {s.Warnings, tc.warning}, "reasons": {s.Reasons, tc.reason}} {
				switch {
				case c.want == "" && len(c.got) > 0, c.want != "" && (len(c.got) != 1 || !strings.Contains(c.got[0], c.want)):
					t.Errorf("%s %q, want %q", what, c.got, c.want)
				}
			}
			if s.Healthy != (tc.reason == "") {
				t.Errorf("healthy %v with the reasons %q", s.Healthy, s.Reasons)
			}
		})
	}
}

// A node that does not hear the voters itself, and has its lease from another node, can't
// judge how many of them are left. Without a quorum, the reasons say what is lost.
func TestNoWarningOfWhatIsNotKnown(t *testing.T) {
	relayed := votersView(t, "a1=V b1=V! c1=V!")
	lost := votersView(t, "a1=V a2=V b1=V")
	lost.raft.Quorum = false
	for name, v := range map[string]view{"relayed lease": relayed, "no quorum": lost} {
		if s := describe(v); len(s.Warnings) != 0 || s.Warnings == nil {
			t.Errorf("%s: warnings %q", name, s.Warnings)
		}
	}
}

// A site that holds the quorum is not cut off: the others are lost.
func TestSurvivorIsNotIsolated(t *testing.T) {
	for _, quorum := range []bool{true, false} {
		v := votersView(t, "a1=V a2=V b1=V!")
		v.raft.Quorum = quorum
		want := admin.SiteIsolated
		if quorum {
			want = admin.SiteHealthy
		}
		sites := describe(v).Sites
		i := slices.IndexFunc(sites, func(s admin.SiteStatus) bool { return s.Name == "a" })
		if sites[i].State != want {
			t.Errorf("with a quorum %v: site a is %s, want %s", quorum, sites[i].State, want)
		}
	}
}
