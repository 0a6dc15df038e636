//go:build linux

package test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

const (
	gossipPort = 7956
	// mostOverheard is how many of the latest packets are kept: about six seconds. Which
	// packets end a node that takes their version for another one depends on their last
	// byte, which in answers to probes is a count that rises by three a second.
	mostOverheard = 120
)

// overheard is gossip as somebody sees it who is on the way between two sites.
type overheard struct {
	mu      sync.Mutex // guards what follows
	packets []overheardPacket
	streams map[string][]byte // by both ends: what the node sent that opened the stream
	next    map[string]uint32 // the sequence number that continues the stream
}

type overheardPacket struct {
	to    string
	bytes []byte
}

func (o *overheard) see(packet []byte) {
	const udp, tcp = 17, 6
	ip := int(packet[0]&15) * 4
	if len(packet) < ip+20 || binary.BigEndian.Uint16(packet[ip+2:]) != gossipPort {
		return
	}
	to := net.IP(packet[16:20]).String()
	o.mu.Lock()
	defer o.mu.Unlock()
	switch packet[9] {
	case udp:
		o.packets = append(o.packets, overheardPacket{to, slices.Clone(packet[ip+8:])})
		o.packets = o.packets[max(0, len(o.packets)-mostOverheard):]
	case tcp:
		flow := string(packet[12:20]) + string(packet[ip:ip+4])
		seq, body := binary.BigEndian.Uint32(packet[ip+4:]), packet[ip+int(packet[ip+12]>>4)*4:]
		if syn := packet[ip+13]&2 != 0; syn {
			o.streams[flow], o.next[flow] = nil, seq+1
		} else if seq == o.next[flow] && len(body) > 0 {
			o.streams[flow] = append(o.streams[flow], body...)
			o.next[flow] += uint32(len(body))
		}
	}
}

// streamVersion is the place of the version in a stream, and packetVersion in a packet.
func packetVersion(b []byte) int { return 2 + int(b[1]) }
func streamVersion(b []byte) int { return 2 + int(b[1]) + 5 }

func (o *overheard) complete() (packets []overheardPacket, streams [][]byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range o.streams {
		if len(s) > 300 && len(s) == streamVersion(s)+int(binary.BigEndian.Uint32(s[streamVersion(s)-4:])) {
			streams = append(streams, slices.Clone(s))
		}
	}
	return slices.Clone(o.packets), streams
}

func withVersion(b []byte, at int, version byte) []byte {
	b = slices.Clone(b)
	b[at] = version
	return b
}

// Whoever hears gossip between two sites, or only reaches the gossip port, and has no key,
// can't end a node, make it grow, or change what it does.
func TestGossipPortWithoutTheKey(t *testing.T) {
	parallelIfShort(t)
	heard := &overheard{streams: map[string][]byte{}, next: map[string]uint32{}}
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(10 * time.Millisecond)})
	l.Net.Tap(heard.see)
	l.Sites[1].Nodes[0].Kill() // it joins the others again, by streams
	l.Sites[1].Nodes[0].Start()
	l.WaitFor(within(40*time.Second), "gossip to be overheard", func(context.Context) error {
		packets, streams := heard.complete()
		if len(packets) < mostOverheard || len(streams) < 1 {
			return fmt.Errorf("%d packets, %d streams", len(packets), len(streams))
		}
		return nil
	})
	l.Net.Tap(nil)
	packets, streams := heard.complete()

	// From each site to the nodes of the others.
	for from, site := range l.Sites {
		socket, err := l.Net.ListenPacket(from, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range l.Sites {
			if other == site {
				continue
			}
			ip := l.Net.Addr(other.Index)
			to := &net.UDPAddr{IP: net.ParseIP(ip), Port: gossipPort}
			for _, p := range packets {
				for _, b := range [][]byte{withVersion(p.bytes, packetVersion(p.bytes), 0), p.bytes, p.bytes} {
					if _, err := socket.WriteTo(b, to); err != nil {
						t.Fatal(err)
					}
				}
			}
			for _, s := range streams {
				for _, b := range [][]byte{withVersion(s, streamVersion(s), 0), s, s} {
					sendStream(t, l, from, ip, b)
				}
			}
		}
		_ = socket.Close() // only sends
	}

	t.Logf("sent %d packets and %d streams again", len(packets), len(streams))
	wantMemoryBound(t, l, packets[0].bytes)

	for _, n := range l.Nodes() {
		if !n.Running() {
			t.Fatalf("%s has ended:\n%s", n.Name, n.LogTail(20))
		}
	}
	for _, n := range l.Nodes() {
		for _, reason := range []string{"malformed", "replay"} {
			series := fmt.Sprintf(`dsnode_connections_refused_total{port="gossip",reason=%q}`, reason)
			l.WaitFor(within(5*time.Second), "refusals to be counted", func(ctx context.Context) error {
				samples, err := n.Metrics(ctx)
				if err == nil && samples[series] < float64(len(packets)) {
					err = fmt.Errorf("%s has counted %v of %s, of %d packets sent more than once", n.Name, samples[series], series, len(packets))
				}
				return err
			})
		}
	}
	l.WaitHealthy(within(20 * time.Second))
}

