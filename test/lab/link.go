//go:build linux

package lab

import (
	"math/rand/v2"
	"sync"
	"time"
)

// Link is how packets fare from one site to another, in that direction alone.
// The zero Link carries everything at once.
type Link struct {
	// Delay is added to each packet, one way: half of a round trip's.
	Delay time.Duration
	// Jitter is the most that is added on top. How much of it changes ten times
	// a second, and packets stay in order, as behind a queue that fills and
	// drains: jitter drawn per packet would either reorder all of them or, kept
	// in order, wait for the slowest nearly always.
	Jitter time.Duration
	// Loss is the share of packets that vanish, 0 to 1.
	Loss float64
	// Bandwidth is in bytes per second; 0 is without limit.
	Bandwidth int64
	// Cut drops everything, also what is under way.
	Cut bool
}

const (
	// jitterEvery is how long a drawn jitter lasts.
	jitterEvery = 100 * time.Millisecond
	// maxQueued packets wait on a link: 60 MB in the largest case, a second of
	// 200 Mbit/s in full packets. What comes on top is dropped, as by a router.
	maxQueued = 40000
	// maxBacklog is the longest that a packet waits for its turn on a link with
	// a bandwidth limit; then the tail is dropped.
	maxBacklog = 500 * time.Millisecond
)

// LinkCount is what a link did with packets so far.
type LinkCount struct {
	Carried, Bytes uint64
	Lost           uint64 // by Loss
	Cut            uint64 // by Cut
	Overflowed     uint64 // by a full queue
}

// pipe is one direction between two sites: a queue in order of arrival, each
// packet with the time when it is due.
type pipe struct {
	deliver func(packet []byte)
	wake    chan struct{} // a packet was queued

	mu        sync.Mutex // guards all below
	link      Link
	random    *rand.Rand
	queue     []queued
	lastDue   time.Time // packets stay in order
	free      time.Time // when the line has sent all it was given
	jitter    time.Duration
	jitterEnd time.Time
	count     LinkCount
}

type queued struct {
	packet []byte
	due    time.Time
}

func newPipe(seed uint64, deliver func([]byte)) *pipe {
	return &pipe{
		deliver: deliver, wake: make(chan struct{}, 1),
		random: rand.New(rand.NewPCG(seed, 0)),
	}
}

func (p *pipe) set(l Link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.link = l
	p.jitterEnd = time.Time{}
	if l.Cut {
		p.count.Cut += uint64(len(p.queue))
		p.queue = nil
	}
}

func (p *pipe) get() (Link, LinkCount) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.link, p.count
}

// send takes a packet, which from now on is the pipe's.
func (p *pipe) send(packet []byte) {
	switch p.schedule(packet) {
	case atOnce:
		p.deliver(packet)
	case later:
		select {
		case p.wake <- struct{}{}:
		default:
		}
	case never:
	}
}

// fate is what becomes of a packet.
type fate int

const (
	never  fate = iota // lost, cut or overflowed, and counted as such
	later              // queued
	atOnce             // the caller delivers it
)

func (p *pipe) schedule(packet []byte) fate {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.link.Cut {
		p.count.Cut++
		return never
	}
	if p.link.Loss > 0 && p.random.Float64() < p.link.Loss {
		p.count.Lost++
		return never
	}
	due := now
	if p.link.Bandwidth > 0 {
		if p.free.Before(now) {
			p.free = now
		}
		if p.free.Sub(now) > maxBacklog {
			p.count.Overflowed++
			return never
		}
		p.free = p.free.Add(time.Duration(float64(len(packet)) / float64(p.link.Bandwidth) * float64(time.Second)))
		due = p.free
	}
	due = due.Add(p.link.Delay + p.drawJitter(now))
	if due.Before(p.lastDue) {
		due = p.lastDue
	}
	p.lastDue = due
	if !due.After(now) && len(p.queue) == 0 {
		p.count.Carried++
		p.count.Bytes += uint64(len(packet))
		return atOnce
	}
	if len(p.queue) >= maxQueued {
		p.count.Overflowed++
		return never
	}
	p.queue = append(p.queue, queued{packet, due})
	return later
}

func (p *pipe) drawJitter(now time.Time) time.Duration {
	if p.link.Jitter <= 0 {
		return 0
	}
	if now.After(p.jitterEnd) {
		p.jitter = time.Duration(p.random.Int64N(int64(p.link.Jitter)))
		p.jitterEnd = now.Add(jitterEvery)
	}
	return p.jitter
}

// run delivers what is due until done is closed.
func (p *pipe) run(done <-chan struct{}) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		packet, wait := p.next()
		if packet != nil {
			p.deliver(packet)
			continue
		}
		timer.Reset(wait)
		select {
		case <-done:
			return
		case <-p.wake:
		case <-timer.C:
		}
	}
}

// next takes the first packet if it is due, else says how long until it is.
func (p *pipe) next() ([]byte, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		p.queue = nil
		return nil, time.Hour
	}
	if wait := time.Until(p.queue[0].due); wait > 0 {
		return nil, wait
	}
	packet := p.queue[0].packet
	p.queue[0].packet = nil
	p.queue = p.queue[1:]
	p.count.Carried++
	p.count.Bytes += uint64(len(packet))
	return packet, 0
}
