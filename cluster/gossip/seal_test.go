package gossip

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/test/async"
)

// What arrives at the port is refused for the right reason, and counted.
func TestRefusals(t *testing.T) {
	packet := func(message []byte) []byte { return sealedPacket(1, wireNonce(), message) }
	stream := func(message []byte) []byte { return sealedStream(1, wireNonce(), message) }
	ping, streamPing := memberPackets()["ping"], memberStreams()["ping"]
	otherLabel := func(sealed []byte) []byte { return bytes.Replace(sealed, []byte(wireLabel), []byte("dev/2"), 1) }
	damaged := func(sealed []byte) []byte { sealed[len(sealed)-1] ^= 1; return sealed }
	for _, tc := range []struct {
		name string
		sent []byte
		want refusal
	}{
		{"a ping", packet(ping), accepted},
		{"version 0", sealedPacket(0, wireNonce(), ping), refusedMalformed},
		{"version 2", sealedPacket(2, wireNonce(), ping), refusedMalformed},
		{"an empty message", packet(nil), refusedMalformed},
		{"never sealed", append(labelHeader(), ping...), refusedMalformed},
		{"no label", ping, refusedMalformed},
		{"longer than a datagram of gossip", packet(make([]byte, maxPacket)), refusedMalformed},
		{"another label", otherLabel(packet(ping)), refusedLabel},
		{"a changed byte", damaged(packet(ping)), refusedKey},
		{"compressed", packet(memberPackets()["compressed"]), refusedMessage},
		{"a compound of compounds", packet(memberPackets()["compound of compounds"]), refusedMessage},
		{"a truncated compound", packet(memberPackets()["truncated compound"]), refusedMessage},
		{"a user message", packet(memberPackets()["user message"]), refusedMessage},
		{"a compound", packet(memberPackets()["compound"]), accepted},
		{"a checksum", packet(memberPackets()["checksum"]), accepted},
	} {
		t.Run("packet/"+tc.name, func(t *testing.T) {
			w, g := startOnWire(t, nil)
			w.send(tc.sent)
			w.wantAnswer(t)
			wantRefused(t, g, tc.want)
		})
	}
	for _, tc := range []struct {
		name string
		sent []byte
		want refusal
	}{
		{"a ping", stream(streamPing), accepted},
		{"a list", stream(memberStreams()["list"]), accepted},
		{"version 0", sealedStream(0, wireNonce(), streamPing), refusedMalformed},
		{"an empty message", stream(nil), refusedMalformed},
		{"never sealed", append(labelHeader(), streamPing...), refusedMalformed},
		{"longer than a list of all members", append(labelHeader(), 10, 1, 0, 0, 0), refusedMalformed},
		{"another label", otherLabel(stream(streamPing)), refusedLabel},
		{"a changed byte", damaged(stream(streamPing)), refusedKey},
		{"compressed", stream(memberStreams()["compressed"]), refusedMessage},
		{"a huge list", stream(memberStreams()["a huge list"]), refusedMessage},
		{"user state", stream(memberStreams()["user state"]), refusedMessage},
		{"a user message", stream(memberStreams()["user message"]), refusedMessage},
	} {
		t.Run("stream/"+tc.name, func(t *testing.T) {
			w, g := startOnWire(t, nil)
			answer := w.stream(t, tc.sent)
			if (len(answer) > 0) != (tc.want == accepted) {
				t.Errorf("the answer has %d bytes, and only members get one", len(answer))
			}
			w.wantAnswer(t)
			wantRefused(t, g, tc.want)
		})
	}
}

func wantRefused(t *testing.T, g *Gossip, want refusal) {
	t.Helper()
	for why, counter := range g.metrics.refused {
		expected := 0.0
		if why == want {
			expected = 1
		}
		if got := testutil.ToFloat64(counter); got != expected {
			t.Errorf("%v refusals for %q, want %v", got, why, expected)
		}
	}
}

// A message takes effect once, however often somebody sends it, whether its sender numbers
// its messages or is of an earlier version.
func TestEachMessageTakesEffectOnce(t *testing.T) {
	w, g := startOnWire(t, nil)
	numbered := sealedPacket(1, numberedWireNonce("process", 7), wirePingFor(1))
	random := sealedPacket(1, wireNonce(), wirePingFor(2))
	for range 50 {
		w.send(numbered)
		w.send(random)
	}
	if got := fmt.Sprint(w.acks(t)); got != "[1 2]" {
		t.Errorf("answered the pings %s, want each once", got)
	}
	stream := sealedStream(1, wireNonce(), memberStreams()["list"])
	if first, again := w.stream(t, stream), w.stream(t, stream); len(first) == 0 || len(again) > 0 {
		t.Errorf("a list was answered with %d bytes, and when it was sent again with %d", len(first), len(again))
	}
	if got := testutil.ToFloat64(g.metrics.refused[refusedReplay]); got != 99 {
		t.Errorf("%v refused as sent again, want 99", got)
	}
}

