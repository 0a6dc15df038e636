package cluster

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/clock"
)

// Waiters are notified when a lease begins and of higher counters, not of each
// extension.
func TestLeaseNotifiesOfNewLeasesAndHigherFences(t *testing.T) {
	l := &lease{length: time.Minute}
	notified := func(f func()) bool {
		changed := l.changed.Next()
		f()
		select {
		case <-changed:
			return true
		default:
			return false
		}
	}
	for _, c := range []struct {
		name string
		f    func()
		want bool
	}{
		{"a lease begins", func() { l.committed(clock.Boottime(), fences{epoch: 1}) }, true},
		{"an extension by a tick", func() { l.committed(clock.Boottime(), fences{epoch: 1}) }, false},
		{"an extension by a peer's answer", func() { l.relayed(clock.Boottime(), time.Minute, fences{epoch: 1}) }, false},
		{"a higher epoch", func() { l.relayed(clock.Boottime(), time.Second, fences{epoch: 2}) }, true},
		{"a lower epoch", func() { l.relayed(clock.Boottime(), time.Second, fences{epoch: 1}) }, false},
		{"a change of ownership", func() { l.relayed(clock.Boottime(), time.Second, fences{ownership: 7}) }, true},
		{"a new lease after its end", func() {
			l.until = clock.Boottime() - time.Second
			l.relayed(clock.Boottime(), time.Second, fences{epoch: 2})
		}, true},
	} {
		if notified(c.f) != c.want {
			t.Errorf("%s: notified %v, want %v", c.name, !c.want, c.want)
		}
	}
}

func TestLeaseCountsFromProposal(t *testing.T) {
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

func TestLeaseRejectsAClaimAboveItsLength(t *testing.T) {
	l := &lease{length: time.Minute}
	l.relayed(clock.Boottime(), time.Hour, fences{epoch: 1})
	if left, _ := l.left(); left > 0 {
		t.Errorf("a peer's claim of an hour gave a lease of %s", left)
	}
	if l.everHeld() {
		t.Error("a rejected claim counts as a lease")
	}
}

func TestExpiredLeaseStillCarriesFences(t *testing.T) {
	l := &lease{length: time.Minute}
	l.relayed(clock.Boottime(), 0, fences{epoch: 7, ownership: 9})
	if left, heard := l.left(); left > 0 || heard.epoch != 7 || heard.ownership != 9 {
		t.Errorf("left %s, counters %+v, want no lease, epoch 7 and ownership 9", left, heard)
	}
}

// Through any chain of peers, no node holds a lease from a tick longer than the leader
// that committed the tick.
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
			t.Fatalf("the last peer has the counters %+v", heard)
		}
	})
}
