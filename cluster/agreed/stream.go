package agreed

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// Refusals of the ownership commands.
var (
	ErrUnknownStream = errors.New("no such job stream")
	ErrStaleToken    = errors.New("the job stream has another owner or token")
	ErrStillMember   = errors.New("the node is still a member and executes its own job streams")
)

// MaxStreamsPerNode bounds the streams of one origin. Each start of a node opens
// one; a stream is dropped when its last job has ended. Nodes open a new one only
// while they have far fewer (node/jobs).
const MaxStreamsPerNode = 64

// maxDoneStreams bounds State.DoneStreams. A node that was offline for more drops
// than that keeps a journal which no node needs.
const maxDoneStreams = 1024

// FenceToken is the fencing token of a stream's owner: the generation, then the
// index of the raft entry that made it the owner.
type FenceToken struct {
	Generation uint64 `json:"generation"`
	Index      uint64 `json:"index"`
}

// Compare orders tokens: a later owner has a higher one.
func (t FenceToken) Compare(o FenceToken) int {
	return cmp.Or(cmp.Compare(t.Generation, o.Generation), cmp.Compare(t.Index, o.Index))
}

// JobStream is one incarnation of a node's job journal, and the node that executes
// its jobs. The agreed state has it from its opening until all its jobs have ended.
type JobStream struct {
	Origin      string     `json:"origin"`      // the node that writes it
	Incarnation string     `json:"incarnation"` // 32 hex digits
	Site        string     `json:"site"`        // of the origin
	Owner       string     `json:"owner"`       // the node that executes
	Token       FenceToken `json:"token"`
	OpenedAt    time.Time  `json:"opened_at"`
	// Before is the previous owner, empty if there was none. Its lease may still be
	// valid when the new owner learns of the change.
	Before  string    `json:"before,omitempty"`
	OwnedAt time.Time `json:"owned_at,omitzero"`
	Reason  string    `json:"reason,omitempty"`
}

// StreamKey is the key of State.Streams: origin/incarnation.
func StreamKey(origin, incarnation string) string { return origin + "/" + incarnation }

// Key is the stream's key in State.Streams.
func (j JobStream) Key() string { return StreamKey(j.Origin, j.Incarnation) }

// The data of the ownership commands. Each one that changes a stream sets
// State.Ownership to its raft index.
type (
	// StreamOpen adds a node's new stream, owned by the node itself.
	StreamOpen struct {
		Origin      string `json:"origin"`
		Incarnation string `json:"incarnation"`
	}
	// StreamOwn gives a stream to another node if its token is still Expect.
	StreamOwn struct {
		Stream string     `json:"stream"`
		Owner  string     `json:"owner"`
		Expect FenceToken `json:"expect"`
		Reason string     `json:"reason"`
		// Term is the term in which the leader decided it. It is refused in any other.
		Term uint64 `json:"term"`
	}
	// StreamInherit adds a stream that its origin opened without a quorum and never
	// proposed before it was removed from the cluster. Owner is a node that has jobs
	// of it; the first node to propose this becomes the owner.
	StreamInherit struct {
		Origin      string `json:"origin"`
		Incarnation string `json:"incarnation"`
		Owner       string `json:"owner"`
	}
	// StreamDrop removes streams whose jobs have all ended. Streams that Owner does
	// not own are left alone.
	StreamDrop struct {
		Owner   string   `json:"owner"`
		Streams []string `json:"streams"`
	}
)

// openStream is idempotent: a node repeats a proposal whose response was lost.
func (s *State) openStream(d StreamOpen, c Command) error {
	node, member := s.Nodes[d.Origin]
	if !member {
		return fmt.Errorf("open a job stream of %s: %w", d.Origin, ErrUnknownNode)
	}
	return s.newStream(JobStream{
		Origin: d.Origin, Incarnation: d.Incarnation, Site: node.Site, Owner: d.Origin,
		Token: s.fence(c), OpenedAt: c.At,
	}, c)
}