// sendStream sends bytes to the gossip port and waits until the node closes the stream.
func sendStream(t *testing.T, l *lab.Lab, from int, ip string, b []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within(5*time.Second))
	defer cancel()
	c, err := l.Net.Dial(ctx, from, fmt.Sprintf("%s:%d", ip, gossipPort))
	if err != nil {
		t.Fatalf("nobody listens at the gossip port of %s: %v", ip, err)
	}
	defer func() { _ = c.Close() }() // the node has what it needs
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	if _, err := c.Write(b); err != nil {
		return // refused
	}
	var answer [1]byte
	_, _ = c.Read(answer[:]) // an answer, or the end
}

// mostForStreams is how much a node may grow by streams without a key. The two groups of
// streams hold at most 8 MiB; the collector lets as much garbage stand beside them, and 64
// connections, and what the node does meanwhile, need some.
const mostForStreams = 40 << 20

// wantMemoryBound sends 64 streams to one node, from its own site, that announce 20 MiB or
// as much as is allowed, and send most of it.
func wantMemoryBound(t *testing.T, l *lab.Lab, packet []byte) {
	t.Helper()
	n := l.Sites[0].Nodes[0]
	label := packet[:packetVersion(packet)]
	before := n.AnonMemory(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	var senders sync.WaitGroup
	for i := range 64 {
		size := 20 << 20
		if i%2 == 1 {
			size = 700 << 10
		}
		senders.Go(func() {
			c, err := l.Net.Dial(ctx, 0, fmt.Sprintf("%s:%d", l.Net.Addr(0), gossipPort))
			if err != nil {
				return // refused
			}
			defer func() { _ = c.Close() }() // it is the attacker's
			deadline, _ := ctx.Deadline()
			_ = c.SetDeadline(deadline)
			header := binary.BigEndian.AppendUint32(append(slices.Clone(label), 10), uint32(size))
			body := bytes.Repeat([]byte{1}, min(size, 6<<20)-100)
			if _, err := c.Write(append(header, body...)); err == nil {
				<-ctx.Done() // holds what the node has read
			}
		})
	}
	most := before
	l.WaitFor(within(10*time.Second), "the streams to end", func(context.Context) error {
		most = max(most, n.AnonMemory(t))
		if ctx.Err() == nil {
			return errors.New("they run")
		}
		return nil
	})
	senders.Wait()
	t.Logf("%s grew from %d to %d MiB by streams without a key", n.Name, before>>20, most>>20)
	if most-before > mostForStreams {
		t.Errorf("%s grew by %d MiB by streams without a key, at most %d are allowed", n.Name, (most-before)>>20, mostForStreams>>20)
	}
	if text := n.LogTail(1000); strings.Contains(text, "panic") {
		t.Errorf("%s has a panic in its log", n.Name)
	}
}
