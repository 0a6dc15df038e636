package agreed

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// ErrUnknownUpstream means that the configuration has no such upstream.
var ErrUnknownUpstream = errors.New("no such upstream")

// DrainedUpstream is a model server that gets no new requests because an operator
// drained it.
type DrainedUpstream struct {
	By string    `json:"by"`
	At time.Time `json:"at"`
}

// UpstreamDrain drains or resumes an upstream. It is idempotent: repeating it is
// not an error.
type UpstreamDrain struct {
	Name    string `json:"name"`
	Drained bool   `json:"drained"`
	By      string `json:"by"`
	// Configured are the upstreams in version Expect of the configuration. The
	// proposer lists them because Apply does not parse the configuration.
	Configured []string `json:"configured"`
	Expect     uint64   `json:"expect"`
}

// drainUpstream also drops entries of upstreams that are no longer configured,
// which bounds the map.
func (s *State) drainUpstream(d UpstreamDrain, at time.Time) error {
	if d.Expect != s.Config.Version {
		return fmt.Errorf("%w: it is at version %d, not %d", ErrVersionConflict, s.Config.Version, d.Expect)
	}
	if len(d.Configured) > config.MaxUpstreams {
		return fmt.Errorf("%w: %d upstreams", ErrStateFull, len(d.Configured))
	}
	if !slices.Contains(d.Configured, d.Name) {
		return fmt.Errorf("%w: %s", ErrUnknownUpstream, d.Name)
	}
	next := make(map[string]DrainedUpstream, len(s.Drained)+1)
	for _, name := range d.Configured {
		if was, drained := s.Drained[name]; drained {
			next[name] = was
		}
	}
	_, already := next[d.Name]
	switch {
	case !d.Drained:
		delete(next, d.Name)
	case !already:
		next[d.Name] = DrainedUpstream{By: d.By, At: at}
	}
	if maps.Equal(next, s.Drained) {
		return nil
	}
	s.Drained = next
	return nil
}
