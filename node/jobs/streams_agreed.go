package jobs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/journal"
)

var errNote = errors.New("write the file of island streams")

// propose proposes this node's streams to the cluster: the current one unless it must wait,
// then those with jobs that have not ended, then the others, so that all nodes drop them in
// the end. It leaves islands alone for which there is no room.
func (s *streams) propose(ctx context.Context) error {
	var full error
	for _, st := range s.unknown() {
		if open, room := s.openCount(), s.room(st); open >= room {
			if room == agreed.MaxStreamsPerNode {
				full = fmt.Errorf("%d streams of it have jobs that have not ended", open)
			}
			continue
		}
		if err := s.note(st); err != nil {
			return fmt.Errorf("%w: %w", errNote, err)
		}
		opening, stop := context.WithTimeout(ctx, openWait)
		token, err := s.o.Ownership.Open(opening, st.Incarnation.String())
		stop()
		if err != nil {
			return err
		}
		s.mu.Lock()
		if st == s.now {
			s.token, s.opened = journal.Token(token), time.Now()
		}
		s.mu.Unlock()
		s.log.Info("the cluster agreed on a job stream", "stream", st, "index", token.Index)
	}
	return full
}

// unknown are this node's streams that are not agreed on, in the order of proposal, without
// the current one if that must wait. A stream that was proposed before may have been dropped:
// then this node doesn't know yet how its jobs ended.
func (s *streams) unknown() []journal.Stream {
	live := s.o.Table.LiveCounts()
	current, _, _ := s.current()
	s.mu.Lock()
	wait := time.Now().Before(s.openAt)
	s.mu.Unlock()
	var todo []journal.Stream
	for st := range s.o.Journal.Ends() {
		if st.Origin == s.o.Node && (st != current || !wait || !s.island(st)) && !s.known(st) {
			todo = append(todo, st)
		}
	}
	rank := func(st journal.Stream) int {
		switch {
		case st == current:
			return 0
		case live[st] > 0:
			return 1
		}
		return 2
	}
	slices.SortFunc(todo, func(a, b journal.Stream) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(keyOf(a), keyOf(b)))
	})
	return todo
}

// room is how many agreed streams of this node there may be before this one is proposed.
func (s *streams) room(st journal.Stream) int {
	current, _, _ := s.current()
	switch {
	case st != current && s.o.Table.LiveCounts()[st] == 0:
		return maxOpenDone
	case s.island(st):
		return maxOpen
	}
	return agreed.MaxStreamsPerNode
}

// inherit asks for the island streams of nodes that were removed from the cluster, if this
// node has jobs of them that have not ended. By the removal an operator has confirmed that
// their node does not come back.
func (s *streams) inherit(ctx context.Context, c *upkeep) {
	for st, jobs := range s.o.Table.LiveCounts() {
		if jobs == 0 || st.Origin == s.o.Node || s.member(st.Origin) || s.known(st) {
			continue
		}
		asking, stop := context.WithTimeout(ctx, openWait)
		err := s.o.Ownership.Inherit(asking, st.Origin, st.Incarnation.String())
		stop()
		if err != nil {
			c.retryAt = time.Now().Add(retryWait)
			s.log.Warn("can't inherit the jobs of a removed node yet", "stream", st, "jobs", jobs, "err", err)
			return
		}
		s.log.Warn("inherited an island stream of a removed node", "stream", st, "jobs", jobs)
	}
}

// member reports whether a node belongs to the cluster. It is true while this node does not
// know the members.
func (s *streams) member(node string) bool {
	state := s.o.State()
	if state.ClusterID == "" {
		return true
	}
	_, member := state.Nodes[node]
	return member
}

// note removes a stream from the islands, because it is going to be proposed.
func (s *streams) note(st journal.Stream) error {
	s.mu.Lock()
	islands := maps.Clone(s.islands)
	s.mu.Unlock()
	if _, island := islands[st]; !island {
		return nil
	}
	delete(islands, st)
	if err := writeIslands(s.path, islands); err != nil { // only this goroutine writes the file
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.islands = islands
	return nil
}

// drop drops the agreed streams whose jobs have all ended. A stream of another node may have
// records that only its origin has, so it is dropped only when no more can come.
func (s *streams) drop(ctx context.Context, x *executor) {
	current, _, _ := s.current()
	var done []string
	var foreign []agreed.JobStream
	for _, j := range s.o.Ownership.Mine() {
		st, ok := streamOf(j)
		// A stream that was not taken over may only look as if all its jobs had ended: a
		// disk that was lost has no jobs.
		switch {
		case !ok || st == current || !s.idle(st, x) || !x.has(st) || !s.o.Replication.Spread(st):
		case st.Origin == s.o.Node:
			done = append(done, j.Key())
		default:
			foreign = append(foreign, j)
		}
	}
	done = append(done, s.ended(ctx, foreign, x)...)
	if len(done) == 0 {
		return
	}
	dropping, stop := context.WithTimeout(ctx, openWait)
	defer stop()
	if err := s.o.Ownership.Drop(dropping, done...); err != nil {
		s.log.Warn("can't drop job streams whose jobs have ended", "streams", len(done), "err", err)
		return
	}
	s.log.Info("dropped job streams whose jobs have ended", "streams", done)
}

func streamOf(j agreed.JobStream) (journal.Stream, bool) {
	i, err := journal.ParseIncarnation(j.Incarnation)
	return journal.Stream{Origin: j.Origin, Incarnation: i}, err == nil
}

// idle reports whether no job of a stream is left to do.
func (s *streams) idle(st journal.Stream, x *executor) bool {
	return s.o.Table.LiveCounts()[st] == 0 && x.live(st) == 0
}

// ended returns the keys of those streams of other nodes that get no more records, whose
// records are all here, and whose jobs have ended.
func (s *streams) ended(ctx context.Context, foreign []agreed.JobStream, x *executor) (keys []string) {
	if len(foreign) == 0 {
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	if s.o.Replication.AwaitCaughtUp(ctx) != nil {
		return nil
	}
	ended, err := s.o.Replication.AwaitEnded(ctx)
	if err != nil {
		return nil
	}
	for _, j := range foreign {
		st, _ := streamOf(j)
		if (ended(st) || !s.member(j.Origin) || s.movedOn(j)) && s.idle(st, x) {
			keys = append(keys, j.Key())
		}
	}
	return keys
}

// movedOn reports whether the origin of a stream is heard and writes to a later agreed one:
// then this stream gets no more records. Nodes of older versions don't say which streams
// they write.
func (s *streams) movedOn(j agreed.JobStream) bool {
	if !s.o.Heard(j.Origin) {
		return false
	}
	for _, later := range s.o.State().Streams {
		if later.Origin == j.Origin && later.Owner == j.Origin && later.Before == "" && later.OpenedAt.After(j.OpenedAt) {
			return true
		}
	}
	return false
}
