package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// This file has the API of switchovers, drills and recovery, for server and client.

// Failovers are the operations on the primary.
type Failovers interface {
	// PlanFailover runs the checks of a switchover and changes nothing.
	PlanFailover(ctx context.Context, r FailoverRequest, by string) (FailoverPlan, error)
	// Failover moves the primary, or changes nothing; failover.ErrPrecheck,
	// ErrRolledBack, ErrOvertaken, ErrUnknownOutcome and ErrNotActing say how it failed.
	Failover(ctx context.Context, r FailoverRequest, by string) (FailoverResult, error)
	// AckFailover records that an operator has seen the last failover.
	AckFailover(ctx context.Context, by string) error
	// HoldFailover pauses automatic failovers, ResumeFailover ends the pause.
	HoldFailover(ctx context.Context, reason, by string) error
	ResumeFailover(ctx context.Context, by string) error
	// ReleaseQuarantine ends a quarantine: an operator confirms that the cluster was not
	// recovered elsewhere. ErrWrongNode unless the node is the Raft leader.
	ReleaseQuarantine(ctx context.Context) error
}

// Drills are the operations on drills.
type Drills interface {
	PlanDrill(ctx context.Context, r DrillRequest, by string) (DrillPlan, error)
	// StartDrill begins a drill, which runs in the node that was asked. ErrWrongNode
	// if that node is in the site that would be cut off.
	StartDrill(ctx context.Context, r DrillRequest, by string) (Drill, error)
	// Drills lists the newest drills, oldest first, without their reports.
	Drills(ctx context.Context) ([]Drill, error)
	Drill(ctx context.Context, id string) (Drill, error)
	AbortDrill(ctx context.Context, id, by string) error
}

func (s *Server) getFailoverPlan(ctx context.Context, c call) (any, error) {
	r := FailoverRequest{To: c.query.Get("to"), Waive: names(c.query.Get("waive"))}
	var err error
	if r.AcceptLoss, err = c.flag("accept_loss"); err != nil {
		return nil, err
	}
	if r.To == "" {
		return nil, fmt.Errorf("%w: give the new primary (?to=SITE)", ErrInvalidRequest)
	}
	return s.cluster.PlanFailover(ctx, r, c.author)
}

func (s *Server) postFailover(ctx context.Context, c call) (any, error) {
	var r FailoverRequest
	if err := c.decode(&r, "a switchover"); err != nil {
		return nil, err
	}
	if r.To == "" {
		return nil, fmt.Errorf("%w: give the site that becomes the primary, as \"to\"", ErrInvalidRequest)
	}
	return s.cluster.Failover(ctx, r, c.author)
}

func (s *Server) postFailoverAck(ctx context.Context, c call) (any, error) {
	return nil, s.cluster.AckFailover(ctx, c.author)
}

func (s *Server) postFailoverHold(ctx context.Context, c call) (any, error) {
	reason, err := readAuthor(c.query.Get("reason"))
	if err != nil {
		return nil, fmt.Errorf("%w: the reason must be one line of at most %d bytes", ErrInvalidRequest, maxAuthor)
	}
	if !c.query.Has("reason") {
		reason = ""
	}
	return nil, s.cluster.HoldFailover(ctx, reason, c.author)
}

func (s *Server) postFailoverResume(ctx context.Context, c call) (any, error) {
	return nil, s.cluster.ResumeFailover(ctx, c.author)
}

func (s *Server) postRelease(ctx context.Context, _ call) (any, error) {
	return nil, s.cluster.ReleaseQuarantine(ctx)
}

func (s *Server) getDrillPlan(ctx context.Context, c call) (any, error) {
	r := DrillRequest{
		Kind: c.query.Get("kind"), Site: c.query.Get("site"), Waive: names(c.query.Get("waive")), ProbeModel: c.query.Get("probe_model"),
	}
	var err error
	if r.Return, err = c.flag("return"); err != nil {
		return nil, err
	}
	if text := c.query.Get("for_seconds"); text != "" {
		if r.ForSeconds, err = strconv.ParseFloat(text, 64); err != nil {
			return nil, fmt.Errorf("%w: for_seconds must be a number, not %s", ErrInvalidRequest, quote(text))
		}
	}
	return s.cluster.PlanDrill(ctx, r, c.author)
}

func (s *Server) postDrill(ctx context.Context, c call) (any, error) {
	var r DrillRequest
	if err := c.decode(&r, "a drill"); err != nil {
		return nil, err
	}
	return s.cluster.StartDrill(ctx, r, c.author)
}

func (s *Server) getDrill(ctx context.Context, c call) (any, error) {
	return s.cluster.Drill(ctx, c.path("id"))
}

