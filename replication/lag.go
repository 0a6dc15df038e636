package replication

import (
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	// knownFor is how old the newest report of an origin's end may be for a count of missing
	// records to be meaningful.
	knownFor = 5 * time.Second
	// maxPendingAnswers bounds the answers of each origin whose records are not all here yet.
	maxPendingAnswers = 32
)

// freshness measures the age of copies. A copy that contains all records that an origin had
// on its disk at some moment is as old as that moment. The moment is when the probe was
// sent that the origin answered, by the prober's clock. There is no other evidence: without
// answers the age grows.
type freshness struct {
	now func() time.Duration // Boottime

	mu     sync.Mutex // guards the fields below
	own    map[string]*originCopy
	copies map[siteCopyKey]siteCopyAge // of other nodes
}

// originCopy is this node's copy of an origin's journals.
type originCopy struct {
	fresh   time.Duration   // the copy contains all that the origin had at this time
	known   time.Duration   // this node knows what the origin had at this time
	pending []pendingAnswer // oldest first
	any     bool            // fresh is set
}

// pendingAnswer is an answer whose records are not all here yet.
type pendingAnswer struct {
	at    time.Duration
	lacks map[journal.Stream]uint64
}

type siteCopyKey struct{ holder, originSite string }

type siteCopyAge struct{ fresh, heard time.Duration }

// answered handles an answer: at the time at, or later, the origin had these ends. held
// returns what this node has of a stream.
func (f *freshness) answered(origin string, at time.Duration, ends map[journal.Stream]uint64, held func(journal.Stream) uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.own[origin]
	if c == nil {
		c = &originCopy{known: at}
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
		c.setFresh(at)
		// Earlier answers say nothing more. Some may lack a stream that was retired since.
		c.pending = slices.DeleteFunc(c.pending, func(p pendingAnswer) bool { return p.at <= at })
	case len(c.pending) < maxPendingAnswers:
		c.pending = append(c.pending, pendingAnswer{at: at, lacks: lacks})
	default:
		c.pending[maxPendingAnswers-1] = pendingAnswer{at: at, lacks: lacks}
	}
}

func (c *originCopy) setFresh(at time.Duration) {
	if !c.any || at > c.fresh {
		c.fresh, c.any = at, true
	}
}

// advanced handles that this node holds more of a stream.
func (f *freshness) advanced(s journal.Stream, held func(journal.Stream) uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.own[s.Origin]
	if c == nil {
		return
	}
	left := c.pending[:0]
	for _, p := range c.pending {
		for s, end := range p.lacks {
			if held(s) >= end {
				delete(p.lacks, s)
			}
		}
		if len(p.lacks) == 0 {
			c.setFresh(p.at)
		} else {
			left = append(left, p)
		}
	}
	clear(c.pending[len(left):])
	c.pending = left
}

// age returns the age of this node's copy of an origin; false when it is not known.
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

// answeredAgo returns how long ago the newest probe was sent that an origin answered, or
// that a node answered which knew the origin's end of that time. It says only that answers
// get through: the records may not be here yet.
func (f *freshness) answeredAgo(origin string) (time.Duration, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.own[origin]
	if c == nil {
		return 0, false
	}
	return max(0, f.now()-c.known), true
}

// lacking are the origins of which this node has not yet had all that they had at some
// time since its start.
func (f *freshness) lacking(origins []string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, o := range origins {
		if _, ok := f.ageOf(o); !ok {
			out = append(out, o)
		}
	}
	return out
}

// endsKnown reports whether the ends of all the origins were reported recently.
func (f *freshness) endsKnown(origins []string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range origins {
		if c := f.own[o]; c == nil || f.now()-c.known > knownFor {
			return false
		}
	}
	return true
}

// lag returns the greatest age of the origins; false when one is not known.
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

// recordReported stores the age of another node's copy of a site, as that node reported it
// the time reportedAgo ago.
func (f *freshness) recordReported(holder, originSite string, age, reportedAgo time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := siteCopyKey{holder, originSite}
	seen, ok := f.copies[at]
	now := f.now()
	if !ok || now-age > seen.fresh {
		seen.fresh = now - age
	}
	if !ok || now-reportedAgo > seen.heard {
		seen.heard = now - reportedAgo
	}
	f.copies[at] = seen
}

