package cluster

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/clock"
)

// A waiter is told when a lease begins and of a higher epoch, not of each
// extension.
func TestLeaseTellsWhatIsNew(t *testing.T) {
	l := &lease{length: time.Minute}
	told := func(f func()) bool {
		news := l.changed()
		f()
		select {
		case <-news:
			return true
		default:
			return false
		}
	}
	for _, c := range []struct {
		name  string
		f     func()
		heard bool
	}{
		{"a lease begins", func() { l.committed(clock.Boottime(), fences{epoch: 1}) }, true},
		{"it goes on", func() { l.committed(clock.Boottime(), fences{epoch: 1}) }, false},
		{"it is handed on", func() { l.relayed(clock.Boottime(), time.Minute, fences{epoch: 1}) }, false},
		{"a higher epoch", func() { l.relayed(clock.Boottime(), time.Second, fences{epoch: 2}) }, true},
		{"a lower epoch", func() { l.relayed(clock.Boottime(), time.Second, fences{epoch: 1}) }, false},
		{"a change of ownership", func() { l.relayed(clock.Boottime(), time.Second, fences{ownership: 7}) }, true},
		{"another after its end", func() {
			l.until = clock.Boottime() - time.Second
			l.relayed(clock.Boottime(), time.Second, fences{epoch: 2})
		}, true},
	} {
		if told(c.f) != c.heard {
			t.Errorf("%s: told %v, want %v", c.name, !c.heard, c.heard)
		}
	}
}

func TestLeaseCountsFromBeforeTheTick(t *testing.T) {
	l := &lease{length: time.Minute}
	now := clock.Boottime()
	l.committed(now-50*time.Second, fences{epoch: 3})
	left, heard := l.left()
	if left > 10*time.Second || left < 9*time.Second {
		t.Errorf("left %s, want just under 10 s", left)
	}
	if heard.epoch != 3 {
		t.Errorf("epoch %d, want 3", heard.epoch)
	}
	l.committed(now-55*time.Second, fences{epoch: 2})
	if again, heard := l.left(); again > left || heard.epoch != 3 {
		t.Errorf("an older tick changed the lease to %s, epoch %d", again, heard.epoch)
	}
}

func TestLeaseRefusesMoreThanALease(t *testing.T) {
	l := &lease{length: time.Minute}
	l.relayed(clock.Boottime(), time.Hour, fences{epoch: 1})
	if left, _ := l.left(); left > 0 {
		t.Errorf("a peer that claims an hour gave %s", left)
	}
	if l.everHeld() {
		t.Error("it counts as held")
	}
}

func TestLeaseTellsOfAPromotionEvenWithoutTime(t *testing.T) {
	l := &lease{length: time.Minute}
	l.relayed(clock.Boottime(), 0, fences{epoch: 7, ownership: 9})
	if left, heard := l.left(); left > 0 || heard.epoch != 7 || heard.ownership != 9 {
		t.Errorf("left %s epoch %d, want none and 7", left, heard.epoch)
	}
}

// However a tick's lease is handed on, nobody holds it longer than the leader
// that committed it.
func TestRelayedLeaseNeverOutlivesItsTick(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const length = time.Hour
		leader := &lease{length: length}
		leader.committed(clock.Boottime()-time.Duration(rapid.Int64Range(0, int64(length)).Draw(t, "age")), fences{epoch: 1, ownership: 5})
		from := leader
		for range rapid.IntRange(1, 5).Draw(t, "hops") {
			next := &lease{length: length}
			sent := clock.Boottime() - time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(t, "wire"))
			left, heard := from.left()
			next.relayed(sent, left, heard)
			from = next
		}
		atLeader, _ := leader.left()
		atEnd, heard := from.left()
		if atEnd > atLeader+time.Millisecond {
			t.Fatalf("the relayed lease lasts %s, the leader's %s", atEnd, atLeader)
		}
		if heard != (fences{epoch: 1, ownership: 5}) {
			t.Fatalf("of the counters %+v arrived", heard)
		}
	})
}
