package admin

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
)

// call is a request with its body and its checked parameters.
type call struct {
	path   func(name string) string // a wildcard of the route
	query  url.Values               // only parameters that the route knows
	author string
	body   []byte
}

// handler returns the value to be sent as JSON; nil is 204.
type handler func(context.Context, call) (any, error)

func (s *Server) getStatus(ctx context.Context, _ call) (any, error) {
	status, err := s.cluster.Status(ctx)
	if status.Reasons == nil {
		status.Reasons = []string{} // none, as opposed to unknown
	}
	return status, err
}

func (s *Server) getUpstreams(ctx context.Context, _ call) (any, error) {
	return listOf(s.cluster.Upstreams(ctx))
}

func (s *Server) postUpstreamDrain(ctx context.Context, c call) (any, error) {
	return nil, s.cluster.DrainUpstream(ctx, c.path("name"), c.author)
}

func (s *Server) postUpstreamResume(ctx context.Context, c call) (any, error) {
	return nil, s.cluster.ResumeUpstream(ctx, c.path("name"), c.author)
}

func (s *Server) postBootstrap(ctx context.Context, c call) (any, error) {
	if err := s.cluster.Bootstrap(ctx, c.body, c.author); err != nil {
		return nil, err
	}
	return s.cluster.Config(ctx)
}

func (s *Server) getConfig(ctx context.Context, _ call) (any, error) {
	return s.cluster.Config(ctx)
}

func (s *Server) getHistory(ctx context.Context, _ call) (any, error) {
	return listOf(s.cluster.ConfigHistory(ctx))
}

func (s *Server) putConfig(ctx context.Context, c call) (any, error) {
	expect, err := c.number("expect_version")
	if err != nil {
		return nil, err
	}
	return s.cluster.ApplyConfig(ctx, c.body, expect, c.author)
}

func (s *Server) postRollback(ctx context.Context, c call) (any, error) {
	to, err := c.number("to")
	if err != nil {
		return nil, err
	}
	if to == nil {
		return nil, fmt.Errorf("%w: give the version to roll back to (?to=N)", ErrInvalidRequest)
	}
	expect, err := c.number("expect_version")
	if err != nil {
		return nil, err
	}
	return s.cluster.RollbackConfig(ctx, *to, expect, c.author)
}

func (s *Server) getAPIKeys(ctx context.Context, _ call) (any, error) {
	return listOf(s.cluster.APIKeys(ctx))
}

func (s *Server) postAPIKey(ctx context.Context, c call) (any, error) {
	var req APIKeyRequest
	if err := c.decode(&req, "a key"); err != nil {
		return nil, err
	}
	return s.cluster.CreateAPIKey(ctx, req)
}

func (s *Server) deleteAPIKey(ctx context.Context, c call) (any, error) {
	return nil, s.cluster.RevokeAPIKey(ctx, c.path("id"))
}

func (s *Server) deleteNode(ctx context.Context, c call) (any, error) {
	return nil, s.cluster.RemoveNode(ctx, c.path("name"))
}

func (s *Server) postDrain(ctx context.Context, c call) (any, error) {
	return nil, s.cluster.DrainNode(ctx, c.path("name"))
}

func (s *Server) postResume(ctx context.Context, c call) (any, error) {
	return nil, s.cluster.ResumeNode(ctx, c.path("name"))
}

// number parses a parameter; nil when it is absent.
func (c call) number(name string) (*uint64, error) {
	if !c.query.Has(name) {
		return nil, nil //nolint:nilnil // absent is a valid answer
	}
	n, err := strconv.ParseUint(c.query.Get(name), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("%w: %s must be a whole number, not %s", ErrInvalidRequest, name, quote(c.query.Get(name)))
	}
	return &n, nil
}

// list is the body of an answer with several items. It is an object so that fields can
// be added without breaking clients.
type list[T any] struct {
	Data []T `json:"data"`
}

func listOf[T any](items []T, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	if items == nil {
		items = []T{}
	}
	return list[T]{Data: items}, nil
}
