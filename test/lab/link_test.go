//go:build linux

package lab

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// arrivals records which packets a pipe delivers, and when.
type arrivals struct {
	mu    sync.Mutex
	begun time.Time
	ids   []int
	after []time.Duration
}

func (a *arrivals) take(packet []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ids = append(a.ids, int(packet[0])<<8|int(packet[1]))
	a.after = append(a.after, time.Since(a.begun))
}

func packet(id, size int) []byte {
	p := make([]byte, size)
	p[0], p[1] = byte(id>>8), byte(id)
	return p
}

// inBubble runs f with a pipe in virtual time.
func inBubble(t *testing.T, l Link, f func(p *pipe, a *arrivals)) {
	synctest.Test(t, func(t *testing.T) {
		a := &arrivals{begun: time.Now()}
		p := newPipe(1, a.take)
		p.set(l)
		done := make(chan struct{})
		go p.run(done)
		f(p, a)
		close(done)
		synctest.Wait()
	})
}

// settle lets virtual time pass and waits until the pipe has nothing more to do.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestDelayIsExactAndInOrder(t *testing.T) {
	inBubble(t, Link{Delay: 15 * time.Millisecond}, func(p *pipe, a *arrivals) {
		for id := range 5 {
			p.send(packet(id, 100))
			settle(time.Millisecond)
		}
		settle(time.Second)
		want := []time.Duration{15, 16, 17, 18, 19}
		for i, w := range want {
			if a.ids[i] != i || a.after[i] != w*time.Millisecond {
				t.Errorf("arrival %d: packet %d after %v, want packet %d after %v", i, a.ids[i], a.after[i], i, w*time.Millisecond)
			}
		}
	})
}

func TestJitterStaysInBoundsAndOrder(t *testing.T) {
	inBubble(t, Link{Delay: 10 * time.Millisecond, Jitter: 200 * time.Millisecond}, func(p *pipe, a *arrivals) {
		const n = 2000
		sent := make([]time.Duration, n)
		for id := range n {
			sent[id] = time.Since(a.begun)
			p.send(packet(id, 100))
			settle(5 * time.Millisecond)
		}
		settle(time.Second)
		if len(a.ids) != n || !slices.IsSorted(a.ids) {
			t.Fatalf("%d of %d arrived, in order: %v", len(a.ids), n, slices.IsSorted(a.ids))
		}
		least, most, sum := time.Hour, time.Duration(0), time.Duration(0)
		for i := range n {
			took := a.after[i] - sent[i]
			least, most, sum = min(least, took), max(most, took), sum+took
		}
		if least < 10*time.Millisecond || most > 210*time.Millisecond {
			t.Errorf("packets took %v to %v, want 10 ms to 210 ms", least, most)
		}
		if mean := sum / n; mean < 70*time.Millisecond || mean > 190*time.Millisecond {
			t.Errorf("packets took %v on average: the jitter does not vary", mean)
		}
	})
}

func TestLossTakesItsShare(t *testing.T) {
	inBubble(t, Link{Loss: 0.02}, func(p *pipe, a *arrivals) {
		for id := range 20000 {
			p.send(packet(id%65536, 100))
		}
		_, count := p.get()
		if count.Lost < 300 || count.Lost > 500 {
			t.Errorf("%d of 20000 lost, want about 400", count.Lost)
		}
		if int(count.Carried) != len(a.ids) || count.Carried+count.Lost != 20000 {
			t.Errorf("counted %+v, delivered %d", count, len(a.ids))
		}
	})
}

func TestOnlySmallPacketsPass(t *testing.T) {
	inBubble(t, Link{Delay: time.Millisecond, Largest: 1100}, func(p *pipe, a *arrivals) {
		p.send(packet(1, 1100))
		p.send(packet(2, 1101))
		p.send(packet(3, 40))
		settle(time.Second)
		if _, count := p.get(); !slices.Equal(a.ids, []int{1, 3}) || count.TooLarge != 1 || count.Carried != 2 {
			t.Errorf("arrived %v, counted %+v, want all but the packet of 1,101 bytes", a.ids, count)
		}
	})
}

func TestOnlyUDPIsBlocked(t *testing.T) {
	inBubble(t, Link{Delay: time.Millisecond, NoUDP: true}, func(p *pipe, a *arrivals) {
		tcp, udp := packet(1, 100), packet(2, 100)
		tcp[9], udp[9] = 6, 17 // the protocols in an IP header
		p.send(tcp)
		p.send(udp)
		settle(time.Second)
		if _, count := p.get(); !slices.Equal(a.ids, []int{1}) || count.UDP != 1 {
			t.Errorf("arrived %v, counted %+v, want all but the UDP packet", a.ids, count)
		}
	})
}

func TestBandwidthSpacesPacketsAndDropsTheTail(t *testing.T) {
	inBubble(t, Link{Bandwidth: 1_000_000}, func(p *pipe, a *arrivals) {
		for id := range 1000 { // 1 MB at once: half a second of it may wait
			p.send(packet(id, 1000))
		}
		settle(2 * time.Second)
		_, count := p.get()
		if n := len(a.ids); n < 495 || n > 505 || count.Overflowed != uint64(1000-n) {
			t.Fatalf("%d delivered, %d overflowed, want about half of 1000", n, count.Overflowed)
		}
		if last := a.after[len(a.after)-1]; last < 495*time.Millisecond || last > 505*time.Millisecond {
			t.Errorf("the last packet came after %v, want about 500 ms", last)
		}
	})
}

func TestCutDropsWhatIsUnderWay(t *testing.T) {
	inBubble(t, Link{Delay: 100 * time.Millisecond}, func(p *pipe, a *arrivals) {
		p.send(packet(1, 100))
		settle(50 * time.Millisecond)
		p.set(Link{Delay: 100 * time.Millisecond, Cut: true})
		p.send(packet(2, 100))
		settle(time.Second)
		p.set(Link{})
		p.send(packet(3, 100))
		settle(time.Second)
		if !slices.Equal(a.ids, []int{3}) {
			t.Errorf("arrived %v, want only the packet sent after the cut", a.ids)
		}
		if _, count := p.get(); count.Cut != 2 {
			t.Errorf("%d counted as cut, want 2", count.Cut)
		}
	})
}
