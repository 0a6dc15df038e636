package mesh

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

var (
	// ErrForeignCluster means that a peer's certificate is for another cluster.
	ErrForeignCluster = errors.New("certificate is for another cluster")
	// ErrWrongNode means that another node answered than the one that was dialled.
	ErrWrongNode = errors.New("certificate is for another node")
)

const (
	credentialFileMax      = 1 << 20
	credentialPollInterval = 5 * time.Second
)

// Credentials are the certificate, key and CA by which this node and its peers
// know each other. They follow their files: a changed and sound set is used
// from the next handshake on, a broken one is reported and the last good one
// stays. Connections that stand are left alone.
type Credentials struct {
	certFile, keyFile, caFile string
	log                       *slog.Logger
	poll                      time.Duration
	metrics                   credentialMetrics

	current atomic.Pointer[credentialSet]

	mu      sync.Mutex        // guards pending and refused, and makes reloads one at a time
	pending [sha256.Size]byte // seen once and different from the one in use
	refused [sha256.Size]byte // already reported as broken
}

// credentialSet is one consistent reading of the three files.
type credentialSet struct {
	leaf     tls.Certificate
	identity Identity
	roots    *x509.CertPool
	sum      [sha256.Size]byte
}

type credentialMetrics struct {
	expiry  prometheus.Gauge
	reloads *prometheus.CounterVec
	stale   prometheus.Gauge
}

// credentialFiles are the bytes of one look at the files.
type credentialFiles struct {
	cert, key, ca []byte
	sum           [sha256.Size]byte
}

// LoadCredentials reads and checks the files. It refuses, in words, a
// certificate that the CA did not sign, that has expired, whose key is another
// one, or that carries no node identity. Run follows later changes.
func LoadCredentials(certFile, keyFile, caFile string, log *slog.Logger, reg prometheus.Registerer) (*Credentials, error) {
	f := promauto.With(reg)
	// The node's other certificates have the same metric with another label.
	label := prometheus.Labels{"certificate": "rpc"}
	c := &Credentials{
		certFile: certFile, keyFile: keyFile, caFile: caFile,
		log:  log,
		poll: credentialPollInterval,
		metrics: credentialMetrics{
			expiry: f.NewGauge(prometheus.GaugeOpts{
				Name: "dsnode_certificate_expiry_timestamp_seconds", ConstLabels: label,
				Help: "When the certificate in use expires, in Unix seconds.",
			}),
			reloads: f.NewCounterVec(prometheus.CounterOpts{
				Name: "dsnode_certificate_reloads_total", ConstLabels: label,
				Help: "Changed certificate files, by whether they could be used.",
			}, []string{"result"}),
			stale: f.NewGauge(prometheus.GaugeOpts{
				Name: "dsnode_certificate_files_broken", ConstLabels: label,
				Help: "1 while the files on disk can't be used and the last good ones are.",
			}),
		},
	}
	files, err := c.read()
	if err != nil {
		return nil, err
	}
	set, err := c.parse(files)
	if err != nil {
		return nil, err
	}
	c.use(set)
	return c, nil
}

// Run follows the files until ctx ends. A change is used when two looks in a
// row saw the same bytes: a CA bundle that was cut between two of its
// certificates looks like a sound, shorter one.
func (c *Credentials) Run(ctx context.Context) error {
	tick := time.NewTicker(c.poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			// Reported by reload; the next look tries again.
			_ = c.reload(true)
		}
	}
}

// Reload reads the files now (SIGHUP). On an error the last good set stays.
func (c *Credentials) Reload() error { return c.reload(false) }

func (c *Credentials) reload(settle bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()

	old := c.current.Load()
	files, err := c.read()
	if err != nil {
		return c.report(sha256.Sum256([]byte(err.Error())), err)
	}
	if files.sum == old.sum {
		c.pending, c.refused = [sha256.Size]byte{}, [sha256.Size]byte{}
		c.metrics.stale.Set(0)
		return nil
	}
	if settle && files.sum != c.pending {
		c.pending = files.sum
		return nil
	}
	set, err := c.parse(files)
	if err == nil && set.identity != old.identity {
		err = fmt.Errorf("%s is now the certificate of %s: a node that becomes another one must be restarted (it is %s)",
			c.certFile, set.identity, old.identity)
	}
	if err != nil {
		return c.report(files.sum, err)
	}
	c.use(set)
	c.pending, c.refused = [sha256.Size]byte{}, [sha256.Size]byte{}
	c.metrics.reloads.WithLabelValues("used").Inc()
	c.log.Info("certificate files changed and are in use", "certificate", c.certFile,
		"identity", set.identity.String(), "expires", set.leaf.Leaf.NotAfter)
	return nil
}

// report says once for each broken content that it can't be used.
func (c *Credentials) report(sum [sha256.Size]byte, err error) error {
	c.metrics.stale.Set(1)
	if sum != c.refused {
		c.refused = sum
		c.metrics.reloads.WithLabelValues("refused").Inc()
		c.log.Error("certificate files can't be used, the last good ones stay", "error", err,
			"expires", c.NotAfter())
	}
	return err
}

