package operate

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/upstream"
)

// Upstreams lists every configured upstream. The state of the own site's upstreams is what
// this node sees; for other sites it is what their nodes have last reported.
func (o *Operator) Upstreams(context.Context) ([]admin.UpstreamInfo, error) {
	s := o.Cluster.State()
	if s.Parsed == nil {
		return nil, o.notMember()
	}
	list := []admin.UpstreamInfo{}
	at := map[string]int{}
	for _, name := range sortedNames(s.Parsed.Upstreams) {
		u := s.Parsed.Upstreams[name]
		info := admin.UpstreamInfo{
			Name: name, Site: u.Site, Kind: string(u.Kind), URL: u.URL, Models: []string{},
			State: admin.UpstreamUnknown, MaxConcurrency: u.MaxConcurrency,
		}
		_, info.Drained = s.Drained[name]
		for _, model := range sortedNames(s.Parsed.Models) {
			for _, serve := range s.Parsed.Models[model].Serve {
				if serve.Upstream == name {
					info.Models = append(info.Models, model)
				}
			}
		}
		if u.Site != o.Site {
			o.reportedByPeers(&info)
		}
		at[name] = len(list)
		list = append(list, info)
	}
	for _, u := range o.Fleet.Status() {
		i, known := at[u.Name]
		if !known {
			continue
		}
		info := &list[i]
		info.InFlight = &u.InFlight
		info.State, info.Reason = upstreamState(u.Health)
		for _, i := range u.Instances {
			state, reason := upstreamState(i.Health)
			info.Instances = append(info.Instances, admin.InstanceInfo{Address: i.Address, State: state, Reason: reason, InFlight: i.InFlight})
		}
		if !u.Since.IsZero() {
			info.Since = &u.Since
		}
	}
	return list, nil
}

func upstreamState(s upstream.Health) (admin.UpstreamState, string) {
	switch {
	case s.Healthy:
		return admin.UpstreamHealthy, ""
	case s.Known:
		return admin.UpstreamUnhealthy, s.LastErr
	}
	return admin.UpstreamUnknown, ""
}

// DrainUpstream makes all nodes send the upstream no new requests.
func (o *Operator) DrainUpstream(ctx context.Context, name, by string) error {
	return o.setUpstream(ctx, agreed.UpstreamDrain{Name: name, Drained: true, By: by})
}

// ResumeUpstream makes all nodes use the upstream again.
func (o *Operator) ResumeUpstream(ctx context.Context, name, by string) error {
	return o.setUpstream(ctx, agreed.UpstreamDrain{Name: name, By: by})
}

func (o *Operator) setUpstream(ctx context.Context, d agreed.UpstreamDrain) error {
	s := o.Cluster.State()
	if s.Parsed == nil {
		return o.notMember()
	}
	if _, known := s.Parsed.Upstreams[d.Name]; !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownUpstream, d.Name)
	}
	d.Configured, d.Expect = sortedNames(s.Parsed.Upstreams), s.Config.Version
	_, err := o.Cluster.Propose(ctx, agreed.CmdUpstreamDrain, d)
	return err
}

// reportedByPeers fills in the state that a node of the upstream's site has reported with
// its newest ping. A peer's ping has the unhealthy upstreams by name and the number of
// healthy ones: a name that is not listed is healthy only if every upstream is accounted
// for.
func (o *Operator) reportedByPeers(info *admin.UpstreamInfo) {
	var newest time.Duration = -1
	for _, p := range o.Cluster.Peers() {
		if p.Site != info.Site || !p.HeardWithin(o.Cluster.Timing().Patience) || (newest >= 0 && p.Ago > newest) {
			continue
		}
		newest = p.Ago
		switch {
		case slices.Contains(p.UpstreamsDown, info.Name):
			info.State, info.Reason = admin.UpstreamUnhealthy, "reported by node "+p.Name
		case p.UpstreamsHealthy+len(p.UpstreamsDown) == p.UpstreamsTotal:
			info.State, info.Reason = admin.UpstreamHealthy, ""
		}
	}
}
