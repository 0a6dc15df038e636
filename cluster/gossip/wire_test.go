package gossip

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"

	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/test/async"
)

// The wire as a test sees it, written without the code that it tests.

const wireLabel = "dev/1"

// Messages of memberlist.
type (
	// wirePing has the fields of several messages.
	wirePing struct {
		SeqNo        uint32 `codec:",omitempty"`
		Node         string `codec:",omitempty"`
		SourceAddr   []byte `codec:",omitempty"`
		SourcePort   uint16 `codec:",omitempty"`
		SourceNode   string `codec:",omitempty"`
		Target       []byte `codec:",omitempty"` // of an indirect ping, as are the next two
		Port         uint16 `codec:",omitempty"`
		Nack         bool   `codec:",omitempty"`
		Incarnation  uint32 `codec:",omitempty"` // of a suspect or dead message, as is the next one
		From         string `codec:",omitempty"`
		UserMsgLen   int    `codec:",omitempty"` // of a user message
		Nodes        int    `codec:",omitempty"` // of a list of members, as are the next two
		UserStateLen int    `codec:",omitempty"`
		Join         bool   `codec:",omitempty"`
	}
	wireMember struct {
		Name        string
		Addr        []byte
		Port        uint16
		Meta        []byte
		Incarnation uint32
		State       int
		Vsn         []uint8
	}
	wireAlive struct {
		Incarnation uint32
		Node        string
		Addr        []byte
		Port        uint16
		Meta        []byte
		Vsn         []uint8
	}
	wireCompressed struct {
		Algo uint8
		Buf  []byte
	}
)

func wireMessage(kind byte, values ...any) []byte {
	buf := bytes.NewBuffer([]byte{kind})
	for _, v := range values {
		if err := codec.NewEncoder(buf, &codec.MsgpackHandle{}).Encode(v); err != nil {
			panic(err)
		}
	}
	return buf.Bytes()
}

func wireCompound(messages ...[]byte) []byte {
	out := []byte{7, byte(len(messages))}
	for _, m := range messages {
		out = binary.BigEndian.AppendUint16(out, uint16(len(m)))
	}
	return append(out, bytes.Join(messages, nil)...)
}

func wireChecksum(message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{12}, crc32.ChecksumIEEE(message)), message...)
}