// inheritStream records the origin as the previous owner, so that the new owner
// waits until the origin's lease has ended. The site is that of the new owner,
// because the state no longer has the removed node's site.
func (s *State) inheritStream(d StreamInherit, c Command) error {
	if _, member := s.Nodes[d.Origin]; member {
		return fmt.Errorf("inherit a job stream of %s: %w", d.Origin, ErrStillMember)
	}
	owner, member := s.Nodes[d.Owner]
	if !member {
		return fmt.Errorf("give a job stream of %s to %s: %w", d.Origin, d.Owner, ErrUnknownNode)
	}
	if !config.ValidName(d.Origin) {
		return fmt.Errorf("inherit a job stream of %q: %w", d.Origin, ErrUnknownNode)
	}
	return s.newStream(JobStream{
		Origin: d.Origin, Incarnation: d.Incarnation, Site: owner.Site, Owner: d.Owner,
		Token: s.fence(c), OpenedAt: c.At, Before: d.Origin, OwnedAt: c.At, Reason: "owner_removed",
	}, c)
}

func (s *State) newStream(j JobStream, c Command) error {
	if len(j.Incarnation) != 32 || strings.Trim(j.Incarnation, "0123456789abcdef") != "" {
		return fmt.Errorf("open a job stream of %s: incarnation %q is not 32 hex digits", j.Origin, j.Incarnation)
	}
	key := j.Key()
	if _, known := s.Streams[key]; known {
		return nil
	}
	if slices.Contains(s.DoneStreams, key) {
		return fmt.Errorf("open job stream %s: it was dropped after its last job: %w", key, ErrUnknownStream)
	}
	open := 0
	for _, other := range s.Streams {
		if other.Origin == j.Origin {
			open++
		}
	}
	if open >= MaxStreamsPerNode {
		return fmt.Errorf("open a job stream of %s: it has %d streams with unfinished jobs: %w", j.Origin, open, ErrStateFull)
	}
	s.changeStream(key, &j, c)
	return nil
}

func (s *State) ownStream(d StreamOwn, c Command) error {
	if d.Term != c.Term {
		return fmt.Errorf("%w: the new owner of %s was decided in term %d and committed in term %d", ErrStaleTerm, d.Stream, d.Term, c.Term)
	}
	j, known := s.Streams[d.Stream]
	if !known {
		return fmt.Errorf("%w: %s", ErrUnknownStream, d.Stream)
	}
	if _, member := s.Nodes[d.Owner]; !member {
		return fmt.Errorf("give %s to %s: %w", d.Stream, d.Owner, ErrUnknownNode)
	}
	if j.Token != d.Expect {
		return fmt.Errorf("%w: %s belongs to %s since entry %d, expected entry %d", ErrStaleToken, d.Stream, j.Owner, j.Token.Index, d.Expect.Index)
	}
	if j.Owner == d.Owner {
		return nil
	}
	j.Before, j.Owner, j.Token, j.OwnedAt, j.Reason = j.Owner, d.Owner, s.fence(c), c.At, d.Reason
	s.changeStream(d.Stream, &j, c)
	return nil
}

func (s *State) dropStreams(d StreamDrop, c Command) error {
	for _, key := range d.Streams {
		if j, known := s.Streams[key]; known && j.Owner == d.Owner {
			s.changeStream(key, nil, c)
			s.DoneStreams = append(slices.Clone(s.DoneStreams), key)
			s.DoneStreams = s.DoneStreams[max(0, len(s.DoneStreams)-maxDoneStreams):]
		}
	}
	return nil
}

func (s *State) fence(c Command) FenceToken {
	return FenceToken{Generation: s.Generation.Number, Index: c.Index}
}

// changeStream sets a stream, or removes it if j is nil.
func (s *State) changeStream(key string, j *JobStream, c Command) {
	s.Streams = maps.Clone(s.Streams)
	if j == nil {
		delete(s.Streams, key)
	} else {
		if s.Streams == nil {
			s.Streams = map[string]JobStream{}
		}
		s.Streams[key] = *j
	}
	s.Ownership = c.Index
}

// StreamsOf returns the streams that a node owns, sorted by key.
func (s *State) StreamsOf(owner string) []JobStream {
	var own []JobStream
	for _, j := range s.Streams {
		if j.Owner == owner {
			own = append(own, j)
		}
	}
	slices.SortFunc(own, func(a, b JobStream) int { return strings.Compare(a.Key(), b.Key()) })
	return own
}
