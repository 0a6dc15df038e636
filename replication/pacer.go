package replication

import (
	"sync"
	"time"
)

// pacerBurst is how much time's worth of bytes may be sent at once after a pause.
const pacerBurst = 50 * time.Millisecond

// pacer limits the rate of all callers together. take never blocks; the caller pauses
// afterwards, so a piece may be larger than any burst.
type pacer struct {
	now       func() time.Duration
	perSecond int

	mu   sync.Mutex    // guards free
	free time.Duration // when the rate allows the next bytes
}

// take accounts for n bytes and returns how long to pause after them.
func (p *pacer) take(n int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	p.free = max(p.free, now-pacerBurst) + time.Duration(float64(n)/float64(p.perSecond)*float64(time.Second))
	return max(0, p.free-now)
}
