package replication

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	compareEvery = time.Minute
	// compareTries and compareAgain: two tables can only be compared at a moment when both
	// have applied the same records, which is a matter of chance under load.
	compareTries   = 10
	compareAgain   = time.Second
	compareTimeout = 10 * time.Second
	repairTimeout  = time.Minute
)

const buckets = 256

// compareAll compares the table with those of the nodes that are pulled from, until ctx
// ends. A bucket that differs in two comparisons in a row is repaired by merging its rows
// in both directions. A single difference may come from a job that one node expired a
// little earlier.
func (r *Replication) compareAll(ctx context.Context) error {
	differed := map[string][buckets]bool{}
	for pause(ctx, compareEvery) {
		if r.opts.Table.Partial() {
			continue // a partial table differs anyway
		}
		now := map[string][buckets]bool{}
		for _, peer := range r.sources() {
			differ, ok := r.compare(ctx, peer)
			if !ok {
				now[peer] = differed[peer]
				continue
			}
			now[peer] = differ
			r.repair(ctx, peer, differ, differed[peer])
		}
		differed = now
	}
	return nil
}

// compare returns the buckets that differ; false when there was no moment at which both
// nodes had applied the same records.
func (r *Replication) compare(ctx context.Context, peer string) (differ [buckets]bool, ok bool) {
	for try := range compareTries {
		if try > 0 && !pause(ctx, compareAgain) {
			return differ, false
		}
		applied, digests, steady, err := r.digests()
		if err != nil {
			r.opts.Logger.Error("can't read the table's digests", "err", err)
			return differ, false
		}
		if !steady {
			continue
		}
		theirs, err := r.askDigests(ctx, peer)
		if err != nil {
			r.opts.Logger.Debug("can't compare tables", "peer", peer, "err", err)
			return differ, false
		}
		ends, err := readEnds(theirs.GetApplied())
		if err != nil || !theirs.GetSteady() || len(theirs.GetDigests()) != buckets || !maps.Equal(ends, applied) {
			continue
		}
		for i, d := range theirs.GetDigests() {
			differ[i] = string(d) != string(digests[i][:])
		}
		r.metrics.compared.Inc()
		return differ, true
	}
	r.metrics.uncompared.Inc()
	return differ, false
}

// digests returns the table's digests, with what it has applied of the held streams; steady
// is false if that changed meanwhile.
func (r *Replication) digests() (applied map[journal.Stream]uint64, digests [buckets][16]byte, steady bool, err error) {
	before := r.applied()
	digests, err = r.opts.Table.Digests()
	return before, digests, maps.Equal(before, r.applied()), err
}

func (r *Replication) applied() map[journal.Stream]uint64 {
	ends, applied := r.opts.Log.Ends(), r.opts.Table.AppliedAll()
	out := make(map[journal.Stream]uint64, len(ends))
	for s := range ends {
		if applied[s] > 0 {
			out[s] = applied[s]
		}
	}
	return out
}

func (r *Replication) askDigests(ctx context.Context, peer string) (*replicationpb.DigestsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, compareTimeout)
	defer cancel()
	conn, err := r.opts.Dial(peer)
	if err != nil {
		return nil, fmt.Errorf("ask %s for digests: %w", peer, err)
	}
	got, err := replicationpb.NewReplicationClient(conn).Digests(ctx, &replicationpb.DigestsRequest{Format: wireFormat})
	if err != nil {
		return nil, fmt.Errorf("ask %s for digests: %w", peer, err)
	}
	return got, nil
}

func (r *Replication) repair(ctx context.Context, peer string, differ, before [buckets]bool) {
	for i := range buckets {
		if !differ[i] || !before[i] {
			continue
		}
		r.metrics.diverged.Inc()
		err := r.exchangeBucket(ctx, peer, i)
		r.opts.Logger.Error("the tables of two nodes with the same journals differ; merging the rows of a bucket both ways", "peer", peer, "bucket", i, "err", err)
	}
}

