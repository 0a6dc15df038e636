package mesh

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// certificateBackdate is how long before its creation a certificate is valid
// already, for peers whose clock is behind.
const certificateBackdate = time.Hour

// NewCA makes a private certificate authority (ECDSA P-256) for one cluster.
// Both results are PEM. The key must not be stored on the nodes.
func NewCA(clusterName string, validFor time.Duration) (certPEM, keyPEM []byte, err error) {
	if err := config.CheckIdentityPart("cluster", clusterName); err != nil {
		return nil, nil, err
	}
	if validFor <= 0 {
		return nil, nil, fmt.Errorf("the validity of a CA must be positive, not %s", validFor)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make the CA's key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: clusterName + " dsnode CA"},
		NotBefore:             now.Add(-certificateBackdate),
		NotAfter:              now.Add(validFor),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, fmt.Errorf("sign the CA: %w", err)
	}
	return encodePair(der, key)
}

// Issue makes a node's certificate, for client and for server use. hosts are the
// DNS names and IP addresses that other programs may verify; peers verify the
// identity instead. It is an error if the certificate would outlive the CA.
func Issue(caCertPEM, caKeyPEM []byte, id Identity, hosts []string, validFor time.Duration) (certPEM, keyPEM []byte, err error) {
	if validFor <= 0 {
		return nil, nil, fmt.Errorf("the validity of a certificate must be positive, not %s", validFor)
	}
	now := time.Now()
	return issueBetween(caCertPEM, caKeyPEM, id, hosts, now.Add(-certificateBackdate), now.Add(validFor))
}

func issueBetween(caCertPEM, caKeyPEM []byte, id Identity, hosts []string, from, to time.Time) (certPEM, keyPEM []byte, err error) {
	if err := id.Validate(); err != nil {
		return nil, nil, err
	}
	ca, caKey, err := parseCA(caCertPEM, caKeyPEM)
	if err != nil {
		return nil, nil, err
	}
	if to.After(ca.NotAfter) {
		return nil, nil, fmt.Errorf("the CA expires on %s, before this certificate would (%s): ask for a shorter time or make a new CA",
			ca.NotAfter.UTC().Format(time.RFC3339), to.UTC().Format(time.RFC3339))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make the node's key: %w", err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: id.Node},
		NotBefore:             from,
		NotAfter:              to,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URI()},
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err != nil {
		return nil, nil, fmt.Errorf("sign the certificate of %s: %w", id.Node, err)
	}
	return encodePair(der, key)
}

func parseCA(certPEM, keyPEM []byte) (*x509.Certificate, crypto.Signer, error) {
	certs, err := parseCertificates(certPEM)
	if err != nil {
		return nil, nil, fmt.Errorf("read the CA's certificate: %w", err)
	}
	ca := certs[0]
	if !ca.IsCA {
		return nil, nil, fmt.Errorf("%q is not a CA's certificate", ca.Subject.CommonName)
	}
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return nil, nil, errors.New("read the CA's key: it is not PEM")
	}
	var parsed any
	if parsed, err = x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
		// OpenSSL still writes this older format for elliptic curves.
		var older error
		if parsed, older = x509.ParseECPrivateKey(block.Bytes); older != nil {
			return nil, nil, fmt.Errorf("read the CA's key: %w", err)
		}
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("the CA's key can't sign: it is a %T", parsed)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(ca.PublicKey) {
		return nil, nil, errors.New("the CA's key does not belong to its certificate")
	}
	return ca, key, nil
}

func encodePair(der []byte, key *ecdsa.PrivateKey) (certPEM, keyPEM []byte, err error) {
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode the key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}
