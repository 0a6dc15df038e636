package mesh

import (
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"
)

func TestIssuedCertificateIsValidForClientAndServer(t *testing.T) {
	caCert, caKey, err := NewCA("dev", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id := Identity{"dev", "beijing", "beijing-1"}
	cert, key, err := Issue(caCert, caKey, id, []string{"node.example", "127.0.0.1", "::1"}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(caCert)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		got, err := verifyPeer([]*x509.Certificate{pair.Leaf}, roots, time.Now(), usage, "dev", "beijing-1")
		if err != nil || got != id {
			t.Errorf("usage %v: got %v, %v", usage, got, err)
		}
	}
	for _, host := range []string{"node.example", "127.0.0.1", "::1"} {
		if err := pair.Leaf.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if _, err := verifyPeer([]*x509.Certificate{pair.Leaf}, roots, time.Now().Add(2*time.Minute), x509.ExtKeyUsageServerAuth, "dev", ""); err == nil {
		t.Error("an expired certificate was accepted")
	}
}

func TestIssueRefuses(t *testing.T) {
	caCert, caKey, err := NewCA("dev", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	_, otherKey, err := NewCA("dev", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id := Identity{"dev", "a", "a-1"}
	leaf, leafKey, err := Issue(caCert, caKey, id, nil, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name      string
		cert, key []byte
		id        Identity
		valid     time.Duration
		err       string
	}{
		{"would outlive the CA", caCert, caKey, id, 2 * time.Hour, "the CA expires on"},
		{"no validity", caCert, caKey, id, 0, "must be positive"},
		{"a bad name", caCert, caKey, Identity{"dev", "a b", "n"}, time.Minute, "may hold letters"},
		{"another CA's key", caCert, otherKey, id, time.Minute, "does not belong"},
		{"a leaf as CA", leaf, leafKey, id, time.Minute, "is not a CA"},
		{"no certificate", []byte("hello"), caKey, id, time.Minute, "no PEM certificate"},
		{"no key", caCert, []byte("hello"), id, time.Minute, "not PEM"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, _, err := Issue(tc.cert, tc.key, tc.id, nil, tc.valid); err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("got %v, want an error with %q", err, tc.err)
			}
		})
	}
	if _, _, err := NewCA("dev/x", time.Hour); err == nil {
		t.Error("a CA was made for a name that no certificate can carry")
	}
	if _, _, err := NewCA("dev", -time.Hour); err == nil {
		t.Error("a CA was made that has expired already")
	}
}
