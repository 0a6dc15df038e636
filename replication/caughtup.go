package replication

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

const (
	holdsTimeout = 2 * time.Second
	holdsAgain   = 250 * time.Millisecond
)

// AwaitCaughtUp asks every living node what it holds, and blocks until this node holds as
// much, of all streams: an earlier owner of a stream has written records about its jobs to
// other streams. It does not wait for nodes that are no longer heard. A table that is being
// rebuilt must be whole first. The error is that of ctx.
func (r *Replication) AwaitCaughtUp(ctx context.Context) error {
	_, err := r.awaitReported(ctx)
	return err
}

// AwaitEnded blocks like AwaitCaughtUp. Then ended tells of which streams this node holds
// all that their origin will ever write to them: the origin was asked, and no longer writes
// them. It is false for streams of origins that are not heard.
func (r *Replication) AwaitEnded(ctx context.Context) (ended func(journal.Stream) bool, err error) {
	reported, err := r.awaitReported(ctx)
	if err != nil {
		return nil, err
	}
	return func(s journal.Stream) bool {
		of, asked := reported[s.Origin]
		return asked && of.saysWrites && !of.writes[s]
	}, nil
}

func (r *Replication) awaitReported(ctx context.Context) (map[string]standing, error) {
	reported := map[string]standing{}
	for {
		changed := r.tracker.changed.Next()
		_, living := r.members(func(m Member) bool { return m.Heard })
		r.askHolders(ctx, living, reported)
		if r.caughtUp(living, reported) && !r.opts.Table.Partial() {
			return reported, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("catch up with other nodes: %w", ctx.Err())
		case <-changed:
		case <-time.After(holdsAgain):
		}
	}
}

// NotFollowed are the living nodes whose journals this node has not followed to their end since
// its start.
func (r *Replication) NotFollowed() []string {
	var nodes []string
	for _, m := range r.opts.Members() {
		if m.Heard && m.Node != r.opts.Self {
			nodes = append(nodes, m.Node)
		}
	}
	return r.fresh.lacking(nodes)
}

// caughtUp reports whether all living nodes have reported what they hold, and this node
// holds it too.
func (r *Replication) caughtUp(living []Member, reported map[string]standing) bool {
	own := r.opts.Log.Ends()
	for _, m := range living {
		if m.Node == r.opts.Self {
			continue
		}
		if st, asked := reported[m.Node]; !asked || !r.holdsAll(own, st.held) {
			return false
		}
	}
	return true
}

// askHolders asks the living nodes that have not answered yet.
func (r *Replication) askHolders(ctx context.Context, living []Member, reported map[string]standing) {
	var ask []string
	for _, m := range living {
		if _, asked := reported[m.Node]; !asked && m.Node != r.opts.Self {
			ask = append(ask, m.Node)
		}
	}
	maps.Copy(reported, r.askStandings(ctx, ask))
}
