package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// CheckLocal makes the checks that need a node of the site: whether the secrets
// of the site's upstreams and Redis can be read, and whether their TLS files are
// valid. readFile is called with the paths as cluster.yaml has them. The error is
// a Problems.
func (c *Config) CheckLocal(site string, lookupEnv func(string) (string, bool), readFile func(string) ([]byte, error)) error {
	src := c.source.withoutProblems()
	tlsFiles := func(at Path, t UpstreamTLS) {
		if t.CAFile != "" {
			src.CheckCA(at.At("ca_file"), t.CAFile, readFile)
		}
		if t.CertFile != "" {
			src.CheckKeyPair(at, t.CertFile, t.KeyFile, readFile)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		u := c.Upstreams[name]
		if u.Site != site {
			continue
		}
		at := At("upstreams", name)
		if !u.APIKey.IsZero() {
			src.CheckSecret(at.At("api_key"), u.APIKey, lookupEnv, readFile)
		}
		if u.Secure() {
			tlsFiles(at.At("tls"), u.TLS)
		}
	}
	if here := c.Cache.At(site); here.Shared == SharedRedis {
		at := At("cache", "sites", site, "redis")
		if !here.Redis.Password.IsZero() {
			src.CheckSecret(at.At("password"), here.Redis.Password, lookupEnv, readFile)
		}
		if here.Redis.Secure() {
			tlsFiles(at.At("tls"), here.Redis.TLS)
		}
	}
	return src.Err()
}

// CheckSecret rejects a reference that ResolveSecret can't resolve.
func (s *Source) CheckSecret(p Path, ref Secret, lookupEnv func(string) (string, bool), readFile func(string) ([]byte, error)) (value string, ok bool) {
	value, err := ResolveSecret(ref, lookupEnv, readFile)
	if err != nil {
		s.rejectError(p, err)
		return "", false
	}
	return value, true
}

// rejectError is Reject for an error whose message has a hint after "; ".
func (s *Source) rejectError(p Path, err error) {
	message, hint, _ := strings.Cut(err.Error(), "; ")
	s.Reject(p, message, hint)
}

// CheckFile rejects a file that can't be read or that is empty.
func (s *Source) CheckFile(p Path, path string, readFile func(string) ([]byte, error)) (data []byte, ok bool) {
	data, err := readFile(path)
	if err != nil {
		s.rejectError(p, newFileError(path, err))
		return nil, false
	}
	if len(bytes.TrimSpace(data)) == 0 {
		s.Reject(p, "the file "+path+" is empty", "fill it or correct the path")
		return nil, false
	}
	return data, true
}

// CheckCA rejects a file without a certificate, or with an invalid one, in PEM
// form.
func (s *Source) CheckCA(p Path, path string, readFile func(string) ([]byte, error)) {
	data, ok := s.CheckFile(p, path, readFile)
	if !ok {
		return
	}
	n := 0
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			s.Reject(p, fmt.Sprintf("the file %s has an invalid certificate: %v", path, err), "copy the CA's certificate again")
			return
		}
		n++
	}
	if n == 0 {
		s.Reject(p, "the file "+path+" has no certificate in PEM form", "use the CA's certificate, as dsnode tls ca writes it")
	}
}

// CheckKeyPair rejects files that are not a certificate and its private key. The
// problems are at cert_file and key_file below p.
func (s *Source) CheckKeyPair(p Path, certFile, keyFile string, readFile func(string) ([]byte, error)) (pair tls.Certificate, ok bool) {
	cert, certOK := s.CheckFile(p.At("cert_file"), certFile, readFile)
	key, keyOK := s.CheckFile(p.At("key_file"), keyFile, readFile)
	if !certOK || !keyOK {
		return tls.Certificate{}, false
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		s.Reject(p.At("cert_file"), fmt.Sprintf("the files %s and %s are not a certificate and its key (%s)", certFile, keyFile, strings.TrimPrefix(err.Error(), "tls: ")),
			"create both together with dsnode tls issue")
		return tls.Certificate{}, false
	}
	return pair, true
}
