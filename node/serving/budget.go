package serving

import (
	"sync"
	"time"
)

const (
	budgetWindow = 10 * time.Second
	budgetShare  = 10 // one retry per so many requests
	// budgetFloor is how many retries the window always allows: they can't multiply
	// without traffic.
	budgetFloor = 30
)

// budget keeps retries below a share of the requests of the last window.
type budget struct {
	mu       sync.Mutex // guards all below
	start    time.Time  // of the current half
	requests [2]int     // this half and the one before
	retries  [2]int
}

func (b *budget) turn(now time.Time) {
	switch age := now.Sub(b.start); {
	case age >= budgetWindow || age < 0:
		b.requests, b.retries = [2]int{}, [2]int{}
		b.start = now
	case age >= budgetWindow/2:
		b.requests = [2]int{0, b.requests[0]}
		b.retries = [2]int{0, b.retries[0]}
		b.start = b.start.Add(budgetWindow / 2)
	}
}

// deposit counts a request. A client's own retry allows no further one.
func (b *budget) deposit(now time.Time, clientRetry bool) {
	if clientRetry {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(now)
	b.requests[0]++
}

// withdraw asks for one retry.
func (b *budget) withdraw(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(now)
	allowed := max(budgetFloor, (b.requests[0]+b.requests[1])/budgetShare)
	if b.retries[0]+b.retries[1] >= allowed {
		return false
	}
	b.retries[0]++
	return true
}
