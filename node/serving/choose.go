package serving

// choose picks one of the usable upstreams: power of two choices by cost.
func (p *Pipeline) choose(s *search, usable []target) int {
	n := len(usable)
	if n == 1 {
		return 0
	}
	a := p.random(n)
	b := p.random(n - 1)
	if b >= a {
		b++
	}
	if usable[b].cost(s.now) < usable[a].cost(s.now) {
		return b
	}
	return a
}
