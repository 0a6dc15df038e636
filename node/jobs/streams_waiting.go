package jobs

import (
	"cmp"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// waiting are the streams of this node that are no islands and not agreed on, so that no
// node can start their jobs.
type waiting struct {
	since time.Time // zero: there are none
	// refused is since when the stream that this node writes is one, or there is none to
	// write; zero: new jobs can start.
	refused time.Time
	jobs    int64
	why     error // of the last proposal that failed, nil: none did
}

// disowned notes that another node got the written stream. The next stream is proposed at once
// if this node was away, because it did not run or had no lease, and the first time.
func (s *streams) disowned(c *upkeep, current journal.Stream, now time.Time, ran bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.lost == current { // no new stream could be begun
		return
	}
	c.lost = current
	if !ran || s.leased.IsZero() || now.Sub(s.leased) < disownedFirst && !s.opened.After(s.leased) {
		return
	}
	if now.Sub(c.lostAt) > calmAfter {
		s.losses = 0
	}
	if s.losses > 0 {
		s.openAt = now.Add(min(disownedFirst<<min(s.losses-1, 10), disownedMost))
	}
	s.losses++
	c.lostAt = now
}

// noteWaiting notes which streams of this node no node can execute now. failed is the error
// of a proposal that was just made, if any.
func (s *streams) noteWaiting(now time.Time, failed error) {
	current, _, begun := s.current()
	live := s.o.Table.LiveCounts()
	found, refuses, jobs := !begun, !begun, int64(0)
	for st := range s.o.Journal.Ends() {
		if st.Origin == s.o.Node && (st == current || live[st] > 0) && !s.known(st) && !s.island(st) {
			found, refuses, jobs = true, refuses || st == current, jobs+live[st]
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.waiting
	s.waiting = waiting{jobs: jobs}
	if found {
		s.waiting.since = earlier(was.since, now)
		s.waiting.why = cmp.Or(failed, was.why)
	}
	if refuses {
		s.waiting.refused = earlier(was.refused, now)
	}
}

// earlier is since, or now if since is not set.
func earlier(since, now time.Time) time.Time {
	if since.IsZero() {
		return now
	}
	return since
}

// accepts is nil when the jobs that this node accepts now can start, or soon will. The error
// wraps ErrNoStream.
func (s *streams) accepts() error {
	s.mu.Lock()
	since := s.waiting.refused
	s.mu.Unlock()
	if since.IsZero() || time.Since(since) < refuseAfter {
		return nil
	}
	return fmt.Errorf("%w since %s", ErrNoStream, since.UTC().Format(time.RFC3339))
}

// problem says in words why jobs that this node accepted, or would accept, can't start, or are
// not safe from the loss of this node; empty: nothing is wrong.
func (s *streams) problem() string {
	s.mu.Lock()
	w, now, begun, leased, losses, openAt := s.waiting, s.now, s.begun, !s.leased.IsZero(), s.losses, s.openAt
	s.mu.Unlock()
	alone := leased && begun && s.island(now)
	switch open := s.openCount(); {
	case !w.since.IsZero() && time.Since(w.since) >= refuseAfter:
		why := "the raft leader has not answered"
		if w.why != nil {
			why = w.why.Error()
		}
		text := fmt.Sprintf("the cluster has not agreed on a job stream of it for %s (%s)", time.Since(w.since).Round(time.Second), why)
		if !begun {
			text = fmt.Sprintf("it can't begin a job stream (%s)", why)
		}
		if w.jobs > 0 {
			text += fmt.Sprintf(": %d jobs that it accepted wait", w.jobs)
		}
		if !w.refused.IsZero() {
			text += "; it refuses new jobs, send them to other nodes"
		}
		return text
	case alone && open >= maxOpen:
		return fmt.Sprintf("it has %d job streams whose jobs have not ended, too many to open another one: until some have ended "+
			"it runs new jobs alone, and no other node takes them over if it is lost", open)
	case alone && time.Now().Before(openAt):
		return fmt.Sprintf("the raft leader gave its job stream to another node %d times in a row, although it runs: until %s it runs new jobs "+
			"alone, and no other node takes them over if it is lost; check its connections to the leader", losses, openAt.UTC().Format(time.TimeOnly))
	}
	return ""
}

// openCount is how many agreed streams this node has written, whoever owns them.
func (s *streams) openCount() int {
	count := 0
	for _, j := range s.o.State().Streams {
		if j.Origin == s.o.Node {
			count++
		}
	}
	return count
}
