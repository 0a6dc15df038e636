package failover

import (
	"cmp"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
)

// input gathers for the detector what this node has observed.
func (c *Coordinator) input(s *agreed.State, now time.Duration) Input {
	peers := c.o.Agreement.Peers()
	left, _ := c.o.Agreement.Lease()
	in := Input{
		Now: now, Timing: c.timing, Primary: s.Primary.Site, Epoch: s.Primary.Epoch, Switching: s.Switchover != nil, Sites: configured(s),
		Leader: Observation{
			Observer: c.o.Name, Site: c.o.Site, Paused: c.o.Agreement.Paused(), Leased: left > 0,
			Seen: make(map[string]Sighting, len(peers)),
		},
	}
	in.Opened = map[string]uint64{}
	for _, j := range s.Streams {
		if j.Owner == j.Origin && j.Before == "" {
			in.Opened[j.Origin] = max(in.Opened[j.Origin], j.Token.Index)
		}
	}
	voters := map[string]bool{}
	raft := c.o.Agreement.Raft()
	in.RaftLeader = raft.Leader
	for _, server := range raft.Servers {
		voters[server.Name] = server.Voter
	}
	health := c.o.Health()
	able := left > 0 && !health.Draining
	in.Members = append(in.Members, Member{
		Name: c.o.Name, Site: c.o.Site, Ready: able, Steady: able, Responsive: able, CaughtUp: true, Acts: true,
		UpstreamsHealthy: health.UpstreamsHealthy, Voter: voters[c.o.Name], SlowFor: c.o.Agreement.DiskSpeed().SlowFor,
		Follows: !raft.Ticked || raft.TickAgo < stuckAfter(c.timing), Stuck: raft.TickAgo,
	})
	for name, p := range peers {
		m := Member{Name: name, Site: p.Site, UpstreamsHealthy: p.UpstreamsHealthy, Voter: voters[name], SlowFor: p.Disk.SlowFor}
		if p.Heard {
			seen := Sighting{Ago: p.Ago, LeaseLeft: p.LeaseLeft + p.Ago, LeaseKnown: true}
			in.Leader.Seen[name] = seen
			// A node that stands still where this one does too lacks nothing: no leader
			// commits entries.
			m.Stuck = p.Stuck
			m.Follows = p.Stuck < stuckAfter(c.timing) || p.AppliedIndex >= raft.CommitIndex
			able := seen.LeaseLeft > 0 && !p.Draining && !p.Cold && (m.Follows || p.Stuck < c.timing.Patience)
			m.Ready = able && p.HeardWithin(c.timing.Lease)
			m.Steady = able && p.HeardWithin(c.timing.Patience)
			m.Responsive = able && m.Follows && p.HeardWithin(3*c.timing.Tick) && p.Paused <= c.timing.Tick
			m.Acts = p.HeardWithin(c.timing.Patience) && (p.Acting == nil || *p.Acting == s.Primary.Epoch)
			m.CaughtUp = p.AppliedIndex+onItsWay >= raft.CommitIndex
			in.Others = append(in.Others, observationOf(p))
		}
		in.Members = append(in.Members, m)
	}
	slices.SortFunc(in.Members, func(a, b Member) int { return cmp.Compare(a.Name, b.Name) })
	return in
}

// stuckAfter is for how long a node may show no progress in applying entries and still
// count as one that follows: four ticks, as a witness's table.
func stuckAfter(t config.Timing) time.Duration { return 4 * t.Tick }

// onItsWay is how many entries a node may lack and still count as caught up: two
// seconds of ticks.
const onItsWay = 8

// observationOf is a peer's own table, as its newest ping answer carried it.
func observationOf(p cluster.PeerView) Observation {
	o := Observation{
		Observer: p.Name, Site: p.Site, Age: p.Ago, Paused: p.Paused,
		Leased: p.LeaseLeft+p.Ago > 0, Seen: make(map[string]Sighting, len(p.HeardBy)),
	}
	for node, ago := range p.HeardBy {
		o.Seen[node] = Sighting{Ago: ago}
	}
	return o
}

func configured(s *agreed.State) []PlacementSite {
	sites := make([]PlacementSite, 0, len(s.Parsed.Sites))
	for name, site := range s.Parsed.Sites {
		sites = append(sites, PlacementSite{Name: name, City: site.City, Priority: site.Priority})
	}
	return sites
}

func (c *Coordinator) newView(s *agreed.State, sites []SiteView, now time.Duration, w *watch) View {
	left, _ := c.o.Agreement.Lease()
	v := View{
		Quorum: left > 0, Quarantined: c.o.Quarantined(), Held: s.Hold != nil,
		NewLeaderWait: c.timing.NewLeaderWait, Patience: c.timing.Patience, NoLease: c.timing.NoLease,
		Primary: s.Primary.Site, Sites: sites,
		Dwell: dwell(c.timing), Penalty: penaltyTime,
	}
	if l, leads := c.o.Agreement.Leading(); leads {
		v.LeadingFor = now - l.FirstCommit
	}
	if s.Switchover != nil {
		v.Switchover = SwitchoverRunning
		if !c.o.Now().Before(s.Switchover.Deadline) {
			v.Switchover = SwitchoverExpired
		}
	}
	if f := s.LastFailover; f != nil && f.Kind == agreed.FailoverUnplanned && f.Epoch == s.Primary.Epoch {
		v.Last = LastPromotion{From: f.From, Ago: now - w.epochAt, Acknowledged: f.Acknowledged}
	}
	return v
}
