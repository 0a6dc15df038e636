package upstream

// Capacity says how many requests the own site's servers could take now beside
// those that they have, and how many they take at most. A server that can't be
// asked at this moment (drained, unusable, paused, breaker open) counts nothing.
// Work that can wait leaves some of it free for clients that can't.
func (f *Fleet) Capacity() (free, total int) {
	now := f.o.Now()
	for _, u := range f.Table().upstreams {
		for _, i := range u.instances {
			if u.drained || !i.usable() || !i.accepts(now) {
				continue
			}
			total += int(i.max)
			free += max(0, int(i.max-i.inFlight.Load()))
		}
	}
	return free, total
}
