package serving

import (
	"crypto/sha256"
	"encoding/binary"
	"math"
)

const (
	// maxPrefix is how much of the messages tells prompts apart: system prompt
	// and tools stand first, and that is what servers keep in their KV cache.
	maxPrefix = 4 << 10
	// loadBound keeps a popular prefix from burying its server.
	loadBound = 1.25
	// A server that is this much worse than the best gains nothing from a warm
	// cache; the slack keeps small differences from counting.
	worseFactor = 2
	worseSlack  = 0.05 // seconds
)

// choose picks one of the usable upstreams: the one that has seen the prompt's
// beginning before, unless it is overloaded or doing badly; otherwise power of
// two choices by cost.
func (p *Pipeline) choose(s *search, usable []target) int {
	if len(usable) == 1 {
		return 0
	}
	load := make([]load, 0, 16)
	for _, t := range usable {
		load = append(load, t.load(s.now))
	}
	if key, ok := s.affinity(); ok {
		if at := preferred(key, load); at >= 0 {
			return at
		}
	}
	return betterOfTwo(load, p.random)
}

// load is a backend as a choice sees it.
type load struct {
	name     uint64  // hashed
	pace     float64 // expected seconds to the first content, failures weighed in
	inFlight int64
}

// betterOfTwo draws two and takes the one with the lower cost.
func betterOfTwo(l []load, random func(int) int) int {
	a, b := random(len(l)), random(len(l)-1)
	if b >= a {
		b++
	}
	if l[b].cost() < l[a].cost() {
		return b
	}
	return a
}

func (l load) cost() float64 { return (l.pace + 0.001) * float64(l.inFlight+1) }

// preferred is rendezvous hashing with bounded load: each backend has its own
// order of preference for a key, so that one that leaves moves only its own
// keys. It gives -1 when the best place for the key is doing badly.
func preferred(key uint64, l []load) int {
	var total int64
	best := math.Inf(1)
	for _, b := range l {
		total += b.inFlight
		best = min(best, b.pace)
	}
	bound := int64(math.Ceil(loadBound * float64(total+1) / float64(len(l))))
	at, top := -1, uint64(0)
	for i, b := range l {
		if b.inFlight+1 > bound {
			continue
		}
		if score := mix(key ^ b.name); at < 0 || score > top {
			at, top = i, score
		}
	}
	if at >= 0 && l[at].pace > worseFactor*best+worseSlack {
		return -1
	}
	return at
}

// mix spreads bits (the finaliser of splitmix64).
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// affinity is what the request's prompt begins with, for its tenant: one key
// on all nodes of the site. Requests without a prompt have none.
func (s *search) affinity() (uint64, bool) {
	if !s.keyed {
		s.keyed = true
		s.key, s.hasKey = affinityKey(s.r)
	}
	return s.key, s.hasKey
}

func affinityKey(r *Request) (uint64, bool) {
	prompt := r.PromptAt.In(r.Body)
	if len(prompt) == 0 {
		return 0, false
	}
	h := sha256.New()
	h.Write([]byte(r.Principal.Tenant))
	h.Write([]byte{0})
	h.Write(prompt[:min(len(prompt), maxPrefix)])
	var sum [sha256.Size]byte
	return binary.BigEndian.Uint64(h.Sum(sum[:0])), true
}

func hashName(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	return binary.BigEndian.Uint64(sum[:])
}
