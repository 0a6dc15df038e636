package replication

import (
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	// known is how old the newest word of an origin's end may be for a count of
	// the records behind to mean anything.
	knownFor = 5 * time.Second
	// maxProofs bounds the answers that wait until their records are here, for
	// each origin.
	maxProofs = 32
)

// freshness measures how old copies are. Whoever holds all that an origin had on
// its disk at some moment has a copy that is as old as that moment; the moment
// is when the question was sent that the origin answered, on the asker's clock.
// Nothing else tells: when no answer comes, the age grows by itself.
type freshness struct {
	now func() time.Duration // Boottime

	mu     sync.Mutex // guards what follows
	own    map[string]*copyOf
	copies map[copyAt]copySeen // of other nodes
}

// copyOf is this node's copy of an origin's journals.
type copyOf struct {
	fresh  time.Duration // holds all that the origin had then
	known  time.Duration // knows what the origin had then
	proofs []proof       // oldest first
	any    bool          // fresh was ever set
}

// proof is an answer whose records are not all here yet.
type proof struct {
	at    time.Duration
	lacks map[journal.Stream]uint64
}

type copyAt struct{ holder, originSite string }

type copySeen struct{ fresh, heard time.Duration }

func newFreshness(now func() time.Duration) *freshness {
	return &freshness{now: now, own: map[string]*copyOf{}, copies: map[copyAt]copySeen{}}
}

// answered takes in that an origin had these ends at the moment at, or later.
// held gives what this node has of a stream.
func (f *freshness) answered(origin string, at time.Duration, ends map[journal.Stream]uint64, held func(journal.Stream) uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.own[origin]
	if c == nil {
		c = &copyOf{known: at}
		f.own[origin] = c
	}
	c.known = max(c.known, at)
	var lacks map[journal.Stream]uint64
	for s, end := range ends {
		if held(s) < end {
			if lacks == nil {
				lacks = map[journal.Stream]uint64{}
			}
			lacks[s] = end
		}
	}
	switch {
	case lacks == nil:
		c.prove(at)
	case len(c.proofs) < maxProofs:
		c.proofs = append(c.proofs, proof{at: at, lacks: lacks})
	default:
		c.proofs[maxProofs-1] = proof{at: at, lacks: lacks}
	}
}

func (c *copyOf) prove(at time.Duration) {
	if !c.any || at > c.fresh {
		c.fresh, c.any = at, true
	}
}

// advanced takes in that this node holds more of a stream.
func (f *freshness) advanced(s journal.Stream, held func(journal.Stream) uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.own[s.Origin]
	if c == nil {
		return
	}
	left := c.proofs[:0]
	for _, p := range c.proofs {
		for s, end := range p.lacks {
			if held(s) >= end {
				delete(p.lacks, s)
			}
		}
		if len(p.lacks) == 0 {
			c.prove(p.at)
		} else {
			left = append(left, p)
		}
	}
	clear(c.proofs[len(left):])
	c.proofs = left
}

// age of this node's copy of an origin; false when it is not known.
func (f *freshness) age(origin string) (time.Duration, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ageOf(origin)
}

func (f *freshness) ageOf(origin string) (time.Duration, bool) {
	c := f.own[origin]
	if c == nil || !c.any {
		return 0, false
	}
	return max(0, f.now()-c.fresh), true
}

// aware reports whether the end of each origin is known as of a moment ago.
func (f *freshness) aware(origins []string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range origins {
		if c := f.own[o]; c == nil || f.now()-c.known > knownFor {
			return false
		}
	}
	return true
}

// lag is the greatest age of the origins; false when one is not known.
func (f *freshness) lag(origins []string) (time.Duration, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	worst := time.Duration(0)
	for _, o := range origins {
		age, ok := f.ageOf(o)
		if !ok {
			return 0, false
		}
		worst = max(worst, age)
	}
	return worst, len(origins) > 0
}

// told takes in how old another node's copy of a site is, as it said itself some
// time ago.
func (f *freshness) told(holder, originSite string, age, said time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := copyAt{holder, originSite}
	seen, ok := f.copies[at]
	now := f.now()
	if !ok || now-age > seen.fresh {
		seen.fresh = now - age
	}
	if !ok || now-said > seen.heard {
		seen.heard = now - said
	}
	f.copies[at] = seen
}

// elsewhere is how old another node's copy of a site is now, and whether that
// node was heard of lately; false when it is not known.
func (f *freshness) elsewhere(holder, originSite string) (age time.Duration, lately, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	seen, ok := f.copies[copyAt{holder, originSite}]
	if !ok {
		return 0, false, false
	}
	now := f.now()
	return max(0, now-seen.fresh), now-seen.heard <= knownFor, true
}

