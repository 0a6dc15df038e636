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
	ErrUnknownStream = errors.New("no such job stream is agreed on")
	ErrStaleToken    = errors.New("the job stream has another owner or token by now")
	ErrStillMember   = errors.New("the node is a member, and executes its own job streams")
)

// maxStreamsPerNode bounds the streams of one origin. Each start opens one and
// drops the earlier ones when their last job has ended, so a node that can't
// finish anything runs into it after as many restarts.
const maxStreamsPerNode = 64

// maxDoneStreams bounds State.DoneStreams. A node that was away for longer keeps a
// journal that nobody asks for.
const maxDoneStreams = 1024

// FenceToken fences the owner of a stream: (generation, index of the raft entry
// that made it the owner). Both are compared, in this order.
type FenceToken struct {
	Generation uint64 `json:"generation"`
	Index      uint64 `json:"index"`
}

// Compare orders tokens; the higher one is the later owner.
func (t FenceToken) Compare(o FenceToken) int {
	return cmp.Or(cmp.Compare(t.Generation, o.Generation), cmp.Compare(t.Index, o.Index))
}

// JobStream is one incarnation of a node's job journal, as agreed: who executes
// what was submitted in it. It is agreed on from its opening until nothing in it
// is left to do.
type JobStream struct {
	Origin      string     `json:"origin"`      // the node that writes it
	Incarnation string     `json:"incarnation"` // 32 hex digits
	Site        string     `json:"site"`        // of the origin
	Owner       string     `json:"owner"`       // the node that executes
	Token       FenceToken `json:"token"`
	OpenedAt    time.Time  `json:"opened_at"`
	// Before is the owner before, empty when there was none. Its lease may still
	// run when the new owner hears of the change.
	Before  string    `json:"before,omitempty"`
	OwnedAt time.Time `json:"owned_at,omitzero"`
	Reason  string    `json:"reason,omitempty"`
}

// StreamKey is the key of State.Streams: origin/incarnation.
func StreamKey(origin, incarnation string) string { return origin + "/" + incarnation }

// Key is the stream's key in State.Streams.
func (j JobStream) Key() string { return StreamKey(j.Origin, j.Incarnation) }

// The data of the ownership commands. Each moves State.Ownership to its index.
type (
	// StreamOpen makes a node's new stream known; the node itself owns it.
	StreamOpen struct {
		Origin      string `json:"origin"`
		Incarnation string `json:"incarnation"`
	}
	// StreamOwn gives a stream to another node, if its token is still Expect.
	StreamOwn struct {
		Stream string     `json:"stream"`
		Owner  string     `json:"owner"`
		Expect FenceToken `json:"expect"`
		Reason string     `json:"reason"`
		// Term is that of the leader which decided it; it has no effect in another.
		Term uint64 `json:"term"`
	}
	// StreamInherit makes a stream known that its origin took alone and never
	// proposed before it was removed from the cluster. Owner has jobs of it; the first
	// to say so gets it.
	StreamInherit struct {
		Origin      string `json:"origin"`
		Incarnation string `json:"incarnation"`
		Owner       string `json:"owner"`
	}
	// StreamDrop forgets streams of which nothing is left to do. Who says so has to
	// be the owner; streams it no longer owns are left alone.
	StreamDrop struct {
		Owner   string   `json:"owner"`
		Streams []string `json:"streams"`
	}
)

// openStream is idempotent: a proposal whose answer was lost is made again.
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

// inheritStream counts the origin as the owner before, so that the new one waits.
// A removed node's site is not known any more.
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
		return fmt.Errorf("open job stream %s: it was done with: %w", key, ErrUnknownStream)
	}
	open := 0
	for _, other := range s.Streams {
		if other.Origin == j.Origin {
			open++
		}
	}
	if open >= maxStreamsPerNode {
		return fmt.Errorf("open a job stream of %s: it has %d with jobs that are not done: %w", j.Origin, open, ErrStateFull)
	}
	s.changeStream(key, &j, c)
	return nil
}

func (s *State) ownStream(d StreamOwn, c Command) error {
	if d.Term != c.Term {
		return fmt.Errorf("%w: the new owner of %s was decided in term %d, it came in term %d", ErrStaleTerm, d.Stream, d.Term, c.Term)
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

// changeStream puts or, with nil, removes a stream.
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

// StreamsOf gives the streams that a node owns, by key.
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
