package jobs

import (
	"context"
	"sync"
)

// keyLocks lets one submission at a time use an Idempotency-Key, so that the second one
// finds the job of the first.
type keyLocks struct {
	mu   sync.Mutex // guards used
	used map[string]*keyLock
}

type keyLock struct {
	turn  chan struct{} // a semaphore of one
	users int
}

// enter waits for the key's lock; leave releases it.
func (k *keyLocks) enter(ctx context.Context, key string) (leave func(), err error) {
	k.mu.Lock()
	if k.used == nil {
		k.used = map[string]*keyLock{}
	}
	l := k.used[key]
	if l == nil {
		l = &keyLock{turn: make(chan struct{}, 1)}
		k.used[key] = l
	}
	l.users++
	k.mu.Unlock()
	left := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.used, key)
		}
	}
	select {
	case l.turn <- struct{}{}:
		return func() { <-l.turn; left() }, nil
	case <-ctx.Done():
		left()
		return nil, ctx.Err()
	}
}
