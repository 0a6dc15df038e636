//go:build linux

package lab

import (
	"math/rand/v2"
	"sync"
	"time"
)

// Link describes one direction between two sites. The zero Link delivers every
// packet at once.
type Link struct {
	// Delay of each packet, one way.
	Delay time.Duration
	// Jitter is the upper bound of an additional delay, which is drawn ten times a
	// second. Packets stay in order, as behind a queue that fills and drains. Drawn
	// for each packet, it would reorder packets all the time or, in order, delay
	// nearly each of them by the maximum.
	Jitter time.Duration
	// Loss is the share of packets that are dropped, 0 to 1.
	Loss float64
	// Largest is the size in bytes of the largest IP packet that passes; larger ones are
	// dropped without an answer, as by a tunnel with a small MTU behind a firewall that
	// drops ICMP. 0 is no limit.
	Largest int
	// NoUDP drops all UDP packets, as by a firewall that allows TCP only.
	NoUDP bool
	// Bandwidth in bytes per second; 0 is no limit.
	Bandwidth int64
	// Cut drops all packets, also those in the queue.
	Cut bool
}

const (
	// jitterEvery is how long a drawn jitter lasts.
	jitterEvery = 100 * time.Millisecond
	// maxQueued packets wait on a link: up to 60 MB, which at full packet size is 2.4 s
	// of 200 Mbit/s. Further packets are dropped, as by a router.
	maxQueued = 40000
	// maxBacklog is how long a packet waits for the bandwidth at most; further packets
	// are dropped.
	maxBacklog = 500 * time.Millisecond
)

// LinkCount counts the packets of a link so far.
type LinkCount struct {
	Carried, Bytes uint64
	Lost           uint64 // dropped by Loss
	TooLarge       uint64 // dropped by Largest
	UDP            uint64 // dropped by NoUDP
	Cut            uint64 // dropped by Cut
	Overflowed     uint64 // dropped by a full queue
}

// pipe carries packets in one direction: a queue in order of arrival, in which each
// packet has the time of its delivery.
type pipe struct {
	deliver func(packet []byte)
	wake    chan struct{} // a packet was queued

	mu        sync.Mutex // guards all below
	link      Link
	random    *rand.Rand
	queue     []queued
	lastDue   time.Time // no later packet is due earlier
	free      time.Time // when the bandwidth has sent all packets so far
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

// send takes over the packet.
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

// delivery says when a packet is delivered.
type delivery int

const (
	never  delivery = iota // dropped and counted
	later                  // queued
	atOnce                 // by the caller
)

func (p *pipe) schedule(packet []byte) delivery {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.link.Cut {
		p.count.Cut++
		return never
	}
	if p.link.Largest > 0 && len(packet) > p.link.Largest {
		p.count.TooLarge++
		return never
	}
	if p.link.NoUDP && isUDP(packet) {
		p.count.UDP++
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

// isUDP reports whether an IPv4 packet carries UDP.
func isUDP(packet []byte) bool {
	const protocol, udp = 9, 17 // offset in the header, and its value
	return len(packet) > protocol && packet[protocol] == udp
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

// run delivers queued packets when they are due, until done is closed.
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

// next takes the first packet if it is due, else returns the time until then.
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