// reportedAge returns the present age of another node's copy of a site, and whether that
// node reported it recently; ok is false when it is not known.
func (f *freshness) reportedAge(holder, originSite string) (age time.Duration, lately, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	seen, ok := f.copies[siteCopyKey{holder, originSite}]
	if !ok {
		return 0, false, false
	}
	now := f.now()
	return max(0, now-seen.fresh), now-seen.heard <= knownFor, true
}

// retain removes former nodes and sites.
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

// originsOf returns the members of a site except this node.
func originsOf(members []Member, site, self string) []string {
	var out []string
	for _, m := range members {
		if m.Site == site && m.Node != self {
			out = append(out, m.Node)
		}
	}
	return out
}

// Lag returns the age in seconds of this node's copy of a site's journals: that of the
// oldest of its nodes. known is false if some of them have never answered.
func (r *Replication) Lag(originSite string) (seconds float64, known bool) {
	lag, ok := r.fresh.lag(originsOf(r.opts.Members(), originSite, r.opts.Self))
	return lag.Seconds(), ok
}

// AnsweredAgo returns how long ago this node last learned what a node has in its journals;
// false if it never did.
func (r *Replication) AnsweredAgo(node string) (time.Duration, bool) {
	return r.fresh.answeredAgo(node)
}

// Behind returns how many records of a site this node is known to lack. known is false if
// some of the site's nodes do not answer at present.
func (r *Replication) Behind(originSite string) (records int64, known bool) {
	origins := originsOf(r.opts.Members(), originSite, r.opts.Self)
	if len(origins) == 0 || !r.fresh.endsKnown(origins) {
		return 0, false
	}
	return r.tracker.behind(origins, []string{r.opts.Self}), true
}

// Copy says how far a site's copy of the other sites' journals is behind.
type Copy struct {
	RecordsBehind *int64   // nil: not known
	LagSeconds    *float64 // nil: not known
}

// Copy returns that of a site, as far as this node knows. A site holds what one of its nodes
// holds.
func (r *Replication) Copy(peerSite string) Copy {
	members := r.opts.Members()
	var holders, origins, foreign []string // foreign: the origins without this node
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
	worst, aware := time.Duration(0), r.fresh.endsKnown(foreign)
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
		behind := r.tracker.behind(origins, holders)
		c.RecordsBehind = &behind
	}
	return c
}

// siteAge returns the age of the best copy of a site among the holders.
func (r *Replication) siteAge(members []Member, holders []string, originSite string) (best time.Duration, lately, known bool) {
	for _, h := range holders {
		age, late, ok := r.fresh.reportedAge(h, originSite)
		if h == r.opts.Self {
			age, ok = r.fresh.lag(originsOf(members, originSite, r.opts.Self))
			late = true
		}
		if ok && (!known || age < best) {
			best = age
		}
		known, lately = known || ok, lately || ok && late
	}
	return best, lately, known
}

// originSites returns the sites of the other nodes.
func (r *Replication) originSites() []string {
	var sites []string
	for _, m := range r.opts.Members() {
		if m.Node != r.opts.Self && !slices.Contains(sites, m.Site) {
			sites = append(sites, m.Site)
		}
	}
	return sites
}

// maxAges bounds the ages in one message.
const maxAges = 1024

// ages returns the ages of copies to send to peers, this node's own first.
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
		// Don't forward an age that its holder has not reported for long: it would seem new.
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

// mergeAges stores the ages of other nodes' copies that a peer sent. The message may have
// been on its way for up to a round trip.
func (r *Replication) mergeAges(ages []*replicationpb.SiteAge, trip time.Duration) {
	if len(ages) == 0 {
		return
	}
	nodes, sites := map[string]bool{}, map[string]bool{}
	for _, m := range r.opts.Members() {
		nodes[m.Node], sites[m.Site] = true, true
	}
	for _, a := range ages {
		if a.GetHolder() != r.opts.Self && nodes[a.GetHolder()] && sites[a.GetOriginSite()] {
			r.fresh.recordReported(a.GetHolder(), a.GetOriginSite(), duration(a.GetAgeUs())+trip, duration(a.GetSaidUs())+trip)
		}
	}
}

// micros rounds up, so that a copy never seems younger than it is.
func micros(d time.Duration) uint64 { return uint64(max(0, d)/time.Microsecond) + 1 }

// duration is the inverse of micros; values above a year are cut to a year.
func duration(us uint64) time.Duration {
	return time.Duration(min(us, uint64(365*24*time.Hour/time.Microsecond))) * time.Microsecond
}
