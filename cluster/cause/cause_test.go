package cause

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"
	"syscall"
	"testing"
)

// What others have sent is in no text; what is this program's own stays.
func TestOf(t *testing.T) {
	const canary = "canary-of-a-prompt"
	for _, c := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("net/http: broken: malformed status %q", canary), "an error of the type *fmt.fmtError"},
		{fmt.Errorf("transport: %w", errors.New(canary)), "an error of the type *errors.errorString"},
		{textproto.ProtocolError("malformed MIME header line: " + canary), badHTTP},
		{&url.Error{Op: "Get", URL: "http://user:" + canary + "@x/", Err: io.EOF}, "the connection was closed before the answer"},
		{io.ErrUnexpectedEOF, "the connection was closed in the middle of the answer"},
		{&net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}, "dial tcp: connection refused"},
		{&net.OpError{Op: "read", Net: "tcp", Err: errors.New(canary)}, "read tcp: an error of the type *errors.errorString"},
		{x509.HostnameError{Certificate: &x509.Certificate{DNSNames: []string{canary}}, Host: "x"}, `the certificate is for other names than "x"`},
		{fmt.Errorf("%s: %w", canary, Words("in own words")), "in own words"},
		{fmt.Errorf("%s: %w", canary, Own(errors.New("of a node"))), "of a node"},
		{fmt.Errorf("%s: %w", canary, context.DeadlineExceeded), "context deadline exceeded"},
		{&Answer{What: "x", Status: 500, Type: ContentType(http.Header{"Content-Type": {canary}}), Length: 7}, "x: status 500, another content type, 7 bytes"},
	} {
		got := Of(c.err).Error()
		if c.want == "an error of the type *fmt.fmtError" {
			c.want = fmt.Sprintf("an error of the type %T", c.err)
		}
		if got != c.want || strings.Contains(got, canary) {
			t.Errorf("Of(%v) = %q, want %q", c.err, got, c.want)
		}
	}
	if Of(nil) != nil || Own(nil) != nil {
		t.Error("nil became an error")
	}
	if !errors.Is(Of(fmt.Errorf("x: %w", context.Canceled)), context.Canceled) {
		t.Error("the end of a context is not seen any more")
	}
	if got := Panic(canary); got != "a value of the type string" {
		t.Errorf("Panic = %q", got)
	}
}
