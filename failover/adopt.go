package failover

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
)

const (
	// adoptAfter is how long nobody may have heard a node before its jobs are
	// given to another: longer than a restart, so that one costs no adoption.
	adoptAfter = 10 * time.Second
	adoptEvery = 500 * time.Millisecond
	// maxAdoptions bounds the changes of one look.
	maxAdoptions = 64
)

// AdoptionReason says why a stream gets another owner.
type AdoptionReason string

// The reasons of an adoption.
const (
	AdoptNeighbour AdoptionReason = "owner_gone"    // by another node of the owner's site
	AdoptPrimary   AdoptionReason = "site_gone"     // by the primary
	AdoptRemoved   AdoptionReason = "owner_removed" // the owner is no member any more
)

// AdoptionNode is a member as the raft leader knows it.
type AdoptionNode struct {
	Name, Site string
	// Silence is for how long nobody has heard it.
	Silence time.Duration
	// Able: it holds a lease, and is neither draining nor cold.
	Able bool
}

// AdoptionView is all that Adopt looks at.
type AdoptionView struct {
	Primary string // site
	// MayReassign: this leader has waited out the leases of the one before.
	MayReassign bool
	Quarantined bool
	Nodes       []AdoptionNode
	Streams     []agreed.JobStream
}

// Adoption is one change of owner.
type Adoption struct {
	Stream agreed.JobStream
	To     string
	Reason AdoptionReason
}

// Adopt decides who executes the jobs of owners that are gone: a neighbour of
// the owner, else a node of the primary. Streams go to whoever owns the fewest,
// so those of one lost site don't all fall on one node.
func Adopt(v AdoptionView) []Adoption {
	if !v.MayReassign || v.Quarantined {
		return nil
	}
	nodes := make(map[string]AdoptionNode, len(v.Nodes))
	for _, n := range v.Nodes {
		nodes[n.Name] = n
	}
	load := map[string]int{}
	for _, j := range v.Streams {
		load[j.Owner]++
	}
	streams := slices.Clone(v.Streams)
	slices.SortFunc(streams, func(a, b agreed.JobStream) int { return cmp.Compare(a.Key(), b.Key()) })
	var adoptions []Adoption
	for _, j := range streams {
		owner, member := nodes[j.Owner]
		if (member && owner.Silence < adoptAfter) || len(adoptions) == maxAdoptions {
			continue
		}
		site := j.Site // of an owner that was removed only the origin's site is known
		if member {
			site = owner.Site
		}
		to, reason := adopter(v, nodes, load, site)
		if to == "" || to == j.Owner {
			continue
		}
		if !member {
			reason = AdoptRemoved
		}
		load[to]++
		adoptions = append(adoptions, Adoption{Stream: j, To: to, Reason: reason})
	}
	return adoptions
}

func adopter(v AdoptionView, nodes map[string]AdoptionNode, load map[string]int, site string) (string, AdoptionReason) {
	if to := idlest(nodes, load, site); to != "" {
		return to, AdoptNeighbour
	}
	return idlest(nodes, load, v.Primary), AdoptPrimary
}

func idlest(nodes map[string]AdoptionNode, load map[string]int, site string) string {
	best := ""
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		n := nodes[name]
		if n.Site == site && n.Able && (best == "" || load[name] < load[best]) {
			best = name
		}
	}
	return best
}

// Adopter gives the streams of lost nodes to others, while this node leads.
type Adopter struct {
	o       Options
	timing  config.Timing
	adopted *prometheus.CounterVec
}

// NewAdopter makes an Adopter; Lead runs it. Of the options it needs Name, Site,
// Agreement, Health, Boottime, Quarantined, Logger and Registerer.
func NewAdopter(o Options) *Adopter {
	return &Adopter{
		o: o, timing: o.Agreement.Timing(),
		adopted: promauto.With(o.Registerer).NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_stream_adoptions_total", Help: "Job streams that this node, leading, gave to another owner.",
		}, []string{"reason"}),
	}
}

// Lead looks and acts until the leadership ends; for cluster.WhileLeader.
func (a *Adopter) Lead(ctx context.Context, l cluster.Leadership) error {
	tick := time.NewTicker(adoptEvery)
	defer tick.Stop()
	for {
		for _, adoption := range Adopt(a.view(l)) {
			a.adopt(ctx, adoption, l)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (a *Adopter) adopt(ctx context.Context, d Adoption, l cluster.Leadership) {
	_, err := a.o.Agreement.Propose(ctx, agreed.CmdStreamOwn, agreed.StreamOwn{
		Stream: d.Stream.Key(), Owner: d.To, Expect: d.Stream.Token, Reason: string(d.Reason), Term: l.Term,
	})
	log := a.o.Logger.With(slog.String("stream", d.Stream.Key()), slog.String("from", d.Stream.Owner), slog.String("to", d.To))
	switch {
	case err == nil:
		a.adopted.WithLabelValues(string(d.Reason)).Inc()
		log.Warn("jobs adopted", "reason", d.Reason)
	case ctx.Err() != nil, errors.Is(err, agreed.ErrStaleToken), errors.Is(err, agreed.ErrStaleTerm), errors.Is(err, agreed.ErrUnknownStream):
		log.Info("adoption overtaken by another change", "err", err)
	default:
		log.Warn("adoption failed, the next look decides again", "err", err)
	}
}

func (a *Adopter) view(l cluster.Leadership) AdoptionView {
	s, now := a.o.Agreement.State(), a.o.Boottime()
	peers := a.o.Agreement.Peers()
	left, _ := a.o.Agreement.Lease()
	v := AdoptionView{
		Primary: s.Primary.Site, Quarantined: a.o.Quarantined(), Streams: slices.Collect(maps.Values(s.Streams)),
		// What this leader has not watched for long enough it does not judge.
		MayReassign: left > 0 && now-l.FirstCommit >= a.timing.NewLeaderWait && a.o.Agreement.Paused() < a.timing.Patience,
	}
	for name, n := range s.Nodes {
		if name == a.o.Name {
			v.Nodes = append(v.Nodes, AdoptionNode{Name: name, Site: n.Site, Able: left > 0 && !a.o.Health().Draining})
			continue
		}
		v.Nodes = append(v.Nodes, a.judge(name, n.Site, peers, now-l.FirstCommit))
	}
	return v
}

// judge tells how long nobody has heard a node. One that was never heard is
// judged by how long this leader has listened.
func (a *Adopter) judge(name, site string, peers map[string]cluster.PeerView, leading time.Duration) AdoptionNode {
	n := AdoptionNode{Name: name, Site: site, Silence: leading}
	p, known := peers[name]
	if known && p.Heard {
		n.Silence = p.Ago
		n.Able = p.LeaseLeft > 0 && p.Ago < a.timing.Patience && !p.Draining && !p.Cold && p.Stuck < a.timing.Patience
	}
	for other, q := range peers {
		if ago, heard := q.HeardBy[name]; other != name && q.Heard && heard {
			n.Silence = min(n.Silence, q.Ago+ago)
		}
	}
	return n
}
