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

// throne is a Standing that a test moves by hand.
type throne struct {
	mu    sync.Mutex // guards what follows
	start time.Time
	state agreed.State
	until time.Duration
	epoch uint64
	news  chan struct{}
}

func newThrone(site string) *throne {
	return &throne{
		start: time.Now(), news: make(chan struct{}), until: time.Hour,
		state: agreed.State{ClusterID: "c", Primary: agreed.Primary{Site: site, Epoch: 1}},
	}
}

func (th *throne) now() time.Duration { return time.Since(th.start) }

func (th *throne) State() *agreed.State {
	th.mu.Lock()
	defer th.mu.Unlock()
	s := th.state
	return &s
}

func (th *throne) Changed() <-chan struct{} {
	th.mu.Lock()
	defer th.mu.Unlock()
	return th.news
}

func (th *throne) Lease() (time.Duration, uint64) {
	th.mu.Lock()
	defer th.mu.Unlock()
	return th.until - th.now(), th.epoch
}

func (th *throne) LeaseChanged() <-chan struct{} { return th.Changed() }

func (th *throne) change(f func()) {
	th.mu.Lock()
	defer th.mu.Unlock()
	f()
	close(th.news)
	th.news = make(chan struct{})
}

func (th *throne) promote(site string, epoch uint64, released bool) {
	th.change(func() {
		th.state.Primary = agreed.Primary{Site: site, Epoch: epoch, Released: released}
		th.state.Switchover = nil
	})
}

const newLeaderWait = 1320 * time.Millisecond

