package mesh

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
)

// Why a dial failed.
var (
	// ErrNoAddress means that no address of the dialled node is known.
	ErrNoAddress = errors.New("no address of the node is known")
	// ErrForeignCluster means that the peer's certificate is for another cluster.
	ErrForeignCluster = errors.New("certificate is for another cluster")
	// ErrWrongNode means that another node answered than the one that was dialled.
	ErrWrongNode = errors.New("certificate is for another node")
	// ErrNoIdentity means that a certificate does not say which node it is for.
	ErrNoIdentity = errors.New("certificate carries no node identity")
	// ErrCertificateRefused means that the peer refused this node's certificate. The
	// TLS alert tells the dialler no more than that.
	ErrCertificateRefused = errors.New("the peer refused this node's certificate (another CA, expired, or another cluster's name in it)")
)

var errTooManyConns = errors.New("too many connections with peers")

// failureReason maps an error to a value of the metric's label "reason".
func failureReason(err error) string {
	var (
		unknownCA x509.UnknownAuthorityError
		invalid   x509.CertificateInvalidError
		record    tls.RecordHeaderError
		network   *net.OpError
		name      *net.DNSError
	)
	switch {
	case errors.Is(err, errTooManyHandshakes):
		return "crowded"
	case errors.Is(err, errTooManyConns):
		return "too_many_connections"
	case errors.Is(err, ErrForeignCluster):
		return "other_cluster"
	case errors.Is(err, ErrWrongNode):
		return "wrong_node"
	case errors.Is(err, ErrNoIdentity):
		return "no_identity"
	case errors.Is(err, ErrCertificateRefused):
		return "certificate_refused"
	case errors.As(err, &unknownCA):
		return "unknown_ca"
	case errors.As(err, &invalid):
		if invalid.Reason == x509.Expired {
			return "expired"
		}
		return "invalid_certificate"
	case errors.As(err, &record):
		return "not_tls"
	case errors.Is(err, errPreface):
		return "not_a_preface"
	case errors.As(err, &name):
		return "name_lookup"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection_refused"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "timeout"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	case errors.As(err, &network) && network.Timeout():
		return "timeout"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET),
		errors.Is(err, syscall.EPIPE), errors.Is(err, net.ErrClosed):
		return "closed"
	}
	return "other"
}

// explainHandshake turns TLS alerts and verification errors into plain sentences.
func explainHandshake(err error) error {
	var remote *net.OpError
	var unknownCA x509.UnknownAuthorityError
	switch {
	case errors.As(err, &remote) && remote.Op == "remote error" && strings.Contains(remote.Err.Error(), "certificate"):
		return fmt.Errorf("%w: %w", ErrCertificateRefused, err)
	case errors.As(err, &unknownCA):
		return fmt.Errorf("the peer's certificate was signed by another CA: %w", err)
	}
	return err
}
