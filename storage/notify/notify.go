// Package notify wakes goroutines that wait for a change.
package notify

import "sync"

// Broadcast wakes all waiters at each change. The zero value is ready to use and
// costs little while nobody waits.
type Broadcast struct {
	mu   sync.Mutex // guards next
	next chan struct{}
}

// Next returns a channel that is closed by the next Send. Call it before reading what
// may change, or a change in between goes unnoticed.
func (b *Broadcast) Next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil {
		b.next = make(chan struct{})
	}
	return b.next
}

// Send wakes the present waiters.
func (b *Broadcast) Send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next != nil {
		close(b.next)
		b.next = nil
	}
}

// Wake signals a channel with a capacity of 1 without blocking: its one reader looks
// at everything when it wakes.
func Wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // a signal is pending already
	}
}
