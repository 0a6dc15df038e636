package operate

import (
	"context"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
)

// CheckJobs returns nil if the node's job table agrees with its journals.
func (o *Operator) CheckJobs(ctx context.Context) error { return o.Jobs.Check(ctx) }

// JobStreams lists the agreed job streams with their owners.
func (o *Operator) JobStreams(context.Context) (admin.JobStreams, error) {
	s := o.Cluster.State()
	streams := admin.JobStreams{Ownership: s.Ownership, Data: make([]agreed.JobStream, 0, len(s.Streams))}
	for _, key := range sortedNames(s.Streams) {
		streams.Data = append(streams.Data, s.Streams[key])
	}
	return streams, nil
}
