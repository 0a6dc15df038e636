package cluster

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fakeDisk can be made to hang or to fail.
type fakeDisk struct {
	hang   atomic.Pointer[chan struct{}]
	fails  atomic.Pointer[error]
	writes atomic.Int64
}

func (d *fakeDisk) write(string) error {
	d.writes.Add(1)
	if c := d.hang.Load(); c != nil {
		<-*c
	}
	if err := d.fails.Load(); err != nil {
		return *err
	}
	return nil
}

// stop makes writes hang until resume is called.
func (d *fakeDisk) stop() (resume func()) {
	c := make(chan struct{})
	d.hang.Store(&c)
	return sync.OnceFunc(func() { d.hang.Store(nil); close(c) })
}

// stallCalls records the arguments of onStall.
type stallCalls struct {
	mu   sync.Mutex // guards list
	list []bool
}

func (c *stallCalls) add(stalled bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = append(c.list, stalled)
}

func (c *stallCalls) all() []bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.list)
}

// watch runs a watchdog. syncs may be nil.
func watch(t *testing.T, d *fakeDisk, syncs func() uint64) (calls *stallCalls, ended chan error) {
	calls, ended = &stallCalls{}, make(chan error, 1)
	w := newDiskWatchdog(t.TempDir(), nil, slog.New(slog.DiscardHandler), syncs, calls.add)
	w.write = d.write
	ctx, cancel := context.WithCancel(t.Context())
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(cancel)
	return calls, ended
}

func TestWatchdogReportsAStallAndItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &fakeDisk{}
		calls, _ := watch(t, d, nil)
		time.Sleep(5500 * time.Millisecond) // virtual; the next write is at 6 s
		resume := d.stop()
		defer resume()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if len(calls.all()) != 0 {
			t.Fatalf("a stall was reported in under 2 s: %v", calls.all())
		}
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		if !slices.Equal(calls.all(), []bool{true}) {
			t.Fatalf("3.5 s after the disk hung, the calls of onStall are %v, want one stall", calls.all())
		}
		resume()
		time.Sleep(time.Second)
		synctest.Wait()
		if !slices.Equal(calls.all(), []bool{true, false}) {
			t.Errorf("after the disk resumed, the calls of onStall are %v, want a stall and its end", calls.all())
		}
	})
}

// While raft's store syncs, the watchdog does not write. When both hang, at any time, the
// stall is reported after about three seconds.
func TestWatchdogDoesNotWriteWhileTheStoreSyncs(t *testing.T) {
	for _, at := range []time.Duration{10000, 10010, 10240, 10260, 10490, 10510, 10760, 10990} {
		synctest.Test(t, func(t *testing.T) {
			d := &fakeDisk{}
			begun := time.Now()
			hangs := begun.Add(at * time.Millisecond)
			calls, _ := watch(t, d, func() uint64 {
				upTo := time.Now()
				if upTo.After(hangs) {
					upTo = hangs
				}
				return uint64(upTo.Sub(begun) / (250 * time.Millisecond)) //nolint:gosec // not negative
			})
			time.Sleep(time.Until(hangs))
			if n := d.writes.Load(); n > 1 {
				t.Errorf("the watchdog wrote %d times while the store synced", n)
			}
			resume := d.stop()
			defer resume()
			time.Sleep(1900 * time.Millisecond)
			synctest.Wait()
			if len(calls.all()) != 0 {
				t.Errorf("disk hung at %d ms: a stall was reported in under 2 s", at)
			}
			time.Sleep(1300 * time.Millisecond)
			synctest.Wait()
			if !slices.Equal(calls.all(), []bool{true}) {
				t.Errorf("disk hung at %d ms: after 3.2 s the calls of onStall are %v, want one stall", at, calls.all())
			}
		})
	}
}

func TestWatchdogEndsWhenTheDiskHangsForTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &fakeDisk{}
		resume := d.stop()
		defer resume()
		_, ended := watch(t, d, nil)
		start := time.Now()
		if err := <-ended; !errors.Is(err, ErrDiskStalled) {
			t.Fatalf("the watchdog ended with %v, want ErrDiskStalled", err)
		}
		if took := time.Since(start); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("the watchdog ended after %s, want just over 10 s", took)
		}
	})
}

func TestWatchdogEndsOnWriteErrorsExceptAFullDisk(t *testing.T) {
	for _, tc := range []struct {
		err  error
		ends bool
	}{{syscall.ENOSPC, false}, {syscall.EIO, true}} {
		synctest.Test(t, func(t *testing.T) {
			d := &fakeDisk{}
			d.fails.Store(&tc.err)
			_, ended := watch(t, d, nil)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			select {
			case err := <-ended:
				if !tc.ends || !errors.Is(err, tc.err) {
					t.Errorf("after %v the watchdog ended with %v", tc.err, err)
				}
			default:
				if tc.ends {
					t.Errorf("after %v the watchdog did not end", tc.err)
				}
			}
		})
	}
}

// Without its directory there is nothing to write to; the node goes on.
func TestWatchdogGoesOnWhileItsDirectoryIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &fakeDisk{}
		var gone atomic.Bool
		w := newDiskWatchdog(t.TempDir(), nil, slog.New(slog.DiscardHandler), nil, (&stallCalls{}).add)
		w.write = d.write
		w.intact = func() error {
			if gone.Load() {
				return errors.New("deleted")
			}
			return nil
		}
		ended := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { ended <- w.Run(ctx) }()
		time.Sleep(3 * time.Second)
		missing := error(syscall.ENOENT)
		d.fails.Store(&missing)
		gone.Store(true)
		time.Sleep(30 * time.Second)
		synctest.Wait()
		select {
		case err := <-ended:
			t.Fatalf("the watchdog ended with %v", err)
		default:
		}
		writes := d.writes.Load()
		gone.Store(false)
		d.fails.Store(nil)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if d.writes.Load() == writes {
			t.Error("it does not write although the directory is back")
		}
	})
}
