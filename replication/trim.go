package replication

import (
	"context"
	"time"
)

// trimEvery is how often journals are looked through for what may go.
const trimEvery = 5 * time.Second

// trimAll lets go of what the own table has and every member holds, and beyond
// the byte budget of what the table has alone. It goes on until ctx ends.
func (r *Replication) trimAll(ctx context.Context) error {
	for pause(ctx, trimEvery) {
		r.trim()
	}
	return nil
}

func (r *Replication) trim() {
	log := r.opts.Logger
	// Nobody else has what a lone node's table holds: its journals are what a
	// damaged table is made anew from, as far as their budget goes.
	alone := len(r.opts.Members()) < 2
	for s, e := range r.opts.Log.Ends() {
		applied := r.opts.Table.Applied(s)
		if r.opts.Retired != nil && r.opts.Retired(s) && !e.Own && applied >= e.Durable {
			if err := r.opts.Log.Drop(s); err != nil {
				log.Error("a retired stream is not dropped", "stream", s.String(), "err", err)
				continue
			}
			log.Info("retired stream dropped", "stream", s.String(), "records", e.Durable)
			continue
		}
		if through := min(applied, r.ledger.heldByAll(s)); through >= e.First && !alone {
			if err := r.opts.Log.Trim(s, through+1); err != nil {
				log.Error("a stream is not trimmed", "stream", s.String(), "err", err)
			}
		}
	}
	trimmed, err := r.opts.Log.Shrink(r.opts.Table.Applied)
	if err != nil {
		log.Error("journals are not brought back within their budget", "err", err)
	}
	for s, first := range trimmed {
		if first-1 > r.ledger.heldByAll(s) {
			log.Warn("records went that some node lacks, because the journals have no room; it will get the table instead", "stream", s.String(), "begins_with", first)
		}
	}
}
