//go:build linux

package lab

import (
	"context"
	"errors"
	"io"
	"net"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

func network(t *testing.T, sites int) *Network {
	t.Helper()
	Require(t)
	w, err := NewNetwork(sites, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

// echo starts a server in a site that sends back what it receives.
func echo(t *testing.T, w *Network, site int) (addr string) {
	t.Helper()
	l, err := w.Listen(site, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	return l.Addr().String()
}

func dial(t *testing.T, w *Network, site int, addr string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := w.Dial(ctx, site, addr)
	if err != nil {
		t.Fatalf("dial %s from site %d: %v", addr, site, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func roundTrip(t *testing.T, c net.Conn) time.Duration {
	t.Helper()
	begun := time.Now()
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	return time.Since(begun)
}

// quickest repeats a round trip until one is quick enough, since a busy machine
// delays packets too, and returns the shortest.
func quickest(t *testing.T, c net.Conn, enough time.Duration) time.Duration {
	t.Helper()
	least := time.Hour
	within(30*time.Second, func() bool {
		least = min(least, roundTrip(t, c))
		return least <= enough
	})
	return least
}

func TestRoundTripTakesTheDelayOfBothWays(t *testing.T) {
	w := network(t, 3)
	addr := echo(t, w, 1)
	near := dial(t, w, 1, addr) // from the same site, which passes no link
	far := dial(t, w, 0, addr)
	w.Set(0, 1, Link{Delay: 40 * time.Millisecond})
	w.Set(1, 0, Link{Delay: 20 * time.Millisecond})
	if took := quickest(t, far, 80*time.Millisecond); took < 60*time.Millisecond || took > 80*time.Millisecond {
		t.Errorf("the quickest round trip between sites took %v, want about 60 ms", took)
	}
	if took := quickest(t, near, 20*time.Millisecond); took > 20*time.Millisecond {
		t.Errorf("the quickest round trip within the site took %v", took)
	}
}

func TestOneWayCutOfDatagrams(t *testing.T) {
	w := network(t, 2)
	a, b := packetConn(t, w, 0), packetConn(t, w, 1)
	w.Cut(0, 1)
	send(t, a, b, "dropped")
	send(t, b, a, "back")
	if got := receive(t, a); got != "back" {
		t.Errorf("the open direction carried %q", got)
	}
	if !within(10*time.Second, func() bool {
		_, count := w.Link(0, 1)
		return count.Cut == 1
	}) {
		t.Fatal("the packet into the cut was not counted")
	}
	w.Mend(0, 1)
	send(t, a, b, "through")
	if got := receive(t, b); got != "through" {
		t.Errorf("after the cut %q arrived, want only what was sent after it", got)
	}
}

// A site whose large packets are dropped still has its connections, and gets small
// messages over them. What is larger waits until the end of the fault.
func TestSmallMessagesPassAShrunkLink(t *testing.T) {
	w := network(t, 3)
	small, large := dial(t, w, 0, echo(t, w, 1)), dial(t, w, 2, echo(t, w, 1))
	w.Shrink(1, 1100)
	roundTrip(t, small)
	go func() { _, _ = large.Write(make([]byte, 8000)) }()
	if !within(10*time.Second, func() bool {
		_, count := w.Link(2, 1)
		return count.TooLarge > 0
	}) {
		t.Fatal("no large packet was dropped")
	}
	roundTrip(t, small)
	w.Shrink(1, 0)
	if err := large.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(large, make([]byte, 8000)); err != nil {
		t.Errorf("what was written during the fault did not arrive after it: %v", err)
	}
}

// During a cut new connections are neither refused nor opened, and connections that
// exist wait. After it both go on.
func TestCutHoldsDials(t *testing.T) {
	w := network(t, 3)
	addr := echo(t, w, 1)
	old := dial(t, w, 0, addr)
	w.Isolate(1)

	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := w.Dial(short, 0, addr); !errors.Is(err, context.DeadlineExceeded) {
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("dialling through a cut: %v, want a timeout", err)
		}
	}
	if _, err := old.Write([]byte("ping")); err != nil {
		t.Errorf("writing into a cut: %v", err)
	}
	w.MendAll()
	if err := old.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(old, make([]byte, 4)); err != nil {
		t.Errorf("what was written during the cut did not arrive after it: %v", err)
	}
	roundTrip(t, dial(t, w, 2, addr))
}

func TestStreamSurvivesLoss(t *testing.T) {
	w := network(t, 2)
	addr := echo(t, w, 1)
	w.SetAll(Link{Delay: time.Millisecond, Loss: 0.02})
	c := dial(t, w, 0, addr)
	const size = 2 << 20
	go func() { _, _ = c.Write(make([]byte, size)) }()
	if err := c.SetReadDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, size)); err != nil {
		t.Fatalf("TCP did not repair 2 %% of loss: %v", err)
	}
	if _, count := w.Link(0, 1); count.Lost == 0 {
		t.Error("nothing was lost")
	}
}

func TestThroughput(t *testing.T) {
	w := network(t, 2)
	addr := echo(t, w, 1)
	transfer := func(size int) float64 {
		c := dial(t, w, 0, addr)
		begun := time.Now()
		go func() { _, _ = c.Write(make([]byte, size)) }()
		if _, err := io.ReadFull(c, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		return float64(size) / time.Since(begun).Seconds() / 1e6
	}
	// A busy machine slows transfers down, so only the fastest counts.
	fastest := func(size int, enough float64) (most float64) {
		within(30*time.Second, func() bool {
			most = max(most, transfer(size))
			return most >= enough
		})
		return most
	}
	free := fastest(32<<20, 5)
	w.Set(0, 1, Link{Bandwidth: 1e6})
	limited := fastest(1<<20, 0.5)
	t.Logf("echoed %.0f MB/s without a limit, %.2f MB/s with 1 MB/s", free, limited)
	if free < 5 {
		t.Errorf("links without a limit carry %.1f MB/s: they would be the bottleneck", free)
	}
	if limited > 1.1 || limited < 0.5 {
		t.Errorf("a link of 1 MB/s carried %.2f MB/s", limited)
	}
}

func TestProcessesEndWithTheNetwork(t *testing.T) {
	Require(t)
	w, err := NewNetwork(1, 1)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "3600")
	if err := w.Start(0, cmd); err != nil {
		t.Fatal(err)
	}
	w.Close()
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("the process ended with %v, want killed", err)
	}
}

// within waits until the condition holds, and reports false when time runs out.
func within(d time.Duration, condition func() bool) bool {
	for over := time.Now().Add(d); !condition(); pause(5 * time.Millisecond) {
		if time.Now().After(over) {
			return condition()
		}
	}
	return true
}

func packetConn(t *testing.T, w *Network, site int) net.PacketConn {
	t.Helper()
	c, err := w.ListenPacket(site, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func send(t *testing.T, from, to net.PacketConn, text string) {
	t.Helper()
	if _, err := from.WriteTo([]byte(text), to.LocalAddr()); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, c net.PacketConn) string {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, _, err := c.ReadFrom(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}
