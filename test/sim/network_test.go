package sim

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/host"
)

const oneWay = 10 * time.Millisecond

// pair is two machines in two sites.
type pair struct {
	t    *testing.T
	net  *Network
	a, b *Endpoint
	ln   net.Listener
}

func newPair(t *testing.T) *pair {
	t.Helper()
	n := NewNetwork(oneWay, rand.New(rand.NewPCG(1, 1)))
	p := &pair{t: t, net: n}
	n.Name(siteAddr(0, 10), Place{"a", "a-1"})
	n.Name(siteAddr(1, 10), Place{"b", "b-1"})
	p.a, p.b = n.Endpoint(siteAddr(0, 10)), n.Endpoint(siteAddr(1, 10))
	ln, err := p.b.Listen("10.2.0.10:7957")
	if err != nil {
		t.Fatal(err)
	}
	p.ln = ln
	return p
}

// connect opens a connection of a kind; the second result is b's end.
func (p *pair) connect(kind string) (a, b net.Conn) {
	p.t.Helper()
	a, err := p.a.Dial(host.WithTraffic(p.t.Context(), kind), "10.2.0.10:7957")
	if err != nil {
		p.t.Fatal(err)
	}
	if b, err = p.ln.Accept(); err != nil {
		p.t.Fatal(err)
	}
	return a, b
}

func (p *pair) send(c net.Conn, text string) {
	p.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		p.t.Fatal(err)
	}
}

// arrives reads the text, which must come after the time, and before about twice the time.
func (p *pair) arrives(c net.Conn, text string, after time.Duration) {
	p.t.Helper()
	began := time.Now()
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		p.t.Fatalf("got %.20q, %v", b, err)
	}
	if took := time.Since(began); took < after || took > 2*after+2*oneWay {
		p.t.Errorf("arrived after %s, want %s", took, after)
	}
}

// fails reads until the connection ends with the error.
func (p *pair) fails(c net.Conn, want error, within time.Duration) {
	p.t.Helper()
	began := time.Now()
	_, err := io.ReadAll(c)
	if !errors.Is(err, want) || time.Since(began) > within {
		p.t.Errorf("after %s: %v, want %v within %s", time.Since(began), err, want, within)
	}
}

func bubble(t *testing.T, test func(*testing.T, *pair)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		test(t, newPair(t))
		time.Sleep(time.Minute) // for the goroutines and timers of the network
	})
}

func TestStreamWaitsForTheEndOfACut(t *testing.T) {
	bubble(t, func(_ *testing.T, p *pair) {
		a, b := p.connect("raft")
		p.send(a, "one")
		p.arrives(b, "one", oneWay)
		end := p.net.Set(Rule{From: "a", Cut: true})
		p.send(a, "two")
		p.send(b, "back") // the other direction is open
		p.arrives(a, "back", oneWay)
		time.AfterFunc(4*time.Second, end)
		p.arrives(b, "two", 4*time.Second)
	})
}

func TestStreamEndsInALongCut(t *testing.T) {
	bubble(t, func(_ *testing.T, p *pair) {
		a, b := p.connect("raft")
		idle, _ := p.connect("raft")
		defer p.net.Set(Rule{From: "a-1", To: "b", Cut: true})()
		p.send(a, "lost")
		p.fails(a, syscall.ETIMEDOUT, userTimeout+2*time.Second)
		p.fails(b, syscall.ETIMEDOUT, time.Second)
		p.fails(idle, syscall.ETIMEDOUT, 2*time.Second) // keep-alives
	})
}

func TestLargePacketsAreCut(t *testing.T) {
	bubble(t, func(_ *testing.T, p *pair) {
		first, atB := p.connect("grpc")
		second, other := p.connect("grpc")
		end := p.net.Set(Rule{From: "a", Over: 100, Cut: true})
		p.send(first, "small")
		p.arrives(atB, "small", oneWay)
		large := strings.Repeat("x", 101)
		p.send(first, large)
		p.send(first, "behind it")
		p.send(second, "small")
		p.arrives(other, "small", oneWay)
		time.AfterFunc(3*time.Second, end)
		p.arrives(atB, large+"behind it", 3*time.Second)
	})
}

