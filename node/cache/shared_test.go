package cache

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// partly is a shared tier of which reads and writes fail as told.
type partly struct {
	noReads, noWrites atomic.Bool
	puts              atomic.Int64
}

var errPartly = errors.New("OOM command not allowed")

func fails(when *atomic.Bool) error {
	if when.Load() {
		return errPartly
	}
	return nil
}

func (p *partly) get(context.Context, Key) ([]byte, error) { return nil, fails(&p.noReads) }
func (p *partly) put(context.Context, []Entry, time.Duration) error {
	p.puts.Add(1)
	return fails(&p.noWrites)
}
func (p *partly) drop(context.Context, []Key) error      { return fails(&p.noWrites) }
func (p *partly) sweep(context.Context, time.Time) error { return nil }
func (p *partly) ping(context.Context) error             { return fails(&p.noReads) }
func (*partly) size() (entries, bytes int64, known bool) { return 0, 0, false }
func (*partly) close() error                             { return nil }

// TestATierThatIsFull takes nothing, but what it has is used, and one write now
// and then finds out whether it has room again.
func TestATierThatIsFull(t *testing.T) {
	r := newRig(t, nil, embeddedTier)
	p := &partly{}
	var moves []string
	note := func(what string) func(bool, error) {
		return func(open bool, _ error) { moves = append(moves, fmt.Sprint(what, open)) }
	}
	s := newShared(p, note("reads "), note("writes "))
	r.shared.Store(s)
	defer r.shared.Store(nil)
	p.noWrites.Store(true)
	for range 50 {
		_ = s.put(t.Context(), nil, time.Hour)
		if _, err := s.get(t.Context(), Key{}); err != nil {
			t.Fatalf("a look: %v", err)
		}
	}
	if st := r.Stats().Shared; st.State != "read-only" || st.Reason != errPartly.Error() {
		t.Errorf("%+v", st)
	}
	if n := p.puts.Load(); n != patience {
		t.Errorf("written to %d times", n)
	}
	s.try(t.Context())
	_, _ = s.put(t.Context(), nil, time.Hour), s.put(t.Context(), nil, time.Hour)
	if n := p.puts.Load(); n != patience+1 || !s.writes.resting() {
		t.Errorf("written to %d times", n)
	}
	p.noWrites.Store(false)
	s.try(t.Context())
	if err := s.put(t.Context(), nil, time.Hour); err != nil || r.Stats().Shared.State != "ok" {
		t.Errorf("%v, %+v", err, r.Stats().Shared)
	}
	if got := strings.Join(moves, ", "); got != "writes true, writes false" {
		t.Errorf("moves: %s", got)
	}
}

// TestATierOfWhichAThirdFails is left alone in the end, one that fails now and
// then is not; and only what was asked for it says that it is back.
func TestATierOfWhichAThirdFails(t *testing.T) {
	for _, c := range []struct {
		every int
		rests bool
	}{{1, true}, {2, true}, {3, true}, {5, false}, {20, false}} {
		var b breaker
		b.moved = func(bool, error) {}
		for i := range 300 {
			if i%c.every == 0 {
				b.note(errPartly)
			} else {
				b.note(nil)
			}
		}
		if b.resting() != c.rests {
			t.Errorf("one of %d fails: rests %v", c.every, b.resting())
		}
		if b.mend(); b.resting() {
			t.Error("it is not mended")
		}
	}
}

// TestWhyATierRests: words take the place of no answer, not the other way round.
func TestWhyATierRests(t *testing.T) {
	p := &partly{}
	p.noReads.Store(true)
	s := newShared(p, func(bool, error) {}, func(bool, error) {})
	s.reads.trip(context.DeadlineExceeded)
	s.try(t.Context())
	if s.reads.reason() != errPartly.Error() {
		t.Errorf("%q", s.reads.reason())
	}
	s.reads.trip(fmt.Errorf("slow: %w", context.DeadlineExceeded))
	if s.reads.reason() != errPartly.Error() {
		t.Errorf("%q", s.reads.reason())
	}
}
