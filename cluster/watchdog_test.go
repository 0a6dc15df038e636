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

	"github.com/dsnode/dsnode/cluster/agreed"
)

// hangingDisk answers writes until it is told to hang.
type hangingDisk struct {
	hang  atomic.Pointer[chan struct{}]
	fails atomic.Pointer[error]
	tried atomic.Int64
}

func (d *hangingDisk) probe(string) error {
	d.tried.Add(1)
	if c := d.hang.Load(); c != nil {
		<-*c
	}
	if err := d.fails.Load(); err != nil {
		return *err
	}
	return nil
}

func (d *hangingDisk) stop() (goOn func()) {
	c := make(chan struct{})
	d.hang.Store(&c)
	return sync.OnceFunc(func() { d.hang.Store(nil); close(c) })
}

// words are what the watchdog said, in order.
type words struct {
	mu   sync.Mutex // guards list
	list []bool
}

func (w *words) add(stalled bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.list = append(w.list, stalled)
}

func (w *words) all() []bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.list)
}

func watch(t *testing.T, d *hangingDisk) (said *words, ended chan error) {
	return watchBeside(t, d, nil)
}

// watchBeside watches a disk that others sync on as well.
func watchBeside(t *testing.T, d *hangingDisk, synced func() uint64) (said *words, ended chan error) {
	said, ended = &words{}, make(chan error, 1)
	w := newDiskWatchdog(t.TempDir(), slog.New(slog.DiscardHandler), synced, said.add)
	w.probe = d.probe
	ctx, cancel := context.WithCancel(t.Context())
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(cancel)
	return said, ended
}

func TestWatchdogShutsTheGateWhileTheDiskHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &hangingDisk{}
		said, _ := watch(t, d)
		time.Sleep(5500 * time.Millisecond) // virtual; the next write is at 6 s
		goOn := d.stop()
		defer goOn()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if len(said.all()) != 0 {
			t.Fatal("it cried before 2 s")
		}
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		if !slices.Equal(said.all(), []bool{true}) {
			t.Fatalf("after 4 s it said %v", said.all())
		}
		goOn()
		time.Sleep(time.Second)
		synctest.Wait()
		if !slices.Equal(said.all(), []bool{true, false}) {
			t.Errorf("after the disk came back it said %v", said.all())
		}
	})
}

// While raft's own store syncs, the disk works and is not tried; when both come
// to a stop, whenever that is, the gate is shut within three seconds or so.
func TestWatchdogLeavesADiskThatOthersSyncOn(t *testing.T) {
	for _, at := range []time.Duration{10000, 10010, 10240, 10260, 10490, 10510, 10760, 10990} {
		synctest.Test(t, func(t *testing.T) {
			d := &hangingDisk{}
			begun := time.Now()
			hangs := begun.Add(at * time.Millisecond)
			said, _ := watchBeside(t, d, func() uint64 {
				upTo := time.Now()
				if upTo.After(hangs) {
					upTo = hangs
				}
				return uint64(upTo.Sub(begun) / (250 * time.Millisecond)) //nolint:gosec // not negative
			})
			time.Sleep(time.Until(hangs))
			if n := d.tried.Load(); n > 1 {
				t.Errorf("it tried the disk %d times although others did", n)
			}
			goOn := d.stop()
			defer goOn()
			time.Sleep(1900 * time.Millisecond)
			synctest.Wait()
			if len(said.all()) != 0 {
				t.Errorf("a disk that hung at %d ms: it cried before 2 s", at)
			}
			time.Sleep(1300 * time.Millisecond)
			synctest.Wait()
			if !slices.Equal(said.all(), []bool{true}) {
				t.Errorf("a disk that hung at %d ms: after 3.2 s it said %v", at, said.all())
			}
		})
	}
}

func TestWatchdogGivesUpOnADeadDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &hangingDisk{}
		goOn := d.stop()
		defer goOn()
		_, ended := watch(t, d)
		start := time.Now()
		if err := <-ended; !errors.Is(err, ErrDiskStalled) {
			t.Fatalf("it ended with %v", err)
		}
		if took := time.Since(start); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("after %s, want just over 10 s", took)
		}
	})
}

func TestWatchdogTellsAFullDiskFromABrokenOne(t *testing.T) {
	for _, tc := range []struct {
		err  error
		ends bool
	}{{syscall.ENOSPC, false}, {syscall.EIO, true}} {
		synctest.Test(t, func(t *testing.T) {
			d := &hangingDisk{}
			d.fails.Store(&tc.err)
			_, ended := watch(t, d)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			select {
			case err := <-ended:
				if !tc.ends || !errors.Is(err, tc.err) {
					t.Errorf("%v ended it with %v", tc.err, err)
				}
			default:
				if tc.ends {
					t.Errorf("%v did not end it", tc.err)
				}
			}
		})
	}
}

func TestFeatureLevelRisesOnlyWithEveryMember(t *testing.T) {
	for _, tc := range []struct {
		name    string
		agreed  int
		members []int
		want    int
	}{
		{"nobody", 1, nil, 1},
		{"all new", 0, []int{agreed.MaxFeatureLevel, agreed.MaxFeatureLevel}, agreed.MaxFeatureLevel},
		{"one old", 0, []int{agreed.MaxFeatureLevel, 0}, 0},
		{"never lower", 1, []int{0}, 1},
		{"never above this build", 0, []int{agreed.MaxFeatureLevel + 5}, agreed.MaxFeatureLevel},
	} {
		s := &agreed.State{FeatureLevel: tc.agreed, Nodes: map[string]agreed.Node{}}
		for i, f := range tc.members {
			s.Nodes[string(rune('a'+i))] = agreed.Node{Feature: f}
		}
		if got := featureLevel(s); got != tc.want {
			t.Errorf("%s: level %d, want %d", tc.name, got, tc.want)
		}
	}
}