// Once all members number their messages, others are old.
func TestUnnumberedMessagesAreRefusedAtTheNewLevel(t *testing.T) {
	s := newReplays(func() bool { return true })
	if s.first([nonceSize]byte(wireNonce())) {
		t.Error("a message without a number was taken")
	}
	if !s.first([nonceSize]byte(numberedWireNonce("process", 1))) {
		t.Error("a message with a number was refused")
	}
}

func TestWindow(t *testing.T) {
	for _, tc := range []struct {
		name     string
		received []uint64
		number   uint64
		first    bool
	}{
		{"the first of all", nil, 1, true},
		{"the first that arrives", nil, 1 << 31, true},
		{"again", []uint64{5}, 5, false},
		{"overtaken", []uint64{5, 7}, 6, true},
		{"overtaken and again", []uint64{5, 7, 6}, 6, false},
		{"overtaken by as many as the window has", []uint64{1 + windowSize}, 1, true},
		{"overtaken by more", []uint64{2 + windowSize}, 1, false},
		{"after a jump", []uint64{3, 1 << 20}, 1<<20 + 64*windowBlocks, true},
		{"after a jump, again", []uint64{3, 1 << 20, 1<<20 + 64*windowBlocks}, 1<<20 + 64*windowBlocks, false},
		{"a bit that the ring has reused", []uint64{3, 3 + 64*windowBlocks - 10}, 3 + 64*windowBlocks, true},
		{"the last", []uint64{5}, math.MaxUint32, true},
	} {
		var w window
		for _, n := range tc.received {
			w.first(n)
		}
		if got := w.first(tc.number); got != tc.first {
			t.Errorf("%s: first is %v, want %v", tc.name, got, tc.first)
		}
	}
}

// Whoever has recorded messages of many processes makes no process forget the living ones.
func TestReplaysAreBounded(t *testing.T) {
	r := newReplays(func() bool { return false })
	living := func(n uint32) bool { return r.first([nonceSize]byte(numberedWireNonce("living!", n))) }
	for i := range uint32(2 * maxSenders) {
		if !living(i + 1) {
			t.Fatalf("message %d was refused", i+1)
		}
		r.first([nonceSize]byte(numberedWireNonce(fmt.Sprintf("%07d", i), 1)))
		r.first([nonceSize]byte(wireNonce()))
	}
	for range 3 * maxUnnumbered {
		r.first([nonceSize]byte(wireNonce()))
	}
	if living(2 * maxSenders) {
		t.Error("a message of a living process was taken again")
	}
	if len(r.senders) != maxSenders || r.order.Len() != maxSenders || len(r.newer)+len(r.older) > 2*maxUnnumbered {
		t.Errorf("remembers %d processes (%d in order) and %d nonces", len(r.senders), r.order.Len(), len(r.newer)+len(r.older))
	}
}

func TestNoncesAreUsedOnce(t *testing.T) {
	var q sequence
	seen := map[[nonceSize]byte]bool{}
	for i := range 1000 {
		if i == 500 {
			q.last = math.MaxUint32 - 1 // two before other random bytes
		}
		nonce := q.next()
		if seen[nonce] || nonce[0] != numberedNonce {
			t.Fatalf("nonce %x after %d others", nonce, i)
		}
		seen[nonce] = true
	}
}

// A stream has room for the longest list of members, and a packet for the longest message.
func TestAStreamHasRoomForAllMembers(t *testing.T) {
	member := wireMember{
		Name: strings.Repeat("n", 63), Addr: make([]byte, 16), Port: math.MaxUint16, Meta: make([]byte, maxMeta),
		Incarnation: math.MaxUint32, State: 3, Vsn: []uint8{1, 5, 5, 255, 255, 255},
	}
	members := []any{wirePing{Nodes: maxListed, Join: true}}
	for range maxListed {
		members = append(members, member)
	}
	list := wireMessage(6, members...)
	if len(list) > maxMessage || !knownStream(list) {
		t.Errorf("a list of %d members has %d bytes, a stream has room for %d", maxListed, len(list), maxMessage)
	}
}

// Memory for streams that send what only a list of all members needs is bounded, and that
// of strangers takes nothing from members.
func TestStreamsShareABoundOfBytes(t *testing.T) {
	w, g := startOnWire(t, nil)
	g.mu.Lock()
	tr := g.transport
	g.mu.Unlock()
	if tr.poolFor(wireTest, true) != &tr.strangers {
		t.Fatal("an unknown address counts as a member's")
	}
	if !tr.strangers.take(poolBytes - firstRead + 1) {
		t.Fatal("the pool is not empty")
	}
	if answer := w.stream(t, sealedStream(1, wireNonce(), bytes.Repeat([]byte{6}, 5000))); len(answer) > 0 {
		t.Error("a stream was answered that had no room")
	}
	wantRefused(t, g, refusedBytes)
	if got := tr.strangers.open; got != 0 {
		t.Errorf("%d streams are counted as open, and all are closed", got)
	}
	alive := memberPackets()["alive"] // at the test's address
	w.send(sealedPacket(1, wireNonce(), alive))
	async.Await(t, "the test's address to be a member's", func() bool { return tr.poolFor(wireTest, true) == &tr.members })
	if answer := w.stream(t, sealedStream(1, wireNonce(), memberStreams()["ping"])); len(answer) == 0 {
		t.Error("a member's stream was refused for bytes of strangers")
	}
}

