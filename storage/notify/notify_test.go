package notify

import "testing"

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestBroadcastWakesAllPresentWaiters(t *testing.T) {
	var b Broadcast
	b.Send() // without waiters
	first, second := b.Next(), b.Next()
	if closed(first) || closed(second) {
		t.Fatal("a waiter was woken by an earlier Send")
	}
	b.Send()
	if !closed(first) || !closed(second) {
		t.Fatal("a waiter was not woken")
	}
	if closed(b.Next()) {
		t.Fatal("a later waiter was woken by an earlier Send")
	}
}

func TestWakeDoesNotBlock(t *testing.T) {
	c := make(chan struct{}, 1)
	Wake(c)
	Wake(c)
	if !closed(c) {
		t.Fatal("no signal")
	}
	if closed(c) {
		t.Fatal("two signals in a channel for one")
	}
}
