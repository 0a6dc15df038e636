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

const (
	credentialFileMax      = 1 << 20 // bytes
	credentialPollInterval = 5 * time.Second
)

// Credentials are the certificate, key and CA with which this node and its peers
// authenticate each other. They follow their files: a changed valid set is used
// from the next handshake on; an invalid one is reported, and the last valid set
// stays in use. Open connections are not affected.
type Credentials struct {
	certFile, keyFile, caFile string
	log                       *slog.Logger
	poll                      time.Duration
	metrics                   credentialMetrics

	current atomic.Pointer[credentialSet]

	mu      sync.Mutex        // guards pending and refused, and makes reloads one at a time
	pending [sha256.Size]byte // differs from the set in use and was read once
	refused [sha256.Size]byte // reported as invalid already
}

// credentialSet is one parsed and verified version of the three files.
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

// credentialFiles are the bytes of one read of the files.
type credentialFiles struct {
	cert, key, ca []byte
	sum           [sha256.Size]byte
}

// LoadCredentials reads and checks the files. It returns an error for a
// certificate that the CA did not sign, that has expired, that does not match the
// key, or that carries no node identity. Run follows later changes.
func LoadCredentials(certFile, keyFile, caFile string, log *slog.Logger, reg prometheus.Registerer) (*Credentials, error) {
	f := promauto.With(reg)
	// The certificates of the node's other ports use the same metrics with another
	// label.
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
				Help: "Changed certificate files, by result: used or refused.",
			}, []string{"result"}),
			stale: f.NewGauge(prometheus.GaugeOpts{
				Name: "dsnode_certificate_files_broken", ConstLabels: label,
				Help: "1 while the files on disk are invalid and the last valid ones are in use.",
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

// Run polls the files until ctx ends. A change is used once two polls in a row
// have read the same bytes: a CA bundle that is half written, up to the end of
// one of its certificates, looks like a valid, shorter bundle.
func (c *Credentials) Run(ctx context.Context) error {
	tick := time.NewTicker(c.poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			// reload has logged the error; the next poll tries again.
			_ = c.reload(true)
		}
	}
}

// Reload reads the files now (SIGHUP) and uses a change at once. On an error the
// last valid set stays in use.
func (c *Credentials) Reload() error { return c.reload(false) }

// reload reads the files. With twice set it uses a change only after two reads in a
// row with the same bytes.
func (c *Credentials) reload(twice bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()

	old := c.current.Load()
	files, err := c.read()
	if err != nil {
		return c.reportInvalid(sha256.Sum256([]byte(err.Error())), err)
	}
	if files.sum == old.sum {
		c.pending, c.refused = [sha256.Size]byte{}, [sha256.Size]byte{}
		c.metrics.stale.Set(0)
		return nil
	}
	if twice && files.sum != c.pending {
		c.pending = files.sum
		return nil
	}
	set, err := c.parse(files)
	if err == nil && set.identity != old.identity {
		err = fmt.Errorf("%s is now the certificate of %s, but this node is %s: to change a node's identity, restart it",
			c.certFile, set.identity, old.identity)
	}
	if err != nil {
		return c.reportInvalid(files.sum, err)
	}
	c.use(set)
	c.pending, c.refused = [sha256.Size]byte{}, [sha256.Size]byte{}
	c.metrics.reloads.WithLabelValues("used").Inc()
	c.log.Info("changed certificate files are in use", "certificate", c.certFile,
		"identity", set.identity.String(), "expires", set.leaf.Leaf.NotAfter)
	return nil
}

// reportInvalid logs and counts an invalid version of the files, once for each
// version, and returns err.
func (c *Credentials) reportInvalid(sum [sha256.Size]byte, err error) error {
	c.metrics.stale.Set(1)
	if sum != c.refused {
		c.refused = sum
		c.metrics.reloads.WithLabelValues("refused").Inc()
		c.log.Error("certificate files are invalid, the last valid ones stay in use", "err", err,
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
	for _, file := range []struct {
		path string
		to   *[]byte
	}{{c.certFile, &f.cert}, {c.keyFile, &f.key}, {c.caFile, &f.ca}} {
		content, err := readBounded(file.path)
		if err != nil {
			return credentialFiles{}, fmt.Errorf("read TLS file: %w", err)
		}
		*file.to = content
		part := sha256.Sum256(content)
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
	content, err := io.ReadAll(io.LimitReader(file, credentialFileMax+1))
	if err != nil {
		return nil, err
	}
	if len(content) > credentialFileMax {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, credentialFileMax)
	}
	return content, nil
}

func (c *Credentials) parse(f credentialFiles) (*credentialSet, error) {
	chain, err := parseCertificates(f.cert)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.certFile, err)
	}
	leaf, err := tls.X509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, fmt.Errorf("the certificate %s and the key %s don't match: %w", c.certFile, c.keyFile, err)
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
	// A node is client and server. A certificate that is valid for one use only
	// would fail much later, and on another node.
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := verifyPeer(chain, roots, time.Now(), usage, identity.Cluster, ""); err != nil {
			return nil, fmt.Errorf("%s can't be verified with the CA in %s: %w", c.certFile, c.caFile, err)
		}
	}
	return &credentialSet{leaf: leaf, identity: identity, roots: roots, sum: f.sum}, nil
}

// parseCertificates reads every certificate of a PEM file. It refuses a file that
// ends inside a PEM block: x509.CertPool would ignore that block silently.
func parseCertificates(file []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		block, rest := pem.Decode(file)
		if block == nil {
			break
		}
		file = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if bytes.Contains(file, []byte("-----BEGIN")) {
		return nil, errors.New("a PEM block is truncated or invalid")
	}
	if len(certs) == 0 {
		return nil, errors.New("it holds no PEM certificate")
	}
	return certs, nil
}

// Identity is this node's identity. It never changes while the process runs.
func (c *Credentials) Identity() Identity { return c.current.Load().identity }

// NotAfter is when the certificate in use expires.
func (c *Credentials) NotAfter() time.Time { return c.current.Load().leaf.Leaf.NotAfter }

// ServerTLS is the configuration for accepting peers: TLS 1.3 with a required
// client certificate, which is verified with the CA in use at that moment. Session
// resumption is off, because it would trust a verification by an earlier CA.
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

// ClientTLS is the configuration for dialling the peer of that name; "" accepts
// any node of the cluster. It verifies the identity in the certificate, not the
// host name.
func (c *Credentials) ClientTLS(node string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Switches off the checks of the host name and of the chain. VerifyConnection
		// checks the chain with the CA in use now, and the identity.
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

// verifyPeer checks that a certificate chain belongs to a node of the cluster, and
// to the node of that name unless it is "".
func verifyPeer(chain []*x509.Certificate, roots *x509.CertPool, now time.Time, usage x509.ExtKeyUsage, cluster, node string) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, fmt.Errorf("%w: the peer sent no certificate", ErrNoIdentity)
	}
	intermediates := x509.NewCertPool()
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	}); err != nil {
		return Identity{}, err
	}
	id, err := ParseIdentity(chain[0])
	if err != nil {
		return Identity{}, err
	}
	if id.Cluster != cluster {
		return Identity{}, fmt.Errorf("%w: it names %s, this is cluster %q", ErrForeignCluster, id, cluster)
	}
	if node != "" && id.Node != node {
		return Identity{}, fmt.Errorf("%w: it names %s, node %q was dialled", ErrWrongNode, id, node)
	}
	return id, nil
}
