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

// failingStore is a shared tier whose reads and writes fail while the test wants it.
type failingStore struct {
	noReads, noWrites atomic.Bool
	puts              atomic.Int64
}

var errFailing = errors.New("OOM command not allowed")

func fails(when *atomic.Bool) error {
	if when.Load() {
		return errFailing
	}
	return nil
}

func (p *failingStore) get(context.Context, Key) ([]byte, error) { return nil, fails(&p.noReads) }
func (p *failingStore) put(context.Context, []Entry, time.Duration) error {
	p.puts.Add(1)
	return fails(&p.noWrites)
}
func (p *failingStore) drop(context.Context, []Key) error      { return fails(&p.noWrites) }
func (p *failingStore) sweep(context.Context, time.Time) error { return nil }
func (p *failingStore) ping(context.Context) error             { return fails(&p.noReads) }
func (*failingStore) size() (entries, bytes int64, known bool) { return 0, 0, false }
func (*failingStore) close() error                             { return nil }

// TestFullTier: a tier whose writes fail is still read, and a write now and then finds out
// whether writing works again.
func TestFullTier(t *testing.T) {
	r := newRig(t, nil, embeddedTier)
	p := &failingStore{}
	var changes []string
	note := func(what string) func(bool, error) {
		return func(open bool, _ error) { changes = append(changes, fmt.Sprint(what, open)) }
	}
	s := newShared(p, note("reads "), note("writes "))
	r.shared.Store(s)
	defer r.shared.Store(nil)
	p.noWrites.Store(true)
	for range 50 {
		_ = s.put(t.Context(), nil, time.Hour)
		if _, err := s.get(t.Context(), Key{}); err != nil {
			t.Fatalf("get: %v", err)
		}
	}
	if st := r.Stats().Shared; st.State != "read-only" || st.Reason != errFailing.Error() {
		t.Errorf("%+v", st)
	}
	if n := p.puts.Load(); n != failureLimit {
		t.Errorf("%d writes", n)
	}
	s.try(t.Context())
	_, _ = s.put(t.Context(), nil, time.Hour), s.put(t.Context(), nil, time.Hour)
	if n := p.puts.Load(); n != failureLimit+1 || !s.writes.isOpen() {
		t.Errorf("%d writes", n)
	}
	p.noWrites.Store(false)
	s.try(t.Context())
	if err := s.put(t.Context(), nil, time.Hour); err != nil || r.Stats().Shared.State != "ok" {
		t.Errorf("%v, %+v", err, r.Stats().Shared)
	}
	if got := strings.Join(changes, ", "); got != "writes true, writes false" {
		t.Errorf("changes: %s", got)
	}
}

// TestFailureRate: the breaker opens when a third of the commands fail, not when one of
// five does. Only reset closes it.
func TestFailureRate(t *testing.T) {
	for _, c := range []struct {
		every int
		opens bool
	}{{1, true}, {2, true}, {3, true}, {5, false}, {20, false}} {
		var b breaker
		b.changed = func(bool, error) {}
		for i := range 300 {
			if i%c.every == 0 {
				b.note(errFailing)
			} else {
				b.note(nil)
			}
		}
		if b.isOpen() != c.opens {
			t.Errorf("one of %d fails: open is %v", c.every, b.isOpen())
		}
		if b.reset(); b.isOpen() {
			t.Error("reset did not close it")
		}
	}
}

// TestBreakerReason: an error replaces a timeout as the reason, not the other way round.
func TestBreakerReason(t *testing.T) {
	p := &failingStore{}
	p.noReads.Store(true)
	s := newShared(p, func(bool, error) {}, func(bool, error) {})
	s.reads.trip(context.DeadlineExceeded)
	s.try(t.Context())
	if s.reads.reason() != errFailing.Error() {
		t.Errorf("%q", s.reads.reason())
	}
	s.reads.trip(fmt.Errorf("slow: %w", context.DeadlineExceeded))
	if s.reads.reason() != errFailing.Error() {
		t.Errorf("%q", s.reads.reason())
	}
}
