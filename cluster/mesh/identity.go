package mesh

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"strings"

	"github.com/dsnode/dsnode/cluster/config"
)

// Identity names a node. Its certificate carries it as a URI SAN:
// spiffe://<cluster>/site/<site>/node/<node>.
type Identity struct {
	Cluster string
	Site    string
	Node    string
}

// URI is the identity as a certificate carries it.
func (id Identity) URI() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: id.Cluster, Path: "/site/" + id.Site + "/node/" + id.Node}
}

func (id Identity) String() string { return id.URI().String() }

// Validate returns an error that names the part which a certificate can't carry.
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

// ParseIdentity reads the identity from a certificate. The error wraps
// ErrNoIdentity if there is none, or more than one.
func ParseIdentity(cert *x509.Certificate) (Identity, error) {
	var found []*url.URL
	for _, u := range cert.URIs {
		if u.Scheme == "spiffe" {
			found = append(found, u)
		}
	}
	if len(found) != 1 {
		// SPIFFE forbids more than one. With two, another program could take the
		// other one for the node's identity.
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
