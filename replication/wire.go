package replication

import (
	"context"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

// wireFormat is the version of the messages that this version sends and reads.
const wireFormat = 1

// Values of PullRequest.snapshots.
const (
	snapshotsOff = 1
	snapshotsOn  = 2
)

// server implements the rpc service of a Replication.
type server struct {
	replicationpb.UnimplementedReplicationServer
	r *Replication
}

// callerOf returns the peer's name from the mesh connection.
func callerOf(ctx context.Context) (string, bool) {
	id, ok := mesh.PeerFromContext(ctx)
	return id.Node, ok
}

// caller returns the calling member.
func (s *server) caller(ctx context.Context, format uint32) (string, error) {
	node, ok := s.r.opts.Caller(ctx)
	if !ok {
		return "", status.Error(codes.Unauthenticated, "no peer identity")
	}
	if format > wireFormat {
		return "", status.Errorf(codes.FailedPrecondition, "replication format %d, this node reads %d", format, wireFormat)
	}
	if !slices.ContainsFunc(s.r.opts.Members(), func(m Member) bool { return m.Node == node }) {
		return "", status.Errorf(codes.PermissionDenied, "node %s is not a member", node)
	}
	return node, nil
}

func wireStream(s journal.Stream) *replicationpb.Stream {
	return &replicationpb.Stream{Origin: s.Origin, Incarnation: s.Incarnation[:]}
}

func readStream(s *replicationpb.Stream) (journal.Stream, error) {
	origin, inc := s.GetOrigin(), s.GetIncarnation()
	if origin == "" || len(origin) > journal.MaxOrigin || len(inc) != len(journal.Incarnation{}) {
		return journal.Stream{}, status.Error(codes.InvalidArgument, "invalid stream name")
	}
	return journal.Stream{Origin: origin, Incarnation: journal.Incarnation(inc)}, nil
}

func wireEnds(ends map[journal.Stream]uint64) []*replicationpb.StreamSeq {
	out := make([]*replicationpb.StreamSeq, 0, len(ends))
	for s, seq := range ends {
		out = append(out, &replicationpb.StreamSeq{Stream: wireStream(s), Seq: seq})
	}
	return out
}

func readEnds(ends []*replicationpb.StreamSeq) (map[journal.Stream]uint64, error) {
	out := make(map[journal.Stream]uint64, len(ends))
	for _, e := range ends {
		s, err := readStream(e.GetStream())
		if err != nil {
			return nil, err
		}
		out[s] = e.GetSeq()
	}
	return out, nil
}

func wireMarks(m Watermarks) []*replicationpb.HolderMarks {
	out := make([]*replicationpb.HolderMarks, 0, len(m))
	for holder, h := range m {
		out = append(out, &replicationpb.HolderMarks{Holder: holder, Epoch: h.Epoch, Marks: wireEnds(h.Ends)})
	}
	return out
}

func readMarks(marks []*replicationpb.HolderMarks) (Watermarks, error) {
	out := make(Watermarks, len(marks))
	for _, h := range marks {
		ends, err := readEnds(h.GetMarks())
		if err != nil {
			return nil, err
		}
		out[h.GetHolder()] = Held{Epoch: h.GetEpoch(), Ends: ends}
	}
	return out, nil
}
