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
	// adoptAfter is how long no node must have heard a node before its job streams get
	// another owner; see Gone. It is longer than a restart, so that a restart causes no
	// adoption.
	adoptAfter = 10 * time.Second
	adoptEvery = 500 * time.Millisecond
	// maxAdoptions bounds the adoptions of one look.
	maxAdoptions = 64
)

// AdoptionReason names why a stream gets another owner.
type AdoptionReason string

const (
	AdoptNeighbour AdoptionReason = "owner_gone"    // by another node of the owner's site
	AdoptPrimary   AdoptionReason = "site_gone"     // by the primary
	AdoptRemoved   AdoptionReason = "owner_removed" // the owner is no longer a member
)

// AdoptionNode is a member as the raft leader knows it.
type AdoptionNode struct {
	Name, Site string
	Gone       bool // see the func Gone
	// Able: it can execute jobs. It is heard, holds a lease, applies entries, and is
	// neither draining nor cold.
	Able bool
}

// AdoptionView is all that Adopt looks at.
type AdoptionView struct {
	Primary string // site
	// MayReassign: leases from before this leadership have ended, and the leader's
	// judgement is new.
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

// Adopt decides which nodes get the streams of owners that are gone: another node of
// the owner's site, else a node of the primary. Each stream goes to the node that owns
// the fewest, so those of one lost site are spread. It is pure.
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
		if (member && !owner.Gone) || len(adoptions) == maxAdoptions {
			continue
		}
		site := j.Site // of a removed owner only the origin's site is known
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
	if to := leastLoaded(nodes, load, site); to != "" {
		return to, AdoptNeighbour
	}
	return leastLoaded(nodes, load, v.Primary), AdoptPrimary
}

func leastLoaded(nodes map[string]AdoptionNode, load map[string]int, site string) string {
	best := ""
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		n := nodes[name]
		if n.Site == site && n.Able && (best == "" || load[name] < load[best]) {
			best = name
		}
	}
	return best
}

// Adopter gives the streams of lost nodes to other nodes, while this node leads Raft.
type Adopter struct {
	o       Options
	judge   func() (Judgement, bool)
	timing  config.Timing
	adopted *prometheus.CounterVec
}

// NewAdopter makes an Adopter; Lead runs it. It needs the options Name, Site,
// Agreement, Health, Boottime, Quarantined, Logger and Registerer, and the judgement of
// this node's Coordinator.
func NewAdopter(o Options, judge func() (Judgement, bool)) *Adopter {
	return &Adopter{
		o: o, judge: judge, timing: o.Agreement.Timing(),
		adopted: promauto.With(o.Registerer).NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_stream_adoptions_total", Help: "Job streams that this node, leading, gave to another owner.",
		}, []string{"reason"}),
	}
}

// Lead decides and proposes until the leadership ends; for cluster.WhileLeader.
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
		log.Warn("job stream has a new owner", "reason", d.Reason)
	case ctx.Err() != nil, errors.Is(err, agreed.ErrStaleToken), errors.Is(err, agreed.ErrStaleTerm), errors.Is(err, agreed.ErrUnknownStream):
		log.Info("adoption overtaken by another change", "err", err)
	default:
		log.Warn("adoption failed; the next look decides again", "err", err)
	}
}

// view is what the coordinator judged at its last look, and who can adopt now. The
// streams are those of that look: it has not judged the node of a newer one.
func (a *Adopter) view(l cluster.Leadership) AdoptionView {
	judged, looked := a.judge()
	if !looked {
		return AdoptionView{}
	}
	s, now := judged.State, a.o.Boottime()
	peers := a.o.Agreement.Peers()
	left, _ := a.o.Agreement.Lease()
	v := AdoptionView{
		Primary: s.Primary.Site, Quarantined: a.o.Quarantined(), Streams: slices.Collect(maps.Values(s.Streams)),
		MayReassign: left > 0 && now-l.FirstCommit >= a.timing.NewLeaderWait && now-judged.At < a.timing.Patience,
	}
	for name, n := range s.Nodes {
		able := left > 0 && !a.o.Health().Draining
		if name != a.o.Name {
			able = a.able(peers[name])
		}
		v.Nodes = append(v.Nodes, AdoptionNode{Name: name, Site: n.Site, Gone: judged.Gone[name], Able: able})
	}
	return v
}

func (a *Adopter) able(p cluster.PeerView) bool {
	return p.HeardWithin(a.timing.Patience) && p.LeaseLeft > 0 && !p.Draining && !p.Cold && p.Stuck < a.timing.Patience
}