// decode parses a body that must be exactly one JSON object of a known type.
func (c call) decode(into any, what string) error {
	d := json.NewDecoder(bytes.NewReader(c.body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%w: the body is not a valid request for %s: %w", ErrInvalidRequest, what, err)
	}
	if d.More() {
		return fmt.Errorf("%w: the body has more than the request for %s", ErrInvalidRequest, what)
	}
	return nil
}

// flag parses a boolean parameter; false when it is absent.
func (c call) flag(name string) (bool, error) {
	switch text := c.query.Get(name); text {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, fmt.Errorf("%w: %s must be true or false, not %s", ErrInvalidRequest, name, quote(text))
	}
}

// names splits a comma-separated list.
func names(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(text, ",")
}

func (c *Client) PlanFailover(ctx context.Context, r FailoverRequest, by string) (FailoverPlan, error) {
	q := c.by(by)
	q.Set("to", r.To)
	q.Set("accept_loss", strconv.FormatBool(r.AcceptLoss))
	q.Set("waive", strings.Join(r.Waive, ","))
	return ask[FailoverPlan](ctx, c, http.MethodGet, "/admin/v1/failover/plan", q, nil)
}

func (c *Client) Failover(ctx context.Context, r FailoverRequest, by string) (FailoverResult, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return FailoverResult{}, fmt.Errorf("encode the request for a switchover: %w", err)
	}
	return ask[FailoverResult](ctx, c, http.MethodPost, "/admin/v1/failover", c.by(by), body)
}

func (c *Client) AckFailover(ctx context.Context, by string) error {
	return c.do(ctx, http.MethodPost, "/admin/v1/failover/ack", c.by(by))
}

func (c *Client) HoldFailover(ctx context.Context, reason, by string) error {
	q := c.by(by)
	if reason != "" {
		q.Set("reason", reason)
	}
	return c.do(ctx, http.MethodPost, "/admin/v1/failover/hold", q)
}

func (c *Client) ResumeFailover(ctx context.Context, by string) error {
	return c.do(ctx, http.MethodPost, "/admin/v1/failover/resume", c.by(by))
}

// ReleaseQuarantine implements Failovers. It tries the URLs until one is the leader's.
func (c *Client) ReleaseQuarantine(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/admin/v1/recover/release", c.by(""))
}

func (c *Client) PlanDrill(ctx context.Context, r DrillRequest, by string) (DrillPlan, error) {
	q := c.by(by)
	q.Set("kind", r.Kind)
	q.Set("site", r.Site)
	q.Set("for_seconds", strconv.FormatFloat(r.ForSeconds, 'f', -1, 64))
	q.Set("return", strconv.FormatBool(r.Return))
	q.Set("waive", strings.Join(r.Waive, ","))
	q.Set("probe_model", r.ProbeModel)
	return ask[DrillPlan](ctx, c, http.MethodGet, "/admin/v1/drills/plan", q, nil)
}

// StartDrill implements Drills. It tries the URLs until one is of a node that can run
// the drill. From then on that URL is tried first, because that node has the report.
func (c *Client) StartDrill(ctx context.Context, r DrillRequest, by string) (Drill, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return Drill{}, fmt.Errorf("encode the request for a drill: %w", err)
	}
	d, at, err := askFrom[Drill](ctx, c, http.MethodPost, "/admin/v1/drills", c.by(by), body)
	if err == nil {
		c.first.Store(int32(at)) //nolint:gosec // there are few URLs
	}
	return d, err
}

func (c *Client) Drills(ctx context.Context) ([]Drill, error) {
	l, err := ask[list[Drill]](ctx, c, http.MethodGet, "/admin/v1/drills", nil, nil)
	return l.Data, err
}

func (c *Client) Drill(ctx context.Context, id string) (Drill, error) {
	return ask[Drill](ctx, c, http.MethodGet, "/admin/v1/drills/"+url.PathEscape(id), nil, nil)
}

// AbortDrill implements Drills. It tells all URLs, because a site that is cut off gets no
// message from other nodes. One success is enough.
func (c *Client) AbortDrill(ctx context.Context, id, by string) error {
	var errs []error
	done := false
	for _, u := range c.urls {
		one := &Client{urls: []*url.URL{u}, token: c.token, author: c.author, timeout: c.timeout, http: c.http}
		err := one.do(ctx, http.MethodPost, "/admin/v1/drills/"+url.PathEscape(id)+"/abort", c.by(by))
		done = done || err == nil
		errs = append(errs, err)
	}
	if done {
		return nil
	}
	var refused *Error
	if errors.As(errors.Join(errs...), &refused) {
		return refused
	}
	return errors.Join(errs...)
}
