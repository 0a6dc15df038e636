package cache

import (
	"context"
	"sync"
)

// Queue is a FIFO queue, bounded in items and bytes. When it is full, Offer drops the
// oldest items. It is safe for concurrent use.
type Queue[T any] struct {
	size            func(T) int
	maxLen, maxSize int
	dropped         func(n int)

	mu     sync.Mutex // guards all below
	items  []T
	bytes  int
	filled chan struct{} // holds a token when there may be items
}

// NewQueue makes a queue of at most maxLen items with at most maxBytes in all. dropped is
// called with the number of items that Offer has dropped.
func NewQueue[T any](maxLen, maxBytes int, size func(T) int, dropped func(n int)) *Queue[T] {
	return &Queue[T]{size: size, maxLen: maxLen, maxSize: maxBytes, dropped: dropped, filled: make(chan struct{}, 1)}
}

// Offer adds an item. It never waits. It drops an item that exceeds maxBytes by itself.
func (q *Queue[T]) Offer(v T) {
	n := q.size(v)
	if n > q.maxSize {
		q.dropped(1)
		return
	}
	q.mu.Lock()
	lost := 0
	for len(q.items) > 0 && (len(q.items) >= q.maxLen || q.bytes+n > q.maxSize) {
		q.pop()
		lost++
	}
	q.items = append(q.items, v)
	q.bytes += n
	q.mu.Unlock()
	if lost > 0 {
		q.dropped(lost)
	}
	select {
	case q.filled <- struct{}{}:
	default:
	}
}

// Take waits for an item, then takes up to most items, oldest first. The error is
// ctx's.
func (q *Queue[T]) Take(ctx context.Context, most int) ([]T, error) {
	for {
		if batch := q.now(most); len(batch) > 0 {
			return batch, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-q.filled:
		}
	}
}

// now is Take without waiting. It may take none.
func (q *Queue[T]) now(most int) []T {
	q.mu.Lock()
	defer q.mu.Unlock()
	var batch []T
	for len(q.items) > 0 && len(batch) < most {
		batch = append(batch, q.pop())
	}
	return batch
}

// Len gives the number of items and their bytes.
func (q *Queue[T]) Len() (n, bytes int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.items), q.bytes
}

func (q *Queue[T]) pop() T {
	var zero T
	v := q.items[0]
	q.items[0] = zero // the array lives on until append makes a new one
	q.items = q.items[1:]
	q.bytes -= q.size(v)
	return v
}
