package journal

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// Any call of the file system may fail, with or without a loss of power then: what was
// acknowledged before is there, and nothing is acknowledged after.
func TestAnyCallFails(t *testing.T) {
	for _, power := range []bool{false, true} {
		for n := int64(1); ; n++ {
			if ended := anyCallFails(t, n, power); ended {
				if n < 50 {
					t.Fatalf("only %d calls: the test has failed too few", n)
				}
				break
			}
		}
	}
}

// anyCallFails makes the n-th call and all later ones fail; it returns true when there
// were fewer calls.
func anyCallFails(t *testing.T, n int64, power bool) (ended bool) {
	o, d := testOptions(t.TempDir()), newFaultDisk()
	o.SegmentBytes = 1000
	var calls atomic.Int64
	d.failing(func(string, string) error {
		if calls.Add(1) >= n {
			return unix.EIO
		}
		return nil
	})
	id := streamOf(1)
	var acked, received, begun uint64
	l, err := open(o, d)
	if err == nil {
		err = func() error {
			ctx := context.Background()
			if err := l.Create(ctx, id); err != nil {
				return err
			}
			for range 10 {
				last, err := l.Append(ctx, id, []Record{started(1, strings.Repeat("x", 200))})
				if err != nil {
					return err
				}
				acked = last
				r := copiedRecord(received + 1)
				frame, err := AppendFrame(nil, &r)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := l.Receive(ctx, copied, frame); err != nil {
					return err
				}
				received++
			}
			if err := l.Trim(id, 3); err != nil {
				return err
			}
			if err := l.ReceiveFrom(copied, 50); err != nil {
				return err
			}
			begun = 49
			return l.Drop(copied)
		}()
		if err != nil && !errors.Is(err, ErrFailed) {
			t.Fatalf("call %d failed: %v", n, err)
		}
		if err != nil {
			if _, err := l.Append(context.Background(), id, []Record{started(1, "")}); !errors.Is(err, ErrFailed) {
				t.Fatalf("call %d failed, and afterwards: %v", n, err)
			}
		}
		_ = l.Close()
	}
	ended = calls.Load() < n
	d.failing(nil)
	if power {
		d.losePower(t, rand.New(rand.NewPCG(uint64(n), 1)))
	}
	o.Registerer = testOptions("").Registerer
	again, err := open(o, d)
	if err != nil {
		t.Fatalf("after call %d failed: %v", n, err)
	}
	defer mustClose(t, again)
	e, held := again.End(id)
	if e.Durable < acked || e.Damaged != 0 || e.First > 3 {
		t.Fatalf("after call %d failed: %+v, but %d records were acknowledged", n, e, acked)
	}
	if held {
		if got := recordsOf(t, again, id, e.First); len(got) != int(e.Durable+1-e.First) {
			t.Fatalf("after call %d failed: %d records of %+v", n, len(got), e)
		}
	}
	if e, held := again.End(copied); held && (e.Durable < max(received, begun) || e.Damaged != 0) {
		t.Fatalf("after call %d failed: the copy is %+v, but %d records were durable", n, e, received)
	}
	return ended
}

// Reads, trims, re-seals and appends that run while a stream is dropped return, and
// the log does not fail.
func TestDropConcurrentWithOtherCalls(t *testing.T) {
	o := testOptions(t.TempDir())
	o.SegmentBytes, o.TailBytes = 500, 1
	l := mustOpen(t, o)
	defer mustClose(t, l)
	for n := range byte(10) {
		id := streamOf(n)
		mustCreate(t, l, id)
		mustAppend(t, l, id, started(1, strings.Repeat("x", 300)))
		var wg sync.WaitGroup
		known := func(err error) bool {
			return errors.Is(err, ErrNoStream) || errors.Is(err, ErrFrozen)
		}
		loop := func(fn func() error) {
			wg.Go(func() {
				for {
					if err := fn(); err != nil {
						if !known(err) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		loop(func() error {
			_, err := l.Append(context.Background(), id, []Record{started(1, strings.Repeat("x", 300))})
			return err
		})
		loop(func() error {
			e, held := l.End(id)
			if !held {
				return ErrNoStream
			}
			_, _, err := l.Read(id, e.First, 10)
			if errors.Is(err, ErrTrimmed) {
				err = nil
			}
			return err
		})
		loop(func() error {
			e, _ := l.End(id)
			return l.Trim(id, max(e.Durable, 4)-4)
		})
		wg.Go(func() {
			for e, _ := l.End(id); e.Durable < 8; e, _ = l.End(id) {
				<-l.Changed()
			}
			if err := l.Drop(id); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
	}
	if err := l.Err(); err != nil {
		t.Fatal(err)
	}
	if n := len(l.Ends()); n != 0 || l.bytes.Load() != 0 {
		t.Fatalf("%d streams and %d bytes are left", n, l.bytes.Load())
	}
}
