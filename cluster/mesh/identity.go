package mesh

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/dsnode/dsnode/cluster/config"
)

// ErrNoIdentity means that a certificate does not say which node it is for.
var ErrNoIdentity = errors.New("certificate carries no node identity")

// Identity is who a peer is, as the URI SAN of its certificate says:
// spiffe://<cluster>/site/<site>/node/<node>.
type Identity struct {
	Cluster string
	Site    string
	Node    string
}

// URI is the identity as it stands in a certificate.
func (id Identity) URI() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: id.Cluster, Path: "/site/" + id.Site + "/node/" + id.Node}
}

func (id Identity) String() string { return id.URI().String() }

// Validate says in words which part could not stand in a certificate.
func (id Identity) Validate() error {
	for _, part := range []struct{ what, name string }{
		{"cluster", id.Cluster}, {"site", id.Site}, {"node", id.Node},
	} {
		if err := config.CheckIdentityPart(part.what, part.name); err != nil {
			return err
		}
	}
	return nil
}

// ParseIdentity reads the identity of a certificate. The error wraps
// ErrNoIdentity when there is none, or more than one.
func ParseIdentity(cert *x509.Certificate) (Identity, error) {
	var found []*url.URL
	for _, u := range cert.URIs {
		if u.Scheme == "spiffe" {
			found = append(found, u)
		}
	}
	if len(found) != 1 {
		// SPIFFE forbids more than one, and with two a reader could be shown
		// the other one.
		return Identity{}, fmt.Errorf("%w: want one spiffe URI, it has %d", ErrNoIdentity, len(found))
	}
	u := found[0]
	parts := strings.Split(u.Path, "/")
	if len(parts) != 5 || parts[0] != "" || parts[1] != "site" || parts[3] != "node" ||
		u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" {
		return Identity{}, fmt.Errorf("%w: %q is not spiffe://CLUSTER/site/SITE/node/NODE", ErrNoIdentity, u)
	}
	id := Identity{Cluster: u.Host, Site: parts[2], Node: parts[4]}
	if err := id.Validate(); err != nil {
		return Identity{}, fmt.Errorf("%w: %q: %w", ErrNoIdentity, u, err)
	}
	return id, nil
}
