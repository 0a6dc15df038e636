package agreed

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// ErrUnknownUpstream: no such upstream in the configuration.
var ErrUnknownUpstream = errors.New("no such upstream")

// DrainedUpstream is a model server that gets no new request, because an
// operator said so.
type DrainedUpstream struct {
	By string    `json:"by"`
	At time.Time `json:"at"`
}

// UpstreamDrain drains an upstream, or takes it back. Both are wishes about how
// it should be, so that asking again is no error.
type UpstreamDrain struct {
	Name    string `json:"name"`
	Drained bool   `json:"drained"`
	By      string `json:"by"`
	// Configured are the upstreams of the proposer's configuration, Expect its
	// version: Apply parses nothing, and an upstream that left the configuration
	// stays drained no longer than until the next drain.
	Configured []string `json:"configured"`
	Expect     uint64   `json:"expect"`
}

// drainUpstream keeps the map within the configured upstreams: what is no
// longer one of them is forgotten here.
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
