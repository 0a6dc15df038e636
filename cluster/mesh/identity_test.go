package mesh

import (
	"crypto/x509"
	"errors"
	"net/url"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/config"
)

func TestParseIdentity(t *testing.T) {
	long := strings.Repeat("a", config.MaxNameLength+1)
	for _, tc := range []struct {
		name string
		uris []string
		want Identity
		err  string // part of the error's text; "" means no error
	}{
		{name: "plain", uris: []string{"spiffe://dev/site/shanghai-a/node/shanghai-a-1"}, want: Identity{"dev", "shanghai-a", "shanghai-a-1"}},
		{name: "other URIs are ignored", uris: []string{"https://example.com", "spiffe://dev/site/a/node/b"}, want: Identity{"dev", "a", "b"}},
		{name: "no URI", err: "it has 0"},
		{name: "two URIs", uris: []string{"spiffe://dev/site/a/node/b", "spiffe://dev/site/a/node/c"}, err: "it has 2"},
		{name: "of another service", uris: []string{"spiffe://dev/ns/prod/sa/web"}, err: "is not spiffe://"},
		{name: "a longer path", uris: []string{"spiffe://dev/site/a/node/b/c"}, err: "is not spiffe://"},
		{name: "a query", uris: []string{"spiffe://dev/site/a/node/b?x=1"}, err: "is not spiffe://"},
		{name: "a user", uris: []string{"spiffe://root@dev/site/a/node/b"}, err: "is not spiffe://"},
		{name: "empty node", uris: []string{"spiffe://dev/site/a/node/"}, err: "node is empty"},
		{name: "empty cluster", uris: []string{"spiffe:///site/a/node/b"}, err: "cluster is empty"},
		{name: "a port", uris: []string{"spiffe://dev:1/site/a/node/b"}, err: "may hold letters"},
		{name: "escaped slash", uris: []string{"spiffe://dev/site/a%2Fb/node/c"}, err: "is not spiffe://"},
		{name: "path traversal", uris: []string{"spiffe://dev/site/../node/c"}, err: "may hold letters"},
		{name: "a long name", uris: []string{"spiffe://dev/site/" + long + "/node/c"}, err: "at most 63"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cert := &x509.Certificate{}
			for _, uri := range tc.uris {
				u, err := url.Parse(uri)
				if err != nil {
					t.Fatal(err)
				}
				cert.URIs = append(cert.URIs, u)
			}
			got, err := ParseIdentity(cert)
			if tc.err == "" {
				if err != nil || got != tc.want {
					t.Fatalf("got %v, %v; want %v", got, err, tc.want)
				}
				return
			}
			if !errors.Is(err, ErrNoIdentity) || !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("got %v, %v; want an error with %q", got, err, tc.err)
			}
		})
	}
}

func TestIdentityRoundTripsThroughItsURI(t *testing.T) {
	part := rapid.StringMatching(`[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?`)
	rapid.Check(t, func(t *rapid.T) {
		id := Identity{Cluster: part.Draw(t, "cluster"), Site: part.Draw(t, "site"), Node: part.Draw(t, "node")}
		if err := id.Validate(); err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(id.String())
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseIdentity(&x509.Certificate{URIs: []*url.URL{u}})
		if err != nil || got != id {
			t.Fatalf("got %v, %v; want %v", got, err, id)
		}
	})
}
