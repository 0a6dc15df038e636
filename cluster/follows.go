package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/clusterpb"
)

// ErrNotFollowing: a node answers, but does not apply the entries that a quorum has
// committed. Most likely its disk hangs.
var ErrNotFollowing = errors.New("the node does not follow the agreed state")

// askEvery is the pause between two questions to a node about its progress.
const askEvery = 10 * time.Millisecond

// stuckAfter is for how long a node may show no progress in applying entries before it
// counts as one that does not follow: four ticks.
func (c *Cluster) stuckAfter() time.Duration { return 4 * c.Timing().Tick }

// AwaitApplied blocks until a node, which may be this one, says that it has applied the
// entry of an index. A follower applies an entry only after it has written it to its
// disk, so this proves that its disk worked after the entry was proposed. The error
// wraps ErrNotFollowing.
func (c *Cluster) AwaitApplied(ctx context.Context, node string, index uint64) error {
	return c.askUntil(ctx, node, func(got *clusterpb.PingResponse) (bool, string) {
		applied := got.GetHealth().GetAppliedIndex()
		return applied >= index, fmt.Sprintf("it has applied entry %d of %d", applied, index)
	})
}

// AwaitActing blocks until a node, which may be this one, says that it acts as primary in
// an epoch or a later one. index is that of the promotion's entry: a node of a version
// that does not tell whether it acts counts as acting when it has applied the entry.
func (c *Cluster) AwaitActing(ctx context.Context, node string, epoch, index uint64) error {
	return c.askUntil(ctx, node, func(got *clusterpb.PingResponse) (bool, string) { return acts(got, epoch, index) })
}

func acts(got *clusterpb.PingResponse, epoch, index uint64) (ok bool, why string) {
	if got.Acting == nil {
		return got.GetHealth().GetAppliedIndex() >= index, "it has not applied the promotion"
	}
	return got.GetActing() >= epoch, fmt.Sprintf("it does not act as primary in epoch %d", epoch)
}

// askUntil pings a node until ok returns true for its answer. why says what the answer
// lacks.
func (c *Cluster) askUntil(ctx context.Context, node string, ok func(*clusterpb.PingResponse) (done bool, why string)) error {
	lacks := "it does not answer"
	for {
		got, err := c.askOnce(ctx, node)
		if err == nil {
			var done bool
			if done, lacks = ok(got); done {
				return nil
			}
		}
		if clock.Sleep(ctx, askEvery) != nil {
			return fmt.Errorf("%s: %w: %s (%w)", node, ErrNotFollowing, lacks, context.Cause(ctx))
		}
	}
}

func (c *Cluster) askOnce(ctx context.Context, node string) (*clusterpb.PingResponse, error) {
	if node == c.opts.Name {
		return c.pingResponse(), nil
	}
	client, err := c.client(node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	return client.Ping(ctx, c.pingRequest())
}

// OnActing sets the function that tells in which epoch this node acts as primary, 0 when
// it does not. It must not block. Call it before Run.
func (c *Cluster) OnActing(acting func() uint64) { c.acting = acting }

// proveFollows proves that a node can take over raft's leadership: it applies an entry
// that is proposed now. A transfer to a node that does not makes raft refuse all writes
// until the node takes entries again (hashicorp/raft #696): raft's goroutine that
// replicates to the node is busy with it, and a second transfer waits for that goroutine.
func (c *Cluster) proveFollows(ctx context.Context, node string) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timing().Patience)
	defer cancel()
	cmd, err := agreed.NewCommand(agreed.CmdTick, time.Now(), nil)
	if err != nil {
		return err
	}
	b, err := cmd.Encode()
	if err != nil {
		return err
	}
	index, err := c.commit(ctx, cmd, b)
	if err != nil {
		return err
	}
	return c.AwaitApplied(ctx, node, index)
}