// exchangeBucket sends the rows of a bucket to a peer and merges the peer's rows.
func (r *Replication) exchangeBucket(ctx context.Context, peer string, bucket int) error {
	ctx, cancel := context.WithTimeout(ctx, repairTimeout)
	defer cancel()
	conn, err := r.opts.Dial(peer)
	if err != nil {
		return fmt.Errorf("join bucket with %s: %w", peer, err)
	}
	stream, err := replicationpb.NewReplicationClient(conn).Bucket(ctx)
	if err != nil {
		return fmt.Errorf("join bucket with %s: %w", peer, err)
	}
	if err := r.sendBucket(ctx, bucket, stream.Send); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("send bucket to %s: %w", peer, err)
	}
	if err := stream.CloseSend(); err != nil {
		return fmt.Errorf("send bucket to %s: %w", peer, err)
	}
	if _, err := r.receiveBucket(ctx, stream.Recv, nil); err != nil {
		return fmt.Errorf("receive bucket from %s: %w", peer, err)
	}
	return nil
}

// sendBucket sends all rows of a bucket, in at least one message.
func (r *Replication) sendBucket(ctx context.Context, bucket int, send func(*replicationpb.BucketRows) error) error {
	after := journal.JobID{}
	for more := true; more; {
		var rows []byte
		var err error
		if rows, after, more, err = r.opts.Table.Bucket(byte(bucket), after, pageBytes); err != nil {
			return err
		}
		if !pause(ctx, r.bulk.take(len(rows))) {
			return ctx.Err()
		}
		for piece, more := range pieces(rows) {
			if err := send(&replicationpb.BucketRows{Format: wireFormat, Bucket: uint32(bucket), Rows: piece, More: more}); err != nil {
				return err
			}
		}
	}
	return nil
}

// receiveBucket merges rows until the sender ends, and returns the bucket.
func (r *Replication) receiveBucket(ctx context.Context, recv func() (*replicationpb.BucketRows, error), first *replicationpb.BucketRows) (bucket int, err error) {
	var page []byte
	for m := first; ; m = nil {
		if m == nil {
			if m, err = recv(); errors.Is(err, io.EOF) {
				return bucket, nil
			} else if err != nil {
				return bucket, err
			}
		}
		bucket = int(m.GetBucket())
		if page = append(page, m.GetRows()...); len(page) > maxRow {
			return bucket, fmt.Errorf("%w: a page of a bucket", errWindowExceeded)
		}
		if m.GetMore() || len(page) == 0 {
			continue
		}
		if err := r.opts.Table.Merge(ctx, page); err != nil {
			return bucket, err
		}
		page = nil
	}
}

// Digests answers with the digests of this node's table.
func (s *server) Digests(ctx context.Context, q *replicationpb.DigestsRequest) (*replicationpb.DigestsResponse, error) {
	if _, err := s.caller(ctx, q.GetFormat()); err != nil {
		return nil, err
	}
	if s.r.opts.Table.Partial() {
		return nil, errPartial
	}
	applied, digests, steady, err := s.r.digests()
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	out := &replicationpb.DigestsResponse{Format: wireFormat, Applied: wireEnds(applied), Steady: steady}
	for _, d := range digests {
		out.Digests = append(out.Digests, d[:])
	}
	return out, nil
}

// Bucket merges a caller's rows and sends this node's.
func (s *server) Bucket(stream grpc.BidiStreamingServer[replicationpb.BucketRows, replicationpb.BucketRows]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if _, err := s.caller(stream.Context(), first.GetFormat()); err != nil {
		return err
	}
	if s.r.opts.Table.Partial() {
		return errPartial
	}
	ctx, leave, err := s.r.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	bucket, err := s.r.receiveBucket(ctx, stream.Recv, first)
	if err != nil {
		return err
	}
	return s.r.sendBucket(ctx, bucket, stream.Send)
}
