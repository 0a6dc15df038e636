package replication

import (
	"context"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// trimEvery is how often journals are checked for records to trim.
const trimEvery = 5 * time.Second

// trimAll trims records that the own table has applied and every member holds and, over
// the byte budget, records that only the own table has applied. It runs until ctx ends.
func (r *Replication) trimAll(ctx context.Context) error {
	for pause(ctx, trimEvery) {
		r.trim()
	}
	return nil
}

func (r *Replication) trim() {
	log := r.opts.Logger
	// No other node has the rows of a node without peers: to rebuild a damaged table, its
	// journals are kept within their budget.
	alone := len(r.opts.Members()) < 2
	for s, e := range r.opts.Log.Ends() {
		applied := r.opts.Table.Applied(s)
		if r.opts.Retired(s) && !e.Own && applied >= e.Durable {
			if err := r.opts.Log.Drop(s); err != nil {
				log.Error("can't drop a retired stream", "stream", s.String(), "err", err)
				continue
			}
			log.Info("retired stream dropped", "stream", s.String(), "records", e.Durable)
			continue
		}
		if through := min(applied, r.tracker.heldByAll(s)); through >= e.First && !alone {
			if err := r.opts.Log.Trim(s, through+1); err != nil {
				log.Error("can't trim a stream", "stream", s.String(), "err", err)
			}
		}
	}
	r.tracker.forget(func(s journal.Stream) bool { _, held := r.opts.Log.End(s); return held })
	trimmed, err := r.opts.Log.Shrink(r.opts.Table.Applied)
	if err != nil {
		log.Error("can't bring the journals back within their budget", "err", err)
	}
	for s, first := range trimmed {
		if first-1 > r.tracker.heldByAll(s) {
			log.Warn("trimmed records that a node has not received (journal over budget); it will get a table snapshot", "stream", s.String(), "begins_with", first)
		}
	}
}
