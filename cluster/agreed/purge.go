package agreed

import (
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// Bounds of CachePurges.
const (
	maxPurgedModels = config.MaxModels
	maxPurgedKeys   = 1024
	maxPurgeKey     = 128
)

// ErrBadPurge means that a purge names none or several of its alternatives.
var ErrBadPurge = errors.New("a purge must be of everything, of one model or of one key")

// CachePurges says which cached answers must no longer be used. Each answer has
// the Count from before its upstream was asked, so a purge covers all copies of
// an answer, also on sites that learn of it later, and needs no clock.
type CachePurges struct {
	// Count rises by one with each purge.
	Count uint64 `json:"count,omitempty"`
	// All, Models and Keys have the Count of the newest purge of everything, of a
	// model and of a key.
	All    uint64              `json:"all,omitempty"`
	Models map[string]uint64   `json:"models,omitempty"`
	Keys   map[string]KeyPurge `json:"keys,omitempty"`
}

// KeyPurge is the purge of one answer. It is dropped after Until, when no node can
// still have that answer.
type KeyPurge struct {
	Count uint64    `json:"count"`
	Until time.Time `json:"until"`
}

// Least is the lowest Count with which an answer of a model may be used. The
// function key is called only if some key was purged.
func (p *CachePurges) Least(model string, key func() string) uint64 {
	least := p.All
	if len(p.Models) > 0 {
		least = max(least, p.Models[model])
	}
	if len(p.Keys) > 0 {
		least = max(least, p.Keys[key()].Count)
	}
	return least
}

// CachePurge invalidates cached answers: all of them, those of a model, or one.
type CachePurge struct {
	All   bool   `json:"all,omitempty"`
	Model string `json:"model,omitempty"`
	Key   string `json:"key,omitempty"`
	// Until is when every answer from before this purge has expired, by the
	// proposer's configuration.
	Until time.Time `json:"until"`
	By    string    `json:"by,omitempty"`
}

func (s *State) purgeCache(d CachePurge, at time.Time) error {
	named := 0
	for _, is := range []bool{d.All, d.Model != "", d.Key != ""} {
		if is {
			named++
		}
	}
	if named != 1 || len(d.Key) > maxPurgeKey || len(d.Model) > 256 {
		return ErrBadPurge
	}
	p := s.Purges
	p.Count++
	if d.All {
		// It covers all earlier purges.
		s.Purges = CachePurges{Count: p.Count, All: p.Count}
		return nil
	}
	if d.Model != "" {
		p.Models = maps.Clone(p.Models)
		if p.Models == nil {
			p.Models = map[string]uint64{}
		}
		p.Models[d.Model] = p.Count
		if len(p.Models) > maxPurgedModels {
			return fmt.Errorf("%w: %d purged models; purge everything instead", ErrStateFull, maxPurgedModels)
		}
		s.Purges = p
		return nil
	}
	keys := make(map[string]KeyPurge, len(p.Keys)+1)
	for k, was := range p.Keys {
		if at.Before(was.Until) {
			keys[k] = was
		}
	}
	keys[d.Key] = KeyPurge{Count: p.Count, Until: d.Until}
	if len(keys) > maxPurgedKeys {
		return fmt.Errorf("%w: %d purged keys; purge their model instead", ErrStateFull, maxPurgedKeys)
	}
	p.Keys = keys
	s.Purges = p
	return nil
}
