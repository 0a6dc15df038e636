package failover

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// fakeStanding is a Standing that a test changes by hand.
type fakeStanding struct {
	mu    sync.Mutex // guards what follows
	start time.Time
	state agreed.State
	until time.Duration
	epoch uint64
	news  chan struct{}
}

func newFakeStanding(site string) *fakeStanding {
	return &fakeStanding{
		start: time.Now(), news: make(chan struct{}), until: time.Hour,
		state: agreed.State{ClusterID: "c", Primary: agreed.Primary{Site: site, Epoch: 1}},
	}
}

func (st *fakeStanding) now() time.Duration { return time.Since(st.start) }

func (st *fakeStanding) State() *agreed.State {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := st.state
	return &s
}

func (st *fakeStanding) Changed() <-chan struct{} {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.news
}

func (st *fakeStanding) Lease() (time.Duration, uint64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.until - st.now(), st.epoch
}

func (st *fakeStanding) OwnershipLease() (time.Duration, uint64) {
	left, _ := st.Lease()
	return left, 0
}

func (st *fakeStanding) LeaseChanged() <-chan struct{} { return st.Changed() }

func (st *fakeStanding) change(f func()) {
	st.mu.Lock()
	defer st.mu.Unlock()
	f()
	close(st.news)
	st.news = make(chan struct{})
}

func (st *fakeStanding) promote(site string, epoch uint64, released bool) {
	st.change(func() {
		st.state.Primary = agreed.Primary{Site: site, Epoch: epoch, Released: released}
		st.state.Switchover = nil
	})
}

const newLeaderWait = 1320 * time.Millisecond

