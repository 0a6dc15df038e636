package cache

import "sync/atomic"

// patience is how many failures in a row a shared tier is forgiven.
const patience = 3

// breaker leaves a shared tier alone that fails. No request ever tries whether it
// is back, which would cost that request the whole deadline: Cache.Run does.
type breaker struct {
	failures atomic.Int32
	open     atomic.Bool
	moved    func(open bool, why error)
}

// resting reports that the tier is left alone.
func (b *breaker) resting() bool { return b.open.Load() }

// note takes the end of a command.
func (b *breaker) note(err error) {
	if err == nil {
		b.failures.Store(0)
		if b.open.Swap(false) {
			b.moved(false, nil)
		}
		return
	}
	if b.failures.Add(1) >= patience && !b.open.Swap(true) {
		b.moved(true, err)
	}
}
