package cache

import (
	"fmt"
	"time"

	"github.com/maypok86/otter/v2"
)

// local is the tier in memory. Reads take no lock. At the bound, answers that are
// rarely asked for are evicted.
type local struct {
	held *otter.Cache[Key, *resident]
}

// resident is an answer in memory.
type resident struct {
	answer *Answer
	model  string
	// arrived is when the answer came into memory, from an upstream or the shared
	// tier. After Life.Local the shared tier is asked again.
	arrived time.Time
}

func newLocal(bytes int64) (*local, error) {
	held, err := otter.New(&otter.Options[Key, *resident]{
		MaximumWeight: uint64(bytes), //nolint:gosec // checked by the configuration
		Weigher: func(_ Key, r *resident) uint32 {
			return uint32(r.answer.weight()) //nolint:gosec // an answer has 16 MiB at most
		},
	})
	if err != nil {
		return nil, fmt.Errorf("make the local tier: %w", err)
	}
	return &local{held: held}, nil
}

func (l *local) get(k Key) (*resident, bool) { return l.held.GetIfPresent(k) }

func (l *local) put(k Key, model string, a *Answer, now time.Time) {
	l.held.Set(k, &resident{answer: a, model: model, arrived: now})
}

func (l *local) drop(k Key) { l.held.Invalidate(k) }

// sweep drops useless answers. Without it they would take memory until other answers
// need it.
func (l *local) sweep(useless func(Key, *resident) bool) {
	for k, r := range l.held.All() {
		if useless(k, r) {
			l.held.Invalidate(k)
		}
	}
	l.held.CleanUp()
}

func (l *local) resize(bytes int64) {
	l.held.SetMaximum(uint64(bytes)) //nolint:gosec // checked by the configuration
}

func (l *local) size() (entries int, bytes int64) {
	return l.held.EstimatedSize(), int64(l.held.WeightedSize()) //nolint:gosec // bounded
}
