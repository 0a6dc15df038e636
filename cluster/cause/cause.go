// Package cause says why a connection or an exchange failed, in words of this program
// alone. Logs, statuses, metrics and records of drills take them: an error of net/http
// quotes what it could not parse, an upstream's error repeats the request, and so either
// may hold a prompt, an answer or a key.
//
// The rule is an allow-list: Of knows the errors that have constant texts, and puts any
// other one into its Go type. Start reading at Of.
package cause

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/textproto"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Words is a cause in this program's own words. Nobody formats what a server, a client or
// a peer has sent into it.
type Words string

func (w Words) Error() string { return string(w) }

// Own marks an error whose text is this program's own. Of keeps it.
func Own(err error) error {
	if err == nil {
		return nil
	}
	return own{err}
}

type own struct{ error }

func (o own) Unwrap() error { return o.error }

// Answer is an answer that was no success, with all that may be told about it.
type Answer struct {
	What   string // in own words, such as "server_error"; empty: only the rest
	Status int
	Type   string // by ContentType
	Length int    // bytes that were read of the body
	Code   string // of the error object, one that is known; empty: none
}

func (a *Answer) Error() string {
	var b strings.Builder
	if a.What != "" {
		b.WriteString(a.What + ": ")
	}
	fmt.Fprintf(&b, "status %d, %s, %d bytes", a.Status, a.Type, a.Length)
	if a.Code != "" {
		b.WriteString(", code " + a.Code)
	}
	return b.String()
}

// ContentType is the content type of an answer if it is a usual one. A server could
// write anything there.
func ContentType(h http.Header) string {
	value := h.Get("Content-Type")
	if value == "" {
		return "no content type"
	}
	name, _, err := mime.ParseMediaType(value)
	if err != nil {
		return "an invalid content type"
	}
	switch name {
	case "application/json", "application/problem+json", "text/event-stream", "text/html", "text/plain",
		"application/x-ndjson", "application/octet-stream", "text/xml", "application/xml":
		return name
	}
	return "another content type"
}

// Of gives an error of a connection, of TLS or of HTTP in own words; nil for nil. The end
// of a context stays what it is.
func Of(err error) error {
	if err == nil {
		return nil
	}
	var (
		words   Words
		answer  *Answer
		mine    own
		network *net.OpError
	)
	switch {
	case errors.As(err, &words):
		return words
	case errors.As(err, &answer):
		return answer
	case errors.As(err, &mine):
		return mine
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case errors.As(err, &network):
		return ofNetwork(network)
	case errors.Is(err, context.DeadlineExceeded):
		return context.DeadlineExceeded
	}
	return Words(reason(err))
}

// ofNetwork keeps the operation and the address, which come from Go and from the
// configuration.
func ofNetwork(e *net.OpError) Words {
	text := e.Op
	if e.Net != "" {
		text += " " + e.Net
	}
	if e.Addr != nil {
		text += " " + e.Addr.String()
	}
	return Words(text + ": " + reason(e.Err))
}

// reason is the constant text of an error. The errors of TLS and of certificates are put
// into a sentence: a certificate's names are its owner's words.
func reason(err error) string {
	var (
		errno    syscall.Errno
		name     *net.DNSError
		unknown  x509.UnknownAuthorityError
		host     x509.HostnameError
		invalid  x509.CertificateInvalidError
		verify   *tls.CertificateVerificationError
		record   tls.RecordHeaderError
		alert    tls.AlertError
		timeout  interface{ Timeout() bool }
		protocol textproto.ProtocolError
	)
	switch {
	case err == nil:
		return "unknown"
	case errors.As(err, &errno):
		return errno.Error()
	case errors.As(err, &name):
		return "look up " + strconv.Quote(name.Name) + ": " + lookup(name)
	case errors.As(err, &unknown):
		return "certificate signed by unknown authority"
	case errors.As(err, &host):
		return "the certificate is for other names than " + strconv.Quote(host.Host)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the certificate has expired or is not valid yet"
	case errors.As(err, &invalid), errors.As(err, &verify):
		return "the certificate is not valid"
	case errors.As(err, &record):
		return "the other side does not speak TLS"
	case errors.As(err, &alert):
		return "TLS alert " + strconv.Itoa(int(alert)) + " (" + strings.TrimPrefix(alert.Error(), "tls: ") + ")"
	case errors.Is(err, http.ErrSchemeMismatch):
		return "the server speaks HTTP where HTTPS is configured"
	case errors.Is(err, net.ErrClosed):
		return net.ErrClosed.Error()
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "timed out"
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "the connection was closed in the middle of the answer"
	case errors.Is(err, io.EOF):
		return "the connection was closed before the answer"
	case errors.As(err, &protocol):
		return badHTTP
	}
	last := innermost(err)
	if constant[last.Error()] {
		return last.Error()
	}
	kind := fmt.Sprintf("%T", last)
	if kind == "tls.alert" { // a number with a constant text, unexported inside net.OpError
		return last.Error()
	}
	if strings.HasPrefix(strings.TrimPrefix(kind, "*"), "http.") {
		return badHTTP
	}
	return "an error of the type " + kind
}

const badHTTP = "the answer breaks the rules of HTTP"

// constant are texts of unexported errors of the standard library without a part that
// varies.
var constant = map[string]bool{
	"http: server closed idle connection":                true,
	"malformed chunked encoding":                         true,
	"invalid byte in chunk length":                       true,
	"http chunk length too large":                        true,
	"chunked encoding contains too much non-data":        true,
	"header line too long":                               true,
	"http: suspiciously long trailer after chunked body": true,
	"http: unexpected EOF reading trailer":               true,
	"http: request canceled":                             true,
}

func lookup(e *net.DNSError) string {
	switch {
	case e.IsNotFound:
		return "no such host"
	case e.IsTimeout:
		return "timed out"
	}
	return "the name server failed"
}

func innermost(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// Panic describes what recover returned: the runtime's own errors hold numbers and types
// alone, any other value may hold a request's text.
func Panic(value any) string {
	if e, ok := value.(interface {
		error
		RuntimeError()
	}); ok {
		return e.Error()
	}
	return fmt.Sprintf("a value of the type %T", value)
}