// withFence runs a test with the Fence of a node of site a, in virtual time.
func withFence(t *testing.T, primary string, test func(t *testing.T, st *fakeStanding, f *Fence)) {
	synctest.Test(t, func(t *testing.T) {
		st := newFakeStanding(primary)
		f := NewFence("a1", "a", st, func() time.Duration { return newLeaderWait }, st.now, slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() {
			if err := f.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		defer running.Wait()
		defer stop()
		synctest.Wait()
		test(t, st, f)
	})
}

func after(t *testing.T, d time.Duration) {
	t.Helper()
	if err := wait(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

// awaitActing blocks until Run notices that this node may act as primary, and
// gives the epoch.
func awaitActing(t *testing.T, f *Fence) uint64 {
	t.Helper()
	for {
		f.mu.Lock()
		acting, epoch, change := f.acting, f.epoch, f.change
		f.mu.Unlock()
		if acting {
			return epoch
		}
		select {
		case <-change:
		case <-t.Context().Done():
			t.Fatal("the test ended before this node could act as primary")
		}
	}
}

func TestPrimaryActsWhenOldLeasesHaveEnded(t *testing.T) {
	for _, c := range []struct {
		name     string
		released bool
		jump     uint64
		want     time.Duration
	}{
		{"unplanned", false, 1, newLeaderWait},
		{"all nodes of the primary before confirmed", true, 1, 0},
		{"an epoch was missed", true, 2, newLeaderWait},
	} {
		t.Run(c.name, func(t *testing.T) {
			withFence(t, "b", func(t *testing.T, st *fakeStanding, f *Fence) {
				after(t, time.Minute)
				if f.Acting() {
					t.Error("acts as primary, and another site is it")
				}
				began := time.Now()
				st.promote("a", 1+c.jump, c.released)
				if epoch := awaitActing(t, f); epoch != 1+c.jump {
					t.Errorf("epoch %d", epoch)
				}
				if took := time.Since(began); took < c.want || took > c.want {
					t.Errorf("acts after %s, want %s", took, c.want)
				}
			})
		})
	}
}

// Released is about the primary before, not about the one before that.
func TestReleasedDoesNotShortenAnEarlierWait(t *testing.T) {
	withFence(t, "c", func(t *testing.T, st *fakeStanding, f *Fence) {
		after(t, time.Minute)
		began := time.Now()
		st.promote("b", 2, false)
		after(t, 500*time.Millisecond)
		st.promote("a", 3, true)
		awaitActing(t, f)
		if took := time.Since(began); took < newLeaderWait {
			t.Errorf("acts %s after an unplanned promotion", took)
		}
	})
}

func TestRestartedNodeWaitsTwice(t *testing.T) {
	withFence(t, "a", func(t *testing.T, st *fakeStanding, f *Fence) {
		if f.Acting() {
			t.Error("it acts at once")
		}
		if left, known := f.StartWait(); !known || left != 2*newLeaderWait {
			t.Errorf("after the start it waits for %s (known: %v), want %s", left, known, 2*newLeaderWait)
		}
		awaitActing(t, f)
		if left, known := f.StartWait(); !known || left != 0 {
			t.Errorf("it acts, and waits for another %s (known: %v)", left, known)
		}
		if at := st.now(); at < 2*newLeaderWait {
			t.Errorf("acts %s after its start", at)
		}
	})
}

func TestPrimaryContextEnds(t *testing.T) {
	for name, end := range map[string]func(st *fakeStanding){
		"another primary":      func(st *fakeStanding) { st.promote("b", 2, false) },
		"another epoch":        func(st *fakeStanding) { st.promote("a", 2, true) },
		"the lease ends":       func(st *fakeStanding) { st.change(func() { st.until = st.now() }) },
		"a higher epoch heard": func(st *fakeStanding) { st.change(func() { st.epoch = 2 }) },
		"a switchover away": func(st *fakeStanding) {
			st.change(func() { st.state.Switchover = &agreed.Switchover{ID: "x", From: "a", To: "b"} })
		},
	} {
		t.Run(name, func(t *testing.T) {
			withFence(t, "a", func(t *testing.T, st *fakeStanding, f *Fence) {
				awaitActing(t, f)
				ctx, done := f.WhilePrimary(t.Context())
				defer done()
				if ctx.Err() != nil {
					t.Fatalf("ended at once: %v", context.Cause(ctx))
				}
				permit, err := f.Check(Primary)
				if err != nil || !permit.InTime() || permit.Token != (agreed.FenceToken{Index: 1}) {
					t.Fatalf("%+v, %v", permit, err)
				}
				began := time.Now()
				end(st)
				<-ctx.Done()
				if !errors.Is(context.Cause(ctx), ErrNotPrimary) {
					t.Errorf("cause %v", context.Cause(ctx))
				}
				if took := time.Since(began); took > 0 {
					t.Errorf("ended %s late", took)
				}
				if name != "another epoch" {
					if _, err := f.Check(Primary); !errors.Is(err, ErrNotPrimary) {
						t.Errorf("check afterwards: %v", err)
					}
				}
			})
		})
	}
}

// quietly makes a change that closes no channel, as a lease that is extended does.
func (st *fakeStanding) quietly(f func()) {
	st.mu.Lock()
	defer st.mu.Unlock()
	f()
}

// No channel closes when a lease ends. Contexts end at that moment all the same,
// and not before it, however often the lease was extended.
func TestPrimaryContextEndsWithTheLease(t *testing.T) {
	for name, hold := range map[string]bool{"work runs": true, "nothing runs": false} {
		t.Run(name, func(t *testing.T) {
			withFence(t, "a", func(t *testing.T, st *fakeStanding, f *Fence) {
				const lease = 1200 * time.Millisecond
				awaitActing(t, f)
				ctx, done := f.WhilePrimary(t.Context())
				defer done()
				if !hold {
					done()
				}
				st.quietly(func() { st.until = st.now() + lease })
				for range 20 {
					after(t, 250*time.Millisecond)
					st.quietly(func() { st.until = st.now() + lease })
				}
				if hold && ctx.Err() != nil {
					t.Fatalf("ended although there was a lease: %v", context.Cause(ctx))
				}
				after(t, lease-time.Millisecond)
				if !f.Acting() || (hold && ctx.Err() != nil) {
					t.Fatalf("ended before the lease: %v", context.Cause(ctx))
				}
				after(t, time.Millisecond)
				if hold && !errors.Is(context.Cause(ctx), ErrNotPrimary) {
					t.Errorf("the lease has ended, and the context says %v", context.Cause(ctx))
				}
				f.mu.Lock()
				holding := f.acting
				f.mu.Unlock()
				if holding {
					t.Error("the lease has ended, and Run did not notice")
				}
				began := time.Now()
				go func() {
					_ = wait(t.Context(), 5*time.Second) // the test's end is not before
					st.change(func() { st.until = st.now() + lease })
				}()
				if awaitActing(t, f); time.Since(began) != 5*time.Second {
					t.Errorf("acts again %s after a lease began at 5 s", time.Since(began))
				}
			})
		})
	}
}

// While the machine is suspended its timers stop, and the clock of leases goes on.
func TestPrimaryContextEndsAfterSuspend(t *testing.T) {
	withFence(t, "a", func(t *testing.T, st *fakeStanding, f *Fence) {
		awaitActing(t, f)
		st.quietly(func() { st.until = st.now() + 1200*time.Millisecond })
		ctx, done := f.WhilePrimary(t.Context())
		defer done()
		after(t, 100*time.Millisecond)
		st.quietly(func() { st.start = st.start.Add(-time.Hour) })
		began := time.Now()
		<-ctx.Done()
		if took := time.Since(began); took > StartWithin {
			t.Errorf("ended %s after the machine woke", took)
		}
	})
}

func TestPermitIsGoodForFiftyMilliseconds(t *testing.T) {
	withFence(t, "a", func(t *testing.T, st *fakeStanding, f *Fence) {
		awaitActing(t, f)
		permit, err := f.Check(Primary)
		if err != nil {
			t.Fatal(err)
		}
		after(t, StartWithin-time.Millisecond)
		if !permit.InTime() {
			t.Error("not in time after 49 ms")
		}
		after(t, time.Millisecond)
		if permit.InTime() {
			t.Error("in time after 50 ms")
		}
		st.change(func() { st.until = st.now() + 10*time.Millisecond })
		if permit, err = f.Check(Primary); err != nil {
			t.Fatal(err)
		}
		after(t, 10*time.Millisecond)
		if permit.InTime() {
			t.Error("in time after the end of the lease")
		}
		if (Permit{}).InTime() {
			t.Error("the zero Permit permits a start")
		}
	})
}

// Release returns when the work has stopped and no permit is in time. Nothing
// begins until the switchover is off the agreed state, whatever its deadline.
func TestReleaseWaitsForWork(t *testing.T) {
	withFence(t, "a", func(t *testing.T, st *fakeStanding, f *Fence) {
		awaitActing(t, f)
		ctx, done := f.WhilePrimary(t.Context())
		if _, err := f.Check(Primary); err != nil {
			t.Fatal(err)
		}
		released := make(chan error, 1)
		began := time.Now()
		go func() { released <- f.Release(t.Context(), "x") }()
		after(t, 5*time.Millisecond)
		st.change(func() {
			st.state.Switchover = &agreed.Switchover{ID: "x", From: "a", To: "b", Deadline: time.Now().Add(time.Second)}
		})
		<-ctx.Done()
		after(t, 10*time.Millisecond)
		select {
		case err := <-released:
			t.Fatalf("released while work runs: %v", err)
		default:
		}
		done()
		if err := <-released; err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < StartWithin {
			t.Errorf("released after %s, a permit was still in time", took)
		}
		after(t, time.Hour/2) // the deadline is long over
		if _, err := f.Check(Primary); !errors.Is(err, ErrNotPrimary) {
			t.Errorf("acts again while the switchover is in the agreed state: %v", err)
		}
		st.change(func() { st.state.Switchover = nil })
		if _, err := f.Check(Primary); err != nil {
			t.Errorf("does not act after the rollback: %v", err)
		}
	})
}

func TestReleaseGivesUp(t *testing.T) {
	withFence(t, "a", func(t *testing.T, st *fakeStanding, f *Fence) {
		awaitActing(t, f)
		_, done := f.WhilePrimary(t.Context())
		defer done()
		for _, open := range []bool{false, true} {
			if open {
				st.change(func() { st.state.Switchover = &agreed.Switchover{ID: "x", From: "a", To: "b"} })
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := f.Release(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("open %v: %v", open, err)
			}
			cancel()
		}
	})
}

func TestWhilePrimaryElsewhereIsOverAtOnce(t *testing.T) {
	withFence(t, "b", func(t *testing.T, _ *fakeStanding, f *Fence) {
		after(t, time.Minute)
		ctx, done := f.WhilePrimary(t.Context())
		defer done()
		if !errors.Is(context.Cause(ctx), ErrNotPrimary) {
			t.Errorf("cause %v", context.Cause(ctx))
		}
	})
}

// The wait for a stream of another owner begins when the entry arrives, not at the
// first start.
func TestWaitForAStreamBeginsWithItsEntry(t *testing.T) {
	withFence(t, "b", func(t *testing.T, st *fakeStanding, f *Fence) {
		after(t, time.Minute)
		st.change(func() {
			st.state.Streams = map[string]agreed.JobStream{"b1/1": {Owner: "a1", Before: "b1", Token: agreed.FenceToken{Index: 9}}}
		})
		after(t, newLeaderWait-time.Millisecond)
		if _, err := f.Check(Stream("b1/1")); !errors.Is(err, ErrNotOwner) {
			t.Errorf("before the leases of the earlier owner have ended: %v", err)
		}
		after(t, time.Millisecond)
		if _, err := f.Check(Stream("b1/1")); err != nil {
			t.Errorf("after the wait: %v", err)
		}
	})
}