// rule runs a test with a Role of site a, in virtual time.
func rule(t *testing.T, primary string, story func(t *testing.T, th *throne, r *Role)) {
	synctest.Test(t, func(t *testing.T) {
		th := newThrone(primary)
		r := NewRole("a", th, newLeaderWait, th.now, slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() {
			if err := r.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		defer running.Wait()
		defer stop()
		synctest.Wait()
		story(t, th, r)
	})
}

func after(t *testing.T, d time.Duration) {
	t.Helper()
	if err := wait(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

func awaitRole(t *testing.T, r *Role) uint64 {
	t.Helper()
	epoch, err := r.Await(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return epoch
}

func TestRoleBeginsWhenOldLeasesHaveEnded(t *testing.T) {
	for _, c := range []struct {
		name     string
		released bool
		jump     uint64
		want     time.Duration
	}{
		{"unplanned", false, 1, newLeaderWait},
		{"everybody let go", true, 1, 0},
		{"an epoch was missed", true, 2, newLeaderWait},
	} {
		t.Run(c.name, func(t *testing.T) {
			rule(t, "b", func(t *testing.T, th *throne, r *Role) {
				after(t, time.Minute)
				if _, ok := r.Holding(); ok {
					t.Error("holds the role of another site")
				}
				began := time.Now()
				th.promote("a", 1+c.jump, c.released)
				if epoch := awaitRole(t, r); epoch != 1+c.jump {
					t.Errorf("epoch %d", epoch)
				}
				if took := time.Since(began); took < c.want || took > c.want {
					t.Errorf("began after %s, want %s", took, c.want)
				}
			})
		})
	}
}

// Released speaks for the primary before, not for the one before that.
func TestReleasedDoesNotShortenAnEarlierWait(t *testing.T) {
	rule(t, "c", func(t *testing.T, th *throne, r *Role) {
		after(t, time.Minute)
		began := time.Now()
		th.promote("b", 2, false)
		after(t, 500*time.Millisecond)
		th.promote("a", 3, true)
		awaitRole(t, r)
		if took := time.Since(began); took < newLeaderWait {
			t.Errorf("began %s after an unplanned promotion", took)
		}
	})
}

func TestRestartedNodeWaitsTwice(t *testing.T) {
	rule(t, "a", func(t *testing.T, th *throne, r *Role) {
		awaitRole(t, r)
		if at := th.now(); at < 2*newLeaderWait {
			t.Errorf("acts %s after its start", at)
		}
	})
}

func TestPrimaryContextEnds(t *testing.T) {
	for name, end := range map[string]func(th *throne){
		"another primary":      func(th *throne) { th.promote("b", 2, false) },
		"another epoch":        func(th *throne) { th.promote("a", 2, true) },
		"the lease ends":       func(th *throne) { th.change(func() { th.until = th.now() }) },
		"a higher epoch heard": func(th *throne) { th.change(func() { th.epoch = 2 }) },
		"a switchover away": func(th *throne) {
			th.change(func() { th.state.Switchover = &agreed.Switchover{ID: "x", From: "a", To: "b"} })
		},
	} {
		t.Run(name, func(t *testing.T) {
			rule(t, "a", func(t *testing.T, th *throne, r *Role) {
				awaitRole(t, r)
				ctx, done := r.WhilePrimary(t.Context())
				defer done()
				if ctx.Err() != nil {
					t.Fatalf("ended at once: %v", context.Cause(ctx))
				}
				token, err := r.Check()
				if err != nil || !token.InTime() || token.Epoch != 1 {
					t.Fatalf("%+v, %v", token, err)
				}
				began := time.Now()
				end(th)
				<-ctx.Done()
				if !errors.Is(context.Cause(ctx), ErrNotPrimary) {
					t.Errorf("cause %v", context.Cause(ctx))
				}
				if took := time.Since(began); took > 0 {
					t.Errorf("ended %s late", took)
				}
				if name != "another epoch" {
					if _, err := r.Check(); !errors.Is(err, ErrNotPrimary) {
						t.Errorf("check afterwards: %v", err)
					}
				}
			})
		})
	}
}

// quietly moves what nobody is told of: a lease that goes on.
func (th *throne) quietly(f func()) {
	th.mu.Lock()
	defer th.mu.Unlock()
	f()
}

// Nobody is told of a lease's end: contexts end at that moment all the same, and
// not before it, however often the lease was extended.
func TestPrimaryContextEndsWithTheLease(t *testing.T) {
	for name, hold := range map[string]bool{"work runs": true, "nothing runs": false} {
		t.Run(name, func(t *testing.T) {
			rule(t, "a", func(t *testing.T, th *throne, r *Role) {
				const lease = 1200 * time.Millisecond
				awaitRole(t, r)
				ctx, done := r.WhilePrimary(t.Context())
				defer done()
				if !hold {
					done()
				}
				th.quietly(func() { th.until = th.now() + lease })
				for range 20 {
					after(t, 250*time.Millisecond)
					th.quietly(func() { th.until = th.now() + lease })
				}
				if hold && ctx.Err() != nil {
					t.Fatalf("ended with a lease: %v", context.Cause(ctx))
				}
				after(t, lease-time.Millisecond)
				if _, ok := r.Holding(); !ok || (hold && ctx.Err() != nil) {
					t.Fatalf("ended before the lease: %v", context.Cause(ctx))
				}
				after(t, time.Millisecond)
				if hold && !errors.Is(context.Cause(ctx), ErrNotPrimary) {
					t.Errorf("the lease has ended, and the context says %v", context.Cause(ctx))
				}
				r.mu.Lock()
				holding := r.holding
				r.mu.Unlock()
				if holding {
					t.Error("the lease has ended, and nobody noticed")
				}
				began := time.Now()
				go func() {
					_ = wait(t.Context(), 5*time.Second) // the test's end is not before
					th.change(func() { th.until = th.now() + lease })
				}()
				if awaitRole(t, r); time.Since(began) != 5*time.Second {
					t.Errorf("acts again %s after a lease began at 5 s", time.Since(began))
				}
			})
		})
	}
}

// While the machine is suspended timers stand still and leases don't.
func TestPrimaryContextEndsAfterSuspend(t *testing.T) {
	rule(t, "a", func(t *testing.T, th *throne, r *Role) {
		awaitRole(t, r)
		th.quietly(func() { th.until = th.now() + 1200*time.Millisecond })
		ctx, done := r.WhilePrimary(t.Context())
		defer done()
		after(t, 100*time.Millisecond)
		th.quietly(func() { th.start = th.start.Add(-time.Hour) })
		began := time.Now()
		<-ctx.Done()
		if took := time.Since(began); took > StartWithin {
			t.Errorf("ended %s after the machine woke", took)
		}
	})
}

func TestTokenIsGoodForFiftyMilliseconds(t *testing.T) {
	rule(t, "a", func(t *testing.T, th *throne, r *Role) {
		awaitRole(t, r)
		token, err := r.Check()
		if err != nil {
			t.Fatal(err)
		}
		after(t, StartWithin-time.Millisecond)
		if !token.InTime() {
			t.Error("too old after 49 ms")
		}
		after(t, time.Millisecond)
		if token.InTime() {
			t.Error("still good after 50 ms")
		}
		th.change(func() { th.until = th.now() + 10*time.Millisecond })
		if token, err = r.Check(); err != nil {
			t.Fatal(err)
		}
		after(t, 10*time.Millisecond)
		if token.InTime() {
			t.Error("good beyond the lease")
		}
		if (Token{}).InTime() {
			t.Error("no token is good")
		}
	})
}

// Release returns when the work has come back and no token can be used, and
// nothing begins until the switchover is off the state, whatever its deadline.
func TestReleaseWaitsForWork(t *testing.T) {
	rule(t, "a", func(t *testing.T, th *throne, r *Role) {
		awaitRole(t, r)
		ctx, done := r.WhilePrimary(t.Context())
		if _, err := r.Check(); err != nil {
			t.Fatal(err)
		}
		released := make(chan error, 1)
		began := time.Now()
		go func() { released <- r.Release(t.Context(), "x") }()
		after(t, 5*time.Millisecond)
		th.change(func() {
			th.state.Switchover = &agreed.Switchover{ID: "x", From: "a", To: "b", Deadline: time.Now().Add(time.Second)}
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
			t.Errorf("released after %s, a token was still good", took)
		}
		after(t, time.Hour/2) // the deadline is long over
		if _, err := r.Check(); !errors.Is(err, ErrNotPrimary) {
			t.Errorf("acts again while the switchover stands: %v", err)
		}
		th.change(func() { th.state.Switchover = nil })
		if _, err := r.Check(); err != nil {
			t.Errorf("does not act after the rollback: %v", err)
		}
	})
}

func TestReleaseGivesUp(t *testing.T) {
	rule(t, "a", func(t *testing.T, th *throne, r *Role) {
		awaitRole(t, r)
		_, done := r.WhilePrimary(t.Context())
		defer done()
		for _, open := range []bool{false, true} {
			if open {
				th.change(func() { th.state.Switchover = &agreed.Switchover{ID: "x", From: "a", To: "b"} })
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := r.Release(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("open %v: %v", open, err)
			}
			cancel()
		}
	})
}

func TestWhilePrimaryElsewhereIsOverAtOnce(t *testing.T) {
	rule(t, "b", func(t *testing.T, _ *throne, r *Role) {
		after(t, time.Minute)
		ctx, done := r.WhilePrimary(t.Context())
		defer done()
		if !errors.Is(context.Cause(ctx), ErrNotPrimary) {
			t.Errorf("cause %v", context.Cause(ctx))
		}
	})
}
