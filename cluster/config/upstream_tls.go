package config

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
)

// TLSMaterial is the content of the files that an UpstreamTLS names; nil for a file
// that it doesn't name.
type TLSMaterial struct{ CA, Cert, Key []byte }

// Read reads the files.
func (t UpstreamTLS) Read(readFile func(string) ([]byte, error)) (m TLSMaterial, err error) {
	for _, f := range []struct {
		name, path string
		to         *[]byte
	}{{"ca_file", t.CAFile, &m.CA}, {"cert_file", t.CertFile, &m.Cert}, {"key_file", t.KeyFile, &m.Key}} {
		if f.path == "" {
			continue
		}
		if *f.to, err = readFile(f.path); err != nil {
			return m, fmt.Errorf("read %s: %w", f.name, err)
		}
	}
	return m, nil
}

// Client makes the settings of a client. They are usable only without an error.
func (t UpstreamTLS) Client(m TLSMaterial) (*tls.Config, error) {
	conf := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         t.ServerName,
		InsecureSkipVerify: t.InsecureSkipVerify, //nolint:gosec // the operator wrote it
	}
	if m.CA != nil {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(m.CA) {
			return conf, fmt.Errorf("ca_file %s holds no certificate in PEM", t.CAFile)
		}
	}
	if m.Cert != nil {
		pair, err := tls.X509KeyPair(m.Cert, m.Key)
		if err != nil {
			return conf, fmt.Errorf("cert_file and key_file: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}
