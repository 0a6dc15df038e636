package serving

import "time"

// unboundedRoom stands for an upstream without max_concurrency.
const unboundedRoom = 256

// Room tells how many requests the own site's upstreams could take now, beside
// those they have, and how many they take at most. What can't be asked at this
// moment (drained, paused, broken) counts for nothing. Work that can wait leaves
// some of it free for clients that can't.
func (p *Pipeline) Room() (free, most int) {
	now := p.now()
	for u := range p.table.Load().instances() {
		limit := int(u.max)
		if limit == 0 {
			limit = unboundedRoom
		}
		if u.asked(now) {
			most += limit
			free += max(0, limit-int(u.inFlight.Load()))
		}
	}
	return free, most
}

// asked reports whether requests may go there at all now.
func (u *upstream) asked(now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return !now.Before(u.paused) && u.turn(now) != breakerOpen
}