func (c *Credentials) use(set *credentialSet) {
	c.current.Store(set)
	c.metrics.expiry.Set(float64(set.leaf.Leaf.NotAfter.Unix()))
	c.metrics.stale.Set(0)
}

func (c *Credentials) read() (credentialFiles, error) {
	var f credentialFiles
	hash := sha256.New()
	for _, one := range []struct {
		path string
		to   *[]byte
	}{{c.certFile, &f.cert}, {c.keyFile, &f.key}, {c.caFile, &f.ca}} {
		text, err := readBounded(one.path)
		if err != nil {
			return credentialFiles{}, fmt.Errorf("read TLS file: %w", err)
		}
		*one.to = text
		part := sha256.Sum256(text)
		hash.Write(part[:])
	}
	hash.Sum(f.sum[:0])
	return f, nil
}

func readBounded(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // nothing was written
	text, err := io.ReadAll(io.LimitReader(file, credentialFileMax+1))
	if err != nil {
		return nil, err
	}
	if len(text) > credentialFileMax {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, credentialFileMax)
	}
	return text, nil
}

func (c *Credentials) parse(f credentialFiles) (*credentialSet, error) {
	chain, err := parseCertificates(f.cert)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.certFile, err)
	}
	leaf, err := tls.X509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s don't make a pair: %w", c.certFile, c.keyFile, err)
	}
	authorities, err := parseCertificates(f.ca)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.caFile, err)
	}
	roots := x509.NewCertPool()
	for _, a := range authorities {
		if !a.IsCA {
			return nil, fmt.Errorf("%s: %q is not a CA's certificate", c.caFile, a.Subject.CommonName)
		}
		roots.AddCert(a)
	}
	identity, err := ParseIdentity(chain[0])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.certFile, err)
	}
	// A node is client and server: a certificate that is good for one only
	// would fail much later, at somebody else.
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := verifyPeer(chain, roots, time.Now(), usage, identity.Cluster, ""); err != nil {
			return nil, fmt.Errorf("%s does not hold against %s: %w", c.certFile, c.caFile, err)
		}
	}
	return &credentialSet{leaf: leaf, identity: identity, roots: roots, sum: f.sum}, nil
}

// parseCertificates reads every certificate of a PEM file and refuses one that
// ends in the middle: x509.CertPool would take the whole ones and be silent.
func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if bytes.Contains(text, []byte("-----BEGIN")) {
		return nil, errors.New("a PEM block is cut off or broken")
	}
	if len(certs) == 0 {
		return nil, errors.New("no PEM certificate in it")
	}
	return certs, nil
}

// Identity is who this node is. It never changes while the process lives.
func (c *Credentials) Identity() Identity { return c.current.Load().identity }

// NotAfter is when the certificate in use expires.
func (c *Credentials) NotAfter() time.Time { return c.current.Load().leaf.Leaf.NotAfter }

// ServerTLS is how this node accepts peers: TLS 1.3, a certificate demanded and
// checked against the CA of this moment. There is no resumption, which would
// trust what an earlier CA said.
func (c *Credentials) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.RequireAnyClientCert, // checked in VerifyConnection
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &c.current.Load().leaf, nil
		},
		VerifyConnection: c.verifier(x509.ExtKeyUsageClientAuth, ""),
	}
}

// ClientTLS is how this node dials the peer of that name; "" takes any node of
// the cluster. Host names don't matter: the identity in the certificate does.
func (c *Credentials) ClientTLS(node string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Switches off the host name check and the check against fixed roots;
		// VerifyConnection does more than both.
		InsecureSkipVerify: true, //nolint:gosec // see above
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &c.current.Load().leaf, nil
		},
		VerifyConnection: c.verifier(x509.ExtKeyUsageServerAuth, node),
	}
}

func (c *Credentials) verifier(usage x509.ExtKeyUsage, node string) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		set := c.current.Load()
		_, err := verifyPeer(cs.PeerCertificates, set.roots, time.Now(), usage, set.identity.Cluster, node)
		return err
	}
}

// verifyPeer decides whether the holder of a chain is a node of the cluster,
// and of that name unless it is "".
func verifyPeer(chain []*x509.Certificate, roots *x509.CertPool, now time.Time, usage x509.ExtKeyUsage, cluster, node string) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, fmt.Errorf("%w: no certificate was shown", ErrNoIdentity)
	}
	between := x509.NewCertPool()
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	}); err != nil {
		return Identity{}, err
	}
	id, err := ParseIdentity(chain[0])
	if err != nil {
		return Identity{}, err
	}
	if id.Cluster != cluster {
		return Identity{}, fmt.Errorf("%w: it says %s, this is cluster %q", ErrForeignCluster, id, cluster)
	}
	if node != "" && id.Node != node {
		return Identity{}, fmt.Errorf("%w: it says %s, node %q was dialled", ErrWrongNode, id, node)
	}
	return id, nil
}