// retain forgets nodes and sites that are no more.
func (f *freshness) retain(members []Member) {
	nodes, sites := map[string]bool{}, map[string]bool{}
	for _, m := range members {
		nodes[m.Node], sites[m.Site] = true, true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for o := range f.own {
		if !nodes[o] {
			delete(f.own, o)
		}
	}
	for at := range f.copies {
		if !nodes[at.holder] || !sites[at.originSite] {
			delete(f.copies, at)
		}
	}
}

// originsOf are the members of a site but this node.
func originsOf(members []Member, site, self string) []string {
	var out []string
	for _, m := range members {
		if m.Site == site && m.Node != self {
			out = append(out, m.Node)
		}
	}
	return out
}

// Lag is how old this node's copy of the journals of a site is, in seconds: the
// oldest of its nodes'. False: not known, because some were never heard.
func (r *Replication) Lag(originSite string) (seconds float64, known bool) {
	lag, ok := r.fresh.lag(originsOf(r.opts.Members(), originSite, r.opts.Self))
	return lag.Seconds(), ok
}

// Behind is how many records of a site this node is known to lack. False: not
// known, because some of the site's nodes can't be heard at present.
func (r *Replication) Behind(originSite string) (records int64, known bool) {
	origins := originsOf(r.opts.Members(), originSite, r.opts.Self)
	if len(origins) == 0 || !r.fresh.aware(origins) {
		return 0, false
	}
	return r.ledger.behind(origins, []string{r.opts.Self}), true
}

// Copy says how far a site's copy of the other sites' journals is behind.
type Copy struct {
	RecordsBehind *int64   // nil: not known
	LagSeconds    *float64 // nil: not known
}

// Copy is a site's, as this node knows it: what one node of the site holds the
// site holds.
func (r *Replication) Copy(peerSite string) Copy {
	members := r.opts.Members()
	var holders, origins, foreign []string // origins without this node are foreign
	sites := map[string]bool{}
	for _, m := range members {
		if m.Site == peerSite {
			holders = append(holders, m.Node)
			continue
		}
		sites[m.Site] = true
		origins = append(origins, m.Node)
		if m.Node != r.opts.Self {
			foreign = append(foreign, m.Node)
		}
	}
	if len(holders) == 0 || len(sites) == 0 {
		return Copy{}
	}
	worst, aware := time.Duration(0), r.fresh.aware(foreign)
	for site := range sites {
		age, lately, ok := r.siteAge(members, holders, site)
		if !ok {
			return Copy{}
		}
		worst, aware = max(worst, age), aware && lately
	}
	lag := worst.Seconds()
	c := Copy{LagSeconds: &lag}
	if aware {
		behind := r.ledger.behind(origins, holders)
		c.RecordsBehind = &behind
	}
	return c
}

// siteAge is the age of the best copy of a site that some nodes have.
func (r *Replication) siteAge(members []Member, holders []string, originSite string) (best time.Duration, lately, known bool) {
	for _, h := range holders {
		age, late, ok := time.Duration(0), true, false
		if h == r.opts.Self {
			age, ok = r.fresh.lag(originsOf(members, originSite, r.opts.Self))
		} else {
			age, late, ok = r.fresh.elsewhere(h, originSite)
		}
		if ok && (!known || age < best) {
			best = age
		}
		known, lately = known || ok, lately || ok && late
	}
	return best, lately, known
}

// originSites are the sites that other nodes are in.
func (r *Replication) originSites() []string {
	var sites []string
	for _, m := range r.opts.Members() {
		if m.Node != r.opts.Self && !slices.Contains(sites, m.Site) {
			sites = append(sites, m.Site)
		}
	}
	return sites
}

// maxAges bounds the ages of one message.
const maxAges = 1024

// ages tells peers how old the copies are that this node knows of, its own first.
func (r *Replication) ages() []*replicationpb.SiteAge {
	var out []*replicationpb.SiteAge
	for _, site := range r.originSites() {
		if lag, ok := r.fresh.lag(originsOf(r.opts.Members(), site, r.opts.Self)); ok {
			out = append(out, &replicationpb.SiteAge{Holder: r.opts.Self, OriginSite: site, AgeUs: micros(lag)})
		}
	}
	r.fresh.mu.Lock()
	defer r.fresh.mu.Unlock()
	now := r.fresh.now()
	for at, seen := range r.fresh.copies {
		// What nobody has confirmed for long is not passed on: it would seem new.
		if now-seen.heard > knownFor || len(out) >= maxAges {
			continue
		}
		out = append(out, &replicationpb.SiteAge{
			Holder: at.holder, OriginSite: at.originSite,
			AgeUs: micros(now - seen.fresh), SaidUs: micros(now - seen.heard),
		})
	}
	return out
}

// hearAges takes in what a peer knows of other nodes' copies. The message may
// have been on its way for as long as a round trip.
func (r *Replication) hearAges(ages []*replicationpb.SiteAge, trip time.Duration) {
	if len(ages) == 0 {
		return
	}
	nodes, sites := map[string]bool{}, map[string]bool{}
	for _, m := range r.opts.Members() {
		nodes[m.Node], sites[m.Site] = true, true
	}
	for _, a := range ages {
		if a.GetHolder() != r.opts.Self && nodes[a.GetHolder()] && sites[a.GetOriginSite()] {
			r.fresh.told(a.GetHolder(), a.GetOriginSite(), duration(a.GetAgeUs())+trip, duration(a.GetSaidUs())+trip)
		}
	}
}

// micros rounds up: a copy is never said to be younger than it is.
func micros(d time.Duration) uint64 { return uint64(max(0, d)/time.Microsecond) + 1 }

// duration is the other way; a year stands for whatever is more.
func duration(us uint64) time.Duration {
	return time.Duration(min(us, uint64(365*24*time.Hour/time.Microsecond))) * time.Microsecond
}
