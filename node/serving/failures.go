package serving

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/dsnode/dsnode/node/upstream"
)

// consequences are what each result means for the request. What it means for the
// server is the fleet's matter.
var consequences = [upstream.Results]struct {
	next bool  // another server may do better, if nothing was sent yet
	err  error // what the client's error wraps when this was the last attempt
}{
	upstream.OK:                   {false, nil},
	upstream.Cancelled:            {false, nil},
	upstream.ClientError:          {false, nil},
	upstream.NotServed:            {true, ErrUpstreamFailed},
	upstream.RateLimited:          {true, ErrOverloaded},
	upstream.Credentials:          {true, ErrNoUpstream},
	upstream.ServerFailed:         {true, ErrUpstreamFailed},
	upstream.Refused:              {true, ErrNoUpstream},
	upstream.Reset:                {true, ErrUpstreamFailed},
	upstream.BadAnswer:            {true, ErrUpstreamFailed},
	upstream.ErrorEvent:           {true, ErrUpstreamFailed},
	upstream.Truncated:            {true, ErrTruncated},
	upstream.Exhausted:            {true, ErrUpstreamFailed},
	upstream.ConnectTimeout:       {true, ErrTimeout},
	upstream.FirstTokenTimeout:    {true, ErrTimeout},
	upstream.BetweenTokensTimeout: {true, ErrTimeout},
	upstream.TotalTimeout:         {false, ErrTimeout}, // no time is left for another
	upstream.TooSlow:              {true, ErrTimeout},
	upstream.PeerBusy:             {true, ErrNoUpstream},
	upstream.PeerGone:             {true, ErrNoUpstream},
}

// outcome is what one attempt came to.
type outcome struct {
	upstream.Outcome              // Err is the cause, without a sentinel
	sent             bool         // Head reached the sink: no other server may answer now
	status           *StatusError // a refusal that the client may see
	attempts         int          // upstream attempts that a peer made
	overloaded       bool         // a peer has upstreams, but all are full
}

// failed is an outcome without more to tell.
func failed(r upstream.Result, err error) outcome {
	return outcome{Outcome: upstream.Outcome{Result: r, Err: err}}
}

// failures are those that a request has met so far.
type failures struct {
	status *StatusError
	last   error
	free   bool // the last one needs no budget
	busy   bool // some server asked to come later
	wait   time.Duration
	peer   bool // some peer was busy
}

func (f *failures) add(a *attempt, o *outcome) {
	// No retry is counted for what costs a server nothing: its breaker is open, or it
	// said that another one should answer.
	f.free = o.Result.Harmless() || a.permit.Broken()
	switch o.Result {
	case upstream.RateLimited:
		f.busy = true
		f.waitFor(cmp.Or(o.RetryAfter, upstream.DefaultPause))
	case upstream.NotServed:
		f.status = o.status
	case upstream.PeerBusy:
		f.peer = true
		f.busy = f.busy || o.overloaded
		f.waitFor(cmp.Or(o.RetryAfter, upstream.DefaultPause))
	default:
		f.last = fmt.Errorf("%w: %s: %w", consequences[o.Result].err, a.permit.Upstream, o.Err)
	}
}

func (f *failures) waitFor(d time.Duration) {
	if f.wait == 0 || d < f.wait {
		f.wait = d
	}
}

// err is the client's error when no server is left to ask. "Come again" comes before
// "broken", and that before one server's "not here".
func (f *failures) err(search *upstream.Search, attempts int) error {
	full, wait := search.Refused()
	nobody := f.last == nil && f.status == nil && !f.peer
	switch {
	case f.busy:
		return &BusyError{Err: ErrOverloaded, RetryAfter: f.wait, Attempts: attempts}
	case full:
		return &BusyError{Err: ErrOverloaded, RetryAfter: wait, Attempts: attempts}
	case nobody:
		return &BusyError{Err: ErrNoUpstream, RetryAfter: wait, Attempts: attempts}
	case f.last != nil:
		return f.last
	case f.status != nil:
		return f.status
	}
	return &BusyError{Err: ErrNoUpstream, RetryAfter: cmp.Or(f.wait, time.Second), Attempts: attempts}
}

// finalError is the error of an attempt after which no other server is asked. The
// gateway explains and logs it.
func (a *attempt) finalError(o *outcome) error {
	switch {
	case o.Result == upstream.Cancelled:
		return o.Err
	case o.status != nil && !o.sent:
		return o.status
	}
	err := consequences[o.Result].err
	if o.sent && !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrTimeout) {
		err = ErrUpstreamFailed
	}
	return fmt.Errorf("%w: %s: %w", err, a.permit.Upstream, o.Err)
}

func (a *attempt) logAttrs(o *outcome) []slog.Attr {
	attrs := []slog.Attr{
		slog.String("request", a.r.ID), slog.String("model", a.permit.Model.Name), slog.String("upstream", a.permit.Upstream),
		slog.String("result", o.Result.String()), slog.Any("err", o.Err),
	}
	if a.permit.Peer != "" {
		attrs = append(attrs, slog.String("peer", a.permit.Peer))
	}
	if a.permit.Instance != "" {
		attrs = append(attrs, slog.String("instance", a.permit.Instance))
	}
	return attrs
}