// A removed node comes back neither by its own message nor by another member's list.
func TestRemovedNodesAreNotAccepted(t *testing.T) {
	var removed atomic.Bool
	removed.Store(true)
	w, g := startOnWire(t, func(o *Options) {
		o.Removed = func(name string) bool { return name == "a" || removed.Load() && name == "b" }
	})
	known := func() bool {
		for _, m := range g.Members() {
			if m.Name == "b" {
				return true
			}
		}
		return false
	}
	w.send(sealedPacket(1, wireNonce(), wireCompound(memberPackets()["alive"], memberPackets()["ping"])))
	w.stream(t, sealedStream(1, wireNonce(), memberStreams()["list"]))
	w.wantAnswer(t)
	if known() {
		t.Error("a removed node is a member again")
	}
	removed.Store(false) // admitted again
	w.stream(t, sealedStream(1, wireNonce(), memberStreams()["list"]))
	async.Await(t, "the node to be a member", known)
}

// A node of this version and one that leaves sealing to memberlist, as earlier versions do,
// are members of one cluster, over UDP and TCP.
func TestUnderstandsEarlierVersions(t *testing.T) {
	async.NoLeaks(t)
	a := startGossip(t, "a", nil, nil)
	c := memberlist.DefaultLANConfig()
	c.Name, c.BindAddr, c.BindPort, c.AdvertiseAddr = "b", "127.0.0.1", 0, "127.0.0.1"
	c.Label, c.SecretKey, c.EnableCompression = "dev/1", testKey, false
	c.ProbeInterval, c.ProbeTimeout, c.DisableTcpPings = 50*time.Millisecond, 25*time.Millisecond, true
	meta := seedMeta()
	var published atomic.Pointer[[]byte]
	published.Store(&meta)
	c.Delegate = delegate{meta: &published}
	c.Logger = log.New(io.Discard, "", 0)
	b, err := memberlist.Create(c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Shutdown() }()
	if _, err := b.Join([]string{a.Addr()}); err != nil {
		t.Fatal(err)
	}
	async.Await(t, "a to see b", a.seesAs("b", MemberAlive))
	async.Await(t, "a to get an answer from b over UDP", func() bool { _, ever := a.UDPAgo("b"); return ever })
	if b.NumMembers() != 2 {
		t.Errorf("b sees %d members, want 2", b.NumMembers())
	}
	if _, err := b.Ping("a", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(a.Addr()))); err != nil {
		t.Errorf("b gets no answer from a over UDP: %v", err)
	}
}

// BenchmarkPacket is what the checks of a received packet cost, and what memberlist's own
// decryption of the same bytes costs, which they replace: a new cipher for each packet.
func BenchmarkPacket(b *testing.B) {
	const size = 700 // an alive message with the longest metadata
	message := append([]byte{aliveMessage}, make([]byte, size)...)
	numbered := func() bool { return true }
	b.Run("checks", func(b *testing.B) {
		from, err := newSealing([][]byte{testKey}, wireLabel, numbered)
		if err != nil {
			b.Fatal(err)
		}
		to, err := newSealing([][]byte{testKey}, wireLabel, numbered)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		packets := make([][]byte, 1024)
		for i := 0; i < b.N; i += len(packets) {
			b.StopTimer()
			for j := range packets {
				packets[j] = from.sealPacket(message)
			}
			b.StartTimer()
			for _, p := range packets {
				if _, refused := to.openPacket(p); refused != accepted {
					b.Fatal(refused)
				}
			}
		}
	})
	b.Run("memberlist", func(b *testing.B) {
		packet := sealedPacket(1, wireNonce(), message)[len(labelHeader()):]
		b.ReportAllocs()
		for b.Loop() {
			if _, err := wireAEAD().Open(nil, packet[1:13], packet[13:], []byte(wireLabel)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("refused", func(b *testing.B) {
		to, err := newSealing([][]byte{testKey}, wireLabel, numbered)
		if err != nil {
			b.Fatal(err)
		}
		packet := sealedPacket(1, wireNonce(), message)
		packet[len(packet)-1] ^= 1
		b.ReportAllocs()
		for b.Loop() {
			if _, refused := to.openPacket(packet); refused != refusedKey {
				b.Fatal(refused)
			}
		}
	})
}