func TestOneKindIsCut(t *testing.T) {
	bubble(t, func(t *testing.T, p *pair) {
		raft, _ := p.connect("raft")
		grpc, atB := p.connect("grpc")
		defer p.net.Set(Rule{Traffic: "raft", Cut: true})()
		p.send(grpc, "passes")
		p.arrives(atB, "passes", oneWay)
		p.send(raft, "does not pass")
		p.fails(raft, syscall.ETIMEDOUT, keepAlive+time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if _, err := p.a.Dial(host.WithTraffic(ctx, "raft"), "10.2.0.10:7957"); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a dial during the cut: %v", err)
		}
	})
}

func TestDeadlines(t *testing.T) {
	bubble(t, func(t *testing.T, p *pair) {
		a, _ := p.connect("http")
		if err := a.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		p.fails(a, os.ErrDeadlineExceeded, time.Second)
		time.AfterFunc(time.Second, func() { _ = a.Close() }) // it is open
		if err := a.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		p.fails(a, net.ErrClosed, time.Second)
	})
}

func TestMachineGoesOff(t *testing.T) {
	for _, resets := range []bool{true, false} {
		bubble(t, func(t *testing.T, p *pair) {
			a, b := p.connect("http")
			p.b.Off(resets)
			want, within := error(syscall.ETIMEDOUT), userTimeout
			if resets {
				want, within = syscall.ECONNRESET, 0
			}
			p.fails(a, want, within)
			if _, err := b.Write([]byte("x")); err == nil {
				t.Error("a machine that is off sends")
			}
			if _, err := p.a.Dial(t.Context(), "10.2.0.10:7957"); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a dial to a machine that is off: %v", err)
			}
			if _, err := p.b.Listen("10.2.0.10:7957"); err == nil {
				t.Error("a machine that is off listens")
			}
		})
	}
}

// As with TCP, a write to an end that was closed succeeds until the reset comes back, which
// fails reads and writes alike; no write fails while reads still wait.
func TestWriteToAClosedEnd(t *testing.T) {
	bubble(t, func(t *testing.T, p *pair) {
		a, b := p.connect("http")
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		for {
			if _, err := a.Write([]byte("x")); errors.Is(err, syscall.ECONNRESET) {
				break
			} else if err != nil || time.Since(start) > time.Second {
				t.Fatalf("a write after %s: %v", time.Since(start), err)
			}
			time.Sleep(time.Millisecond)
		}
		if after := time.Since(start); after < 2*oneWay || after > 2*oneWay+time.Millisecond {
			t.Errorf("reset after %s, want a round trip, %s", after, 2*oneWay)
		}
	})
}

// Datagrams get lost, and overtake each other.
func TestDatagrams(t *testing.T) {
	bubble(t, func(t *testing.T, p *pair) {
		open := func(e *Endpoint) host.PacketConn {
			c, err := e.ListenPacket(netip.AddrPortFrom(e.addr, portGossip))
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		a, b := open(p.a), open(p.b)
		defer p.net.Set(Rule{From: "a", Traffic: GossipUDP, Loss: 0.3, Jitter: 100 * time.Millisecond})()
		const count = 200
		for i := range count {
			if _, err := a.WriteToUDPAddrPort([]byte{byte(i)}, netip.AddrPortFrom(p.b.addr, portGossip)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		time.AfterFunc(time.Second, func() { _ = b.Close() }) // it is open
		var got []byte
		for buf := make([]byte, 8); ; {
			if _, _, err := b.ReadFromUDPAddrPort(buf); err != nil {
				break
			}
			got = append(got, buf[0])
		}
		if len(got) < count/2 || len(got) > count*9/10 || slices.IsSorted(got) {
			t.Errorf("%d of %d arrived, in order: %t", len(got), count, slices.IsSorted(got))
		}
	})
}
