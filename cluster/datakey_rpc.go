package cluster

import (
	"context"
	"fmt"

	"github.com/dsnode/dsnode/cluster/clusterpb"
)

// OnCarried sets the function that counts this node's records by the id of the data
// key that seals them. Call it before Run.
func (c *Cluster) OnCarried(carried func(context.Context) (map[string]int64, error)) {
	c.carried = carried
}

// Carried asks a node, which may be this one, how many of its records are sealed with
// each data key, by the key's id. Keys without records may be absent.
func (c *Cluster) Carried(ctx context.Context, node string) (map[string]int64, error) {
	if node == c.opts.Name {
		return c.carried(ctx)
	}
	client, err := c.client(node)
	if err != nil {
		return nil, err
	}
	got, err := client.CarriedKeys(ctx, &clusterpb.CarriedKeysRequest{Format: rpcFormat})
	if err != nil {
		return nil, fmt.Errorf("ask %s for its records by data key: %w", node, err)
	}
	if err := unrefuse(got.GetRefused()); err != nil {
		return nil, err
	}
	counts := make(map[string]int64, len(got.GetCarried()))
	for _, k := range got.GetCarried() {
		counts[k.GetKey()] = k.GetRecords()
	}
	return counts, nil
}

// CarriedKeys returns how many of this node's records each data key seals.
func (s *peerServer) CarriedKeys(ctx context.Context, _ *clusterpb.CarriedKeysRequest) (*clusterpb.CarriedKeysResponse, error) {
	counts, err := s.c.carried(ctx)
	refused, err := refusal(err)
	resp := &clusterpb.CarriedKeysResponse{Format: rpcFormat, Refused: refused}
	for _, id := range sortedKeys(counts) {
		resp.Carried = append(resp.Carried, &clusterpb.CarriedKey{Key: id, Records: counts[id]})
	}
	return resp, err
}