func wireAEAD() cipher.AEAD {
	block, err := aes.NewCipher(testKey)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// wireNonce is random, as earlier versions send it, but never looks numbered.
func wireNonce() []byte {
	nonce := make([]byte, 12)
	_, _ = rand.Read(nonce)
	nonce[0] &= 0x7f
	return nonce
}

// numberedWireNonce is the nonce of one process's message with a number.
func numberedWireNonce(process string, number uint32) []byte {
	return binary.BigEndian.AppendUint32(append([]byte{0xd5}, process[:7]...), number)
}

func labelHeader() []byte { return append([]byte{244, byte(len(wireLabel))}, wireLabel...) }

func sealedPacket(version byte, nonce, message []byte) []byte {
	out := append(append(labelHeader(), version), nonce...)
	return wireAEAD().Seal(out, nonce, message, []byte(wireLabel))
}

func sealedStream(version byte, nonce, message []byte) []byte {
	header := binary.BigEndian.AppendUint32([]byte{10}, uint32(1+12+16+len(message)))
	out := append(append(append(labelHeader(), header...), version), nonce...)
	return wireAEAD().Seal(out, nonce, message, append(header, wireLabel...))
}

// openedPacket returns the messages of a packet that a node has sent.
func openedPacket(t testing.TB, packet []byte) [][]byte {
	t.Helper()
	rest, ok := bytes.CutPrefix(packet, append(labelHeader(), 1))
	if !ok || len(rest) < 12 {
		t.Fatalf("a node sent the packet %x, want the label and version 1", packet)
	}
	message, err := wireAEAD().Open(nil, rest[:12], rest[12:], []byte(wireLabel))
	if err != nil {
		t.Fatalf("a node sent a packet that its key does not open: %v", err)
	}
	if message[0] == 12 {
		message = message[5:]
	}
	if message[0] != 7 {
		return [][]byte{message}
	}
	var messages [][]byte
	count := int(message[1])
	at := 2 + 2*count
	for i := range count {
		size := int(binary.BigEndian.Uint16(message[2+2*i:]))
		messages = append(messages, message[at:at+size])
		at += size
	}
	return messages
}

// wireNet is the network of one node in memory. Packets to other addresses than the
// test's are lost, and nobody answers a dial.
type wireNet struct {
	to    chan datagram
	from  chan []byte
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

type datagram struct {
	bytes []byte
	from  netip.AddrPort
}

var (
	wireNode = netip.MustParseAddrPort("192.0.2.1:7956")
	wireTest = netip.MustParseAddrPort("192.0.2.99:7956")
)

// startOnWire runs a node whose network is in memory.
func startOnWire(t testing.TB, change func(*Options)) (*wireNet, *Gossip) {
	t.Helper()
	w := &wireNet{to: make(chan datagram), from: make(chan []byte, 1024), conns: make(chan net.Conn), done: make(chan struct{})}
	o := Options{
		Name: "a", Bind: wireNode.String(), Key: testKey, Label: wireLabel, Host: &host.Host{Network: w},
		Self: func() Member { return Member{Site: "s"} }, Seeds: func() []string { return nil },
		Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&o)
	}
	g := New(o)
	async.Run(t, g.Run)
	w.wantAnswer(t)
	return w, g
}

// send gives the node a packet; it returns when the node reads the next one.
func (w *wireNet) send(packet []byte) { w.sendFrom(wireTest, packet) }

func (w *wireNet) sendFrom(from netip.AddrPort, packet []byte) {
	select {
	case w.to <- datagram{packet, from}:
	case <-w.done:
	}
}

var wireSeq uint32

func wirePingFor(seq uint32) []byte {
	return wireMessage(0, wirePing{SeqNo: seq, Node: "a", SourceAddr: wireTest.Addr().AsSlice(), SourcePort: wireTest.Port(), SourceNode: "test"})
}

// acks returns the numbers of the pings that the node has answered, up to the answer to a
// ping of this call.
func (w *wireNet) acks(t testing.TB) []uint32 {
	t.Helper()
	wireSeq++
	last := 1<<31 + wireSeq
	w.send(sealedPacket(1, wireNonce(), wirePingFor(last)))
	var seen []uint32
	deadline := time.After(10 * time.Second)
	for {
		select {
		case packet := <-w.from:
			for _, m := range openedPacket(t, packet) {
				var ack struct{ SeqNo uint32 }
				if m[0] != 2 {
					continue
				}
				if err := codec.NewDecoderBytes(m[1:], &codec.MsgpackHandle{}).Decode(&ack); err != nil {
					t.Fatal(err)
				}
				if ack.SeqNo == last {
					return seen
				}
				seen = append(seen, ack.SeqNo)
			}
		case <-deadline:
			t.Fatal("the node does not answer a ping of a member")
		}
	}
}

func (w *wireNet) wantAnswer(t testing.TB) {
	t.Helper()
	w.acks(t)
}

// stream gives the node a stream that ends after these bytes, and returns what the node
// answered.
func (w *wireNet) stream(t testing.TB, sent []byte) []byte {
	t.Helper()
	c := &wireConn{sent: bytes.NewReader(sent), closed: make(chan struct{})}
	select {
	case w.conns <- c:
	case <-w.done:
		return nil
	}
	select {
	case <-c.closed:
	case <-time.After(10 * time.Second):
		t.Fatal("the node does not close a stream that has ended")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.answer)
}

func (w *wireNet) Dial(context.Context, string) (net.Conn, error) {
	return nil, errors.New("nobody answers")
}

func (w *wireNet) Listen(string) (net.Listener, error) { return wireListener{w}, nil }

func (w *wireNet) ListenPacket(netip.AddrPort) (host.PacketConn, error) { return wirePackets{w}, nil }

func (w *wireNet) close() error { w.once.Do(func() { close(w.done) }); return nil }

func (w *wireNet) addr() net.Addr { return net.TCPAddrFromAddrPort(wireNode) }

type wireListener struct{ net *wireNet }

func (l wireListener) Close() error   { return l.net.close() }
func (l wireListener) Addr() net.Addr { return l.net.addr() }
func (l wireListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.net.conns:
		return c, nil
	case <-l.net.done:
		return nil, net.ErrClosed
	}
}

type wirePackets struct{ net *wireNet }

func (wirePackets) SetReadBuffer(int) error { return nil }
func (p wirePackets) Close() error          { return p.net.close() }
func (p wirePackets) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	select {
	case d := <-p.net.to:
		return copy(b, d.bytes), d.from, nil
	case <-p.net.done:
		return 0, netip.AddrPort{}, net.ErrClosed
	}
}

func (p wirePackets) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	if to == wireTest {
		select {
		case p.net.from <- slices.Clone(b):
		default: // lost
		}
	}
	return len(b), nil
}

type wireConn struct {
	sent   *bytes.Reader
	closed chan struct{}
	once   sync.Once

	mu     sync.Mutex // guards answer
	answer []byte
}

func (c *wireConn) Read(b []byte) (int, error) {
	if c.sent.Len() == 0 {
		return 0, io.EOF
	}
	return c.sent.Read(b)
}

func (c *wireConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answer = append(c.answer, b...)
	return len(b), nil
}

func (c *wireConn) Close() error                   { c.once.Do(func() { close(c.closed) }); return nil }
func (*wireConn) LocalAddr() net.Addr              { return net.TCPAddrFromAddrPort(wireNode) }
func (*wireConn) RemoteAddr() net.Addr             { return net.TCPAddrFromAddrPort(wireTest) }
func (*wireConn) SetDeadline(time.Time) error      { return nil }
func (*wireConn) SetReadDeadline(time.Time) error  { return nil }
func (*wireConn) SetWriteDeadline(time.Time) error { return nil }
