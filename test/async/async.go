// Package async has helpers for tests of concurrent code: waiting for a condition,
// running a loop until the end of a test, and detecting leaked goroutines. Start
// reading at Await.
package async

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// timeout is far longer than any awaited condition takes, even on a slow machine.
const timeout = 20 * time.Second

// Await polls a condition until it holds, and fails the test if it takes too long.
func Await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	end := time.After(timeout)
	for !condition() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("timed out after %s waiting for: %s", timeout, what)
		}
	}
}

// Run runs a loop in a goroutine until the test ends or stop is called. It fails the
// test if the loop returns an error.
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
			t.Errorf("the loop returned: %v", failed)
		}
	})
	t.Cleanup(stop)
	return stop
}

// NoLeaks fails a test that leaves goroutines running. Call it first, so that its
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

// Context returns a context that ends with the test, or after the timeout of Await.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	t.Cleanup(cancel)
	return ctx
}
