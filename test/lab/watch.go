//go:build linux

package lab

import (
	"context"
	"sync"
	"time"
)

// watchNodes calls look for every node once in each interval, for each node in a
// goroutine of its own. Stop ends that and waits for the last calls.
func (l *Lab) watchNodes(interval time.Duration, look func(context.Context, *Node)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, n := range l.Nodes() {
		wg.Go(func() {
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				look(ctx, n)
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
	}
}
