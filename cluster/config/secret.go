package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"unicode"
)

// ErrSecret is what every reference that leads to no usable secret is.
var ErrSecret = errors.New("secret cannot be read")

// maxSecretBytes bounds what a secret's file may hold.
const maxSecretBytes = 64 << 10

// wrong says why s is no reference, "" when it is one. It never repeats what
// was written: people put the secret itself there.
func (s Secret) wrong() (message, hint string) {
	const one = "write {env: NAME} or {file: PATH}"
	switch {
	case s.Env != "" && s.File != "":
		return "has both env and file", one + ", not both"
	case s.IsZero():
		return "has neither env nor file", one
	case s.Env != "" && !validEnvName(s.Env):
		return "env is not the name of an environment variable", "write letters, digits and underscores, such as {env: VLLM_KEY}; the secret itself must not stand here"
	case strings.ContainsRune(s.File, 0) || len(s.File) > 4096:
		return "file is not a path", one
	}
	return "", ""
}

func validEnvName(s string) bool {
	for i, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '_'
		if !letter && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return s != "" && len(s) <= 256
}

// ResolveSecret reads what a reference points at, without the white space
// around it. The error, an ErrSecret, names the reference and never the value.
func ResolveSecret(s Secret, lookupEnv func(string) (string, bool), readFile func(string) ([]byte, error)) (string, error) {
	if message, hint := s.wrong(); message != "" {
		return "", fmt.Errorf("%w: %s; %s", ErrSecret, message, hint)
	}
	var value, from string
	if s.Env != "" {
		from = "the environment variable " + s.Env
		v, ok := lookupEnv(s.Env)
		if !ok {
			return "", fmt.Errorf("%w: %s is not set; set it in the environment of dsnode run", ErrSecret, from)
		}
		value = v
	} else {
		from = "the file " + s.File
		data, err := readFile(s.File)
		if err != nil {
			return "", fmt.Errorf("%w: %w", ErrSecret, newFileError(s.File, err))
		}
		value = string(data)
	}
	value = strings.TrimSpace(value)
	switch {
	case value == "":
		return "", fmt.Errorf("%w: %s is empty; put the secret there", ErrSecret, from)
	case len(value) > maxSecretBytes:
		return "", fmt.Errorf("%w: %s has more than %d bytes; put the secret alone there", ErrSecret, from, maxSecretBytes)
	case strings.ContainsFunc(value, unicode.IsControl):
		return "", fmt.Errorf("%w: %s has more than one line or control characters; put the secret alone there", ErrSecret, from)
	}
	return value, nil
}

// fileError is the failure to read a file, in words with a remedy.
type fileError struct {
	words string
	err   error
}

func (e *fileError) Error() string { return e.words }
func (e *fileError) Unwrap() error { return e.err }

func newFileError(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &fileError{"the file " + path + " does not exist; create it or correct the path", err}
	case errors.Is(err, fs.ErrPermission):
		return &fileError{"the file " + path + " may not be read; let the user that runs dsnode read it", err}
	}
	reason := err
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		reason = pathErr.Err // the path has been said
	}
	return &fileError{fmt.Sprintf("the file %s cannot be read: %v", path, reason), err}
}

// CheckLocal checks what only a site's own nodes can know: that the secrets of
// the site's upstreams can be read, and that their TLS files exist and hold
// what they should. readFile is asked for the paths as cluster.yaml has them.
// The error is a Problems.
func (c *Config) CheckLocal(site string, lookupEnv func(string) (string, bool), readFile func(string) ([]byte, error)) error {
	src := c.source.again()
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		u := c.Upstreams[name]
		if u.Site != site {
			continue
		}
		at := At("upstreams", name)
		if !u.APIKey.IsZero() {
			src.CheckSecret(at.At("api_key"), u.APIKey, lookupEnv, readFile)
		}
		if !u.Secure() {
			continue
		}
		if u.TLS.CAFile != "" {
			src.CheckCA(at.At("tls", "ca_file"), u.TLS.CAFile, readFile)
		}
		if u.TLS.CertFile != "" {
			src.CheckKeyPair(at.At("tls"), u.TLS.CertFile, u.TLS.KeyFile, readFile)
		}
	}
	if here := c.Cache.At(site); here.Shared == SharedRedis {
		at := At("cache", "sites", site, "redis")
		if !here.Redis.Password.IsZero() {
			src.CheckSecret(at.At("password"), here.Redis.Password, lookupEnv, readFile)
		}
		if here.Redis.Secure() && here.Redis.TLS.CAFile != "" {
			src.CheckCA(at.At("tls", "ca_file"), here.Redis.TLS.CAFile, readFile)
		}
		if here.Redis.Secure() && here.Redis.TLS.CertFile != "" {
			src.CheckKeyPair(at.At("tls"), here.Redis.TLS.CertFile, here.Redis.TLS.KeyFile, readFile)
		}
	}
	return src.Err()
}

// CheckSecret rejects a reference that leads to no usable secret.
func (s *Source) CheckSecret(p Path, ref Secret, lookupEnv func(string) (string, bool), readFile func(string) ([]byte, error)) (value string, ok bool) {
	value, err := ResolveSecret(ref, lookupEnv, readFile)
	if err != nil {
		s.rejectError(p, err)
		return "", false
	}
	return value, true
}

// rejectError is Reject for an error whose text has its hint after "; ".
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

// CheckCA rejects a file that is not made of CA certificates in PEM form.
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
			s.Reject(p, fmt.Sprintf("the file %s holds a broken certificate: %v", path, err), "copy the CA's certificate again")
			return
		}
		n++
	}
	if n == 0 {
		s.Reject(p, "the file "+path+" holds no certificate in PEM form", "give the CA's certificate, as dsnode tls ca writes it")
	}
}

// CheckKeyPair rejects, at cert_file and key_file below p, what keeps the two
// from being a certificate with its key.
func (s *Source) CheckKeyPair(p Path, certFile, keyFile string, readFile func(string) ([]byte, error)) (pair tls.Certificate, ok bool) {
	cert, certOK := s.CheckFile(p.At("cert_file"), certFile, readFile)
	key, keyOK := s.CheckFile(p.At("key_file"), keyFile, readFile)
	if !certOK || !keyOK {
		return tls.Certificate{}, false
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		s.Reject(p.At("cert_file"), fmt.Sprintf("the files %s and %s are no certificate with its key (%s)", certFile, keyFile, strings.TrimPrefix(err.Error(), "tls: ")),
			"issue both together, as dsnode tls issue does")
		return tls.Certificate{}, false
	}
	return pair, true
}
