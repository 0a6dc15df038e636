// Package async has what tests of concurrent code share: waiting for a condition,
// running a loop for the length of a test, and looking for leaked goroutines.
package async

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience is far above what anything waited for takes, even on a busy machine.
const patience = 20 * time.Second

// Await waits until a condition holds that something else brings about.
func Await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	end := time.After(patience)
	for !condition() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("waited too long for: %s", what)
		}
	}
}

// Run runs a loop until the test ends or the returned function is called.
func Run(t testing.TB, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	var failed error
	go func() {
		defer close(done)
		failed = run(ctx)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-done
		if failed != nil {
			t.Errorf("loop ended with: %v", failed)
		}
	})
	t.Cleanup(stop)
	return stop
}

// NoLeaks fails a test that leaves goroutines behind. Call it first, so that its
// cleanup runs last. It retries for ten seconds: net/http keeps goroutines for half
// a second after a connection has ended, and memberlist's loops end at their next tick.
func NoLeaks(t testing.TB) {
	t.Helper()
	already := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		var leak error
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
			if leak = goleak.Find(already); leak == nil { // retries for about half a second itself
				return
			}
		}
		t.Error(leak)
	})
}

// Buffer is a bytes.Buffer that goroutines may share, such as for a log.
type Buffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

// Write appends p.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// Bytes is a copy of what was written until now.
func (b *Buffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.b.Bytes())
}

// Context is cancelled at the end of the test, or when a single operation in it
// takes far too long.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}
