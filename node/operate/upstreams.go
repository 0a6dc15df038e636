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

// Upstreams lists every configured upstream: the own site's as this node sees
// them, the others' as their sites' nodes said last.
func (o *Operator) Upstreams(context.Context) ([]admin.UpstreamInfo, error) {
	s := o.cluster.State()
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
		if u.Site != o.site {
			o.hearsay(&info)
		}
		at[name] = len(list)
		list = append(list, info)
	}
	for _, u := range o.fleet.Status() {
		i, known := at[u.Name]
		if !known {
			continue
		}
		info := &list[i]
		info.InFlight = &u.InFlight
		info.State, info.Reason = stateOf(u.Health)
		for _, i := range u.Instances {
			state, why := stateOf(i.Health)
			info.Instances = append(info.Instances, admin.InstanceInfo{Address: i.Address, State: state, Reason: why, InFlight: i.InFlight})
		}
		if !u.Since.IsZero() {
			info.Since = &u.Since
		}
	}
	return list, nil
}

func stateOf(s upstream.Health) (admin.UpstreamState, string) {
	switch {
	case s.Healthy:
		return admin.UpstreamHealthy, ""
	case s.Known:
		return admin.UpstreamUnhealthy, s.LastErr
	}
	return admin.UpstreamUnknown, ""
}

// DrainUpstream lets an upstream get no new request from any node.
func (o *Operator) DrainUpstream(ctx context.Context, name, by string) error {
	return o.setUpstream(ctx, agreed.UpstreamDrain{Name: name, Drained: true, By: by})
}

// ResumeUpstream ends that.
func (o *Operator) ResumeUpstream(ctx context.Context, name, by string) error {
	return o.setUpstream(ctx, agreed.UpstreamDrain{Name: name, By: by})
}

func (o *Operator) setUpstream(ctx context.Context, d agreed.UpstreamDrain) error {
	s := o.cluster.State()
	if s.Parsed == nil {
		return o.notMember()
	}
	if _, known := s.Parsed.Upstreams[d.Name]; !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownUpstream, d.Name)
	}
	d.Configured, d.Expect = sortedNames(s.Parsed.Upstreams), s.Config.Version
	_, err := o.cluster.Propose(ctx, agreed.CmdUpstreamDrain, d)
	return err
}

// hearsay fills in what a node of the upstream's site said in its newest ping.
func (o *Operator) hearsay(info *admin.UpstreamInfo) {
	var newest time.Duration = -1
	for _, p := range o.cluster.Peers() {
		if p.Site != info.Site || !p.HeardWithin(o.cluster.Timing().Patience) || (newest >= 0 && p.Ago > newest) {
			continue
		}
		newest = p.Ago
		switch {
		case slices.Contains(p.UpstreamsDown, info.Name):
			info.State, info.Reason = admin.UpstreamUnhealthy, "says node "+p.Name
		case p.UpstreamsHealthy+len(p.UpstreamsDown) == p.UpstreamsTotal:
			info.State, info.Reason = admin.UpstreamHealthy, ""
		}
	}
}
