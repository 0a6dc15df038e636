package replication

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// This file has what the loss of a site would lose: what another site's copy lacks of its
// journals, as last heard (CopyOf), and as the nodes say now (EndsOf, Lacking).

// lackingTimeout bounds the wait for the answers of a site's nodes, one of which may hang.
const lackingTimeout = 500 * time.Millisecond

// SiteCopy is how complete a site's copy of another site's journals is, as this node last
// heard.
type SiteCopy struct {
	// Known: a node of the site has told the age of its copy. Without that, nothing below is
	// known.
	Known bool
	// Age: the copy has all that the other site had on its disks this long ago.
	Age time.Duration
	// Lately: a node of the site told the age within the last seconds.
	Lately bool
	// Records are those that some node is known to have and no node of the site, by origin.
	// Origins without any are absent.
	Records map[string]int64
}

// CopyOf returns what a site lacks of the streams for which of is true, most of them of
// another site. ends are further ends of streams that are known to this node.
func (r *Replication) CopyOf(site, otherSite string, of func(journal.Stream) bool, ends map[journal.Stream]uint64) SiteCopy {
	members := r.opts.Members()
	var holders []string
	for _, m := range members {
		if m.Site == site {
			holders = append(holders, m.Node)
		}
	}
	var c SiteCopy
	c.Age, c.Lately, c.Known = r.siteAge(members, holders, otherSite)
	if !c.Known {
		return SiteCopy{}
	}
	lacking := r.tracker.lacking(of, holders, ends)
	maps.DeleteFunc(lacking, func(s journal.Stream, _ uint64) bool { return r.opts.Retired(s) })
	c.Records = byOrigin(lacking)
	return c
}

// EndsKnown reports whether the ends of a node's streams were reported within the last seconds.
// Those of this node are always known.
func (r *Replication) EndsKnown(node string) bool {
	return node == r.opts.Self || r.fresh.endsKnown([]string{node})
}

// EndsOf asks nodes, of which this one may be one, up to where they hold now the streams for
// which of is true. It needs the answers of all.
func (r *Replication) EndsOf(ctx context.Context, nodes []string, of func(journal.Stream) bool) (map[journal.Stream]uint64, error) {
	held, errs := r.holdsOf(ctx, nodes)
	ends := map[journal.Stream]uint64{}
	for _, node := range nodes {
		if err := errs[node]; err != nil {
			return nil, err
		}
		for s, seq := range held[node] {
			if of(s) {
				ends[s] = max(ends[s], seq)
			}
		}
	}
	return ends, nil
}

// Lacking asks the nodes of a site what they hold now, and returns how many of the records
// up to these ends none of them has, by origin. It needs the answer of one, and does not wait
// long for the others. Retired streams don't count.
func (r *Replication) Lacking(ctx context.Context, site string, ends map[journal.Stream]uint64) (map[string]int64, error) {
	var nodes []string
	for _, m := range r.opts.Members() {
		if m.Site == site && m.Heard {
			nodes = append(nodes, m.Node)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, lackingTimeout)
	defer cancel()
	held, errs := r.holdsOf(ctx, nodes)
	if len(held) == 0 {
		for _, err := range errs {
			return nil, err
		}
		return nil, fmt.Errorf("no node of %s is heard", site)
	}
	lacking := maps.Clone(ends)
	for s, seq := range ends {
		most := uint64(0)
		for _, h := range held {
			most = max(most, h[s])
		}
		if lacking[s] = seq - min(seq, most); lacking[s] == 0 || r.opts.Retired(s) {
			delete(lacking, s)
		}
	}
	return byOrigin(lacking), nil
}

// holdsOf asks nodes at the same time what they hold.
func (r *Replication) holdsOf(ctx context.Context, nodes []string) (held map[string]map[journal.Stream]uint64, errs map[string]error) {
	held, errs = map[string]map[journal.Stream]uint64{}, map[string]error{}
	var mu sync.Mutex // guards both
	var wg sync.WaitGroup
	for _, node := range nodes {
		wg.Go(func() {
			var got standing
			var err error
			if node == r.opts.Self {
				got.held = durable(r.opts.Log.Ends())
			} else {
				got, err = r.standing(ctx, node)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs[node] = err
				return
			}
			held[node] = got.held
		})
	}
	wg.Wait()
	return held, errs
}

func byOrigin(records map[journal.Stream]uint64) map[string]int64 {
	out := map[string]int64{}
	for s, n := range records {
		out[s.Origin] += int64(n) //nolint:gosec // a count of records
	}
	return out
}

// lacking returns how many records of the streams for which of is true are known to exist,
// at some node or by ends, and are at none of the holders. of must not block.
func (l *tracker) lacking(of func(journal.Stream) bool, holders []string, ends map[journal.Stream]uint64) map[journal.Stream]uint64 {
	most := map[journal.Stream]uint64{}
	for s, seq := range ends {
		if of(s) {
			most[s] = seq
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.marks {
		for s, seq := range h.Ends {
			if seq > most[s] && of(s) {
				most[s] = seq
			}
		}
	}
	out := map[journal.Stream]uint64{}
	for s, seq := range most {
		have := uint64(0)
		for _, holder := range holders {
			have = max(have, l.marks[holder].Ends[s])
		}
		if seq > have {
			out[s] = seq - have
		}
	}
	return out
}
