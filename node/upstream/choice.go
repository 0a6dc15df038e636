package upstream

import (
	"crypto/sha256"
	"encoding/binary"
	"math"
)

const (
	// maxPrefix is how much of a prompt tells it from others: system prompt and
	// tools come first, and that is what servers keep in their KV cache.
	maxPrefix = 4 << 10
	// loadBound bounds the requests in flight at a prefix's preferred server, as a
	// multiple of the mean.
	loadBound = 1.25
	// A warm cache is not worth a server whose pace is worse than the best one's by
	// this factor and slack (seconds; small differences don't count).
	worseFactor = 2
	worseSlack  = 0.05
)

// pick chooses one of the usable instances: the one that has seen the prompt's
// beginning before, unless it is overloaded or doing badly; otherwise the better of
// two drawn at random.
func (s *Search) pick(usable []offer) int {
	if pick := s.fleet.o.Pick; pick != nil {
		return pick(len(usable))
	}
	if len(usable) == 1 {
		return 0
	}
	loads := make([]load, 0, 16)
	for _, o := range usable {
		loads = append(loads, o.load(s.now))
	}
	if key, ok := s.affinity(); ok {
		if at := preferred(key, loads); at >= 0 {
			return at
		}
	}
	return betterOfTwo(loads, s.fleet.o.Random)
}

// load is what a choice compares of a backend.
type load struct {
	name     uint64  // hashed
	pace     float64 // expected seconds to the first content, made worse by failures
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

// preferred is rendezvous hashing with bounded load: each key ranks the backends in
// an order of its own, so that a backend that leaves moves only its own keys. It
// gives -1 when the best place for the key is doing badly.
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

// mix is the finaliser of splitmix64.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// affinity is a hash of what the prompt begins with, for its tenant: the same on all
// nodes of the site.
func (s *Search) affinity() (uint64, bool) {
	if !s.keyed {
		s.keyed = true
		s.key, s.hasKey = affinityKey(s.Tenant, s.Prompt)
	}
	return s.key, s.hasKey
}

func affinityKey(tenant string, prompt []byte) (uint64, bool) {
	if len(prompt) == 0 {
		return 0, false
	}
	h := sha256.New()
	h.Write([]byte(tenant))
	h.Write([]byte{0})
	h.Write(prompt[:min(len(prompt), maxPrefix)])
	var sum [sha256.Size]byte
	return binary.BigEndian.Uint64(h.Sum(sum[:0])), true
}

func hashName(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	return binary.BigEndian.Uint64(sum[:])
}
