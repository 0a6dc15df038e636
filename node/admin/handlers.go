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
	if status.Warnings == nil {
		status.Warnings = []string{}
	}
	return status, err
}

// value is the handler of a value that needs no parameters.
func value[T any](read func(context.Context) (T, error)) handler {
	return func(ctx context.Context, _ call) (any, error) { return read(ctx) }
}

// named is the handler of a change to what the route's wildcard names.
func named(wildcard string, change func(ctx context.Context, name string) error) handler {
	return func(ctx context.Context, c call) (any, error) { return nil, change(ctx, c.path(wildcard)) }
}

// namedBy is named for a change that records its author.
func namedBy(wildcard string, change func(ctx context.Context, name, author string) error) handler {
	return func(ctx context.Context, c call) (any, error) { return nil, change(ctx, c.path(wildcard), c.author) }
}

func (s *Server) postBootstrap(ctx context.Context, c call) (any, error) {
	if err := s.cluster.Bootstrap(ctx, c.body, c.author); err != nil {
		return nil, err
	}
	return s.cluster.Config(ctx)
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

func (s *Server) postAPIKey(ctx context.Context, c call) (any, error) {
	var req APIKeyRequest
	if err := c.decode(&req, "a key"); err != nil {
		return nil, err
	}
	return s.cluster.CreateAPIKey(ctx, req)
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

// items is the handler of a list that needs no parameters.
func items[T any](read func(context.Context) ([]T, error)) handler {
	return func(ctx context.Context, _ call) (any, error) {
		data, err := read(ctx)
		if data == nil {
			data = []T{}
		}
		return list[T]{Data: data}, err
	}
}
