package gateway

import (
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"github.com/dsnode/dsnode/node/ports"
)

const (
	// firstRead bounds the memory for a body before any of it has come: a
	// Content-Length alone reserves no more.
	firstRead = 64 << 10
	// smallBody is the largest body that may use the last eighth of the memory for bodies.
	smallBody = 1 << 20
	// slack lets the last Read of a body of known length see its end.
	slack = 1
	// drainTime bounds how long the rest of a body that is too large is read and
	// dropped, so that the client gets to read the refusal.
	drainTime = 2 * time.Second
)

// readBody reads the whole body before anything is forwarded: writing an answer closes
// the inbound body, which a transport may still read (golang/go#40747). The slice comes
// from no pool: a transport may still read it after the request has failed.
//
// Its memory is counted in Gateway.held until release.
func (x *exchange) readBody(limit int64) ([]byte, *failure) {
	r := x.r
	for _, e := range r.Header["Content-Encoding"] { // each line, and all of it, counts
		if e = strings.TrimSpace(e); e != "" && !strings.EqualFold(e, "identity") {
			return nil, encodedBody(e)
		}
	}
	if r.ContentLength > limit {
		x.drain(limit)
		return nil, tooLarge(limit)
	}
	size := int64(4 << 10)
	if r.ContentLength >= 0 {
		size = min(r.ContentLength, firstRead) + slack
	}
	if !x.hold(size, limit) {
		return nil, x.noMemory()
	}
	body := make([]byte, 0, size)
	// Gateway.serve has set the deadline. After a failure it stays, for the rest of the
	// body, which net/http reads.
	for {
		if len(body) > 0 {
			// The time allowed grows with what has come, so one byte a second is too slow.
			allowed := x.g.o.BodyGrace + time.Duration(len(body))*time.Second/time.Duration(x.g.o.BodyRate)
			_ = x.rc.SetReadDeadline(x.start.Add(allowed))
		}
		n, err := r.Body.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		ports.Arrived(r.Context(), n)
		switch {
		case int64(len(body)) > limit:
			x.drain(limit)
			return nil, tooLarge(limit)
		case errors.Is(err, io.EOF):
			if len(body) > smallBody && !x.hold(int64(len(body)), limit) { // the upstream gets a copy, with its own name of the model
				return nil, x.noMemory()
			}
			_ = x.rc.SetReadDeadline(time.Time{}) // else it would end the wait for the answer
			ports.Received(r.Context())
			return body, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, slowBody(len(body))
		case err != nil:
			return nil, brokenBody()
		}
		if len(body) == cap(body) {
			size := min(int64(cap(body))*2, limit+slack)
			if r.ContentLength >= 0 {
				size = min(size, r.ContentLength+slack)
				if len(body) > smallBody {
					size = r.ContentLength + slack // every step on the way would be garbage
				}
			}
			if !x.hold(size-int64(cap(body)), limit) {
				return nil, x.noMemory()
			}
			bigger := make([]byte, len(body), size)
			copy(bigger, body)
			body = bigger
		}
	}
}

// hold reserves n bytes of the memory for bodies, and of the tenant's share of it. It is
// false when there is no more. Large bodies leave an eighth to small ones, so that a few
// uploads don't stop all requests. One of the largest size always fits, with its copy.
func (x *exchange) hold(n, limit int64) bool {
	if !x.holdOfShare(n) {
		return false
	}
	bound := max(x.g.o.BodyMemory, 2*(limit+slack)*8/7+1)
	if x.held+n > smallBody+slack {
		bound -= bound / 8
	}
	if x.g.held.Add(n) > bound {
		x.g.held.Add(-n)
		x.giveOfShare(n)
		return false
	}
	x.held += n
	return true
}

func (x *exchange) release() {
	x.g.held.Add(-x.held)
	x.leaveShare()
}

// drain reads and drops the rest of a body, within bounds. A client that waits for 100
// Continue has sent nothing, and reading would ask it to.
func (x *exchange) drain(limit int64) {
	if x.r.Header.Get("Expect") != "" {
		return
	}
	_ = x.rc.SetReadDeadline(time.Now().Add(drainTime))
	_, _ = io.CopyN(io.Discard, x.r.Body, limit)
}

// shed counts a refusal for lack of capacity.
func (g *Gateway) shed(reason shedReason) *failure {
	g.metrics.shed[reason].Inc()
	return shed("The server is overloaded now. Please try again later.")
}
