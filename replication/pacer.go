package replication

import (
	"sync"
	"time"
)

// pacerBurst is how much time's worth of bytes may go at once after a pause.
const pacerBurst = 50 * time.Millisecond

// pacer holds a rate over all who take from it. Taking never blocks: who took
// waits afterwards, so that a piece larger than any burst needs no rule of its own.
type pacer struct {
	now       func() time.Duration
	perSecond int

	mu   sync.Mutex    // guards free
	free time.Duration // when all that was taken is paid for
}

// take notes n bytes and says how long to pause after them.
func (p *pacer) take(n int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	p.free = max(p.free, now-pacerBurst) + time.Duration(float64(n)/float64(p.perSecond)*float64(time.Second))
	return max(0, p.free-now)
}
