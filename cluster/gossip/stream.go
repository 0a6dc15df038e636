package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// Bounds of what streams hold. The largest message is a list of all members that a node
// knows, with the longest names, addresses and metadata: TestAStreamHasRoomForAllMembers.
const (
	maxListed    = maxMembers + maxMembers/8 // memberlist forgets members a little later than the table
	maxListEntry = 680                       // bytes of one member in a list
	maxMessage   = maxListed * maxListEntry  // 765 KiB
	firstRead    = 4 << 10                   // the buffer for a message begins with this size and doubles
)

// streamPool bounds a group of streams: how many are open at once and how many bytes of
// messages they hold together. Accepted streams from addresses of members, and those from
// other addresses, are two groups: who is no member takes no place of members.
type streamPool struct {
	maxOpen, maxBytes int

	mu          sync.Mutex // guards open, bytes
	open, bytes int
}

func (p *streamPool) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open >= p.maxOpen {
		return false
	}
	p.open++
	return true
}

func (p *streamPool) take(n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bytes+n > p.maxBytes {
		return false
	}
	p.bytes += n
	return true
}

func (p *streamPool) leave(bytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open--
	p.bytes -= bytes
}

// stream is a TCP connection of gossip: one message in each direction, first from the
// node that opened it. memberlist writes each message with one call of Write, and gets
// nothing to read before the whole message is here and has been opened.
type stream struct {
	net.Conn
	transport *transport
	pool      *streamPool
	accepted  bool

	mu     sync.Mutex // guards held, closed
	held   int        // bytes taken from the pool
	closed bool

	wrote   bool   // used by memberlist's goroutine alone, and so are the next two
	opened  bool   // the message has been received
	message []byte // what Read has not returned yet
}

func (s *stream) Close() error {
	s.transport.mu.Lock()
	delete(s.transport.open, s)
	s.transport.mu.Unlock()
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		s.pool.leave(s.held)
	}
	s.mu.Unlock()
	return s.Conn.Close()
}

// Write sends one message.
func (s *stream) Write(message []byte) (int, error) {
	sealed := s.transport.sealing.sealStream(message, !s.accepted && !s.wrote)
	s.wrote = true
	if _, err := s.Conn.Write(sealed); err != nil {
		return 0, err
	}
	return len(message), nil
}

// Read returns the message's bytes. On a stream that this node opened, the first call
// receives the message.
func (s *stream) Read(p []byte) (int, error) {
	if !s.opened {
		if refused, err := s.receive(); refused != accepted {
			s.transport.refuse(refused, remoteOf(s.Conn))
			return 0, fmt.Errorf("gossip stream refused (%s): %w", refused, err)
		} else if err != nil {
			return 0, err
		}
	}
	if len(s.message) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.message)
	s.message = s.message[n:]
	return n, nil
}

var errStreamFormat = errors.New("not a sealed message")

// receive reads the message and opens it. The error alone, without a refusal, is a
// connection that ended before its message.
func (s *stream) receive() (refusal, error) {
	header := make([]byte, streamHeader, streamHeader+nonceSize)
	if s.accepted {
		header = make([]byte, len(s.transport.sealing.label)+streamHeader)
	}
	if _, err := io.ReadFull(s.Conn, header); err != nil {
		return lateOr(err), err
	}
	if s.accepted {
		rest, refused := s.transport.sealing.cutLabel(header)
		if refused != accepted {
			return refused, errStreamFormat
		}
		header = rest
	}
	size := int64(binary.BigEndian.Uint32(header[1:]))
	if header[0] != streamType || size <= sealOverhead || size > sealOverhead+maxMessage {
		return refusedMalformed, errStreamFormat
	}
	sealed, refused, err := s.readSealed(int(size))
	if err != nil {
		return refused, err
	}
	additional := append(append([]byte(nil), header...), s.transport.sealing.name...)
	// The message takes the place of its sealed form.
	message, refused := s.transport.sealing.open(sealed[1+nonceSize:1+nonceSize], sealed, additional)
	if refused == accepted && !knownStream(message) {
		refused = refusedMessage
	}
	if refused != accepted {
		return refused, errStreamFormat
	}
	s.opened, s.message = true, message
	return accepted, nil
}

// readSealed reads size bytes. The buffer grows with what has arrived, so that announcing
// a long message costs nothing here.
func (s *stream) readSealed(size int) ([]byte, refusal, error) {
	var buf []byte
	for have := 0; have < size; {
		room := min(max(2*have, firstRead), size)
		if !s.hold(room - have) {
			return nil, refusedBytes, errors.New("too many bytes of streams are held")
		}
		grown := make([]byte, room)
		copy(grown, buf)
		buf = grown
		if _, err := io.ReadFull(s.Conn, buf[have:]); err != nil {
			return nil, lateOr(err), err
		}
		if have == 0 && buf[0] != sealedVersion {
			return nil, refusedMalformed, errStreamFormat
		}
		have = room
	}
	return buf, accepted, nil
}

// hold takes bytes from the pool until the stream is closed.
func (s *stream) hold(n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || !s.pool.take(n) {
		return false
	}
	s.held += n
	return true
}

// lateOr is the refusal for a stream that could not be read: one that is late, or none.
func lateOr(err error) refusal {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return refusedTimeout
	}
	return accepted
}

// remoteOf is the remote address of a stream.
func remoteOf(c net.Conn) netip.AddrPort {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// receiveAccepted receives the message of an accepted stream and gives the stream to
// memberlist.
func (t *transport) receiveAccepted(s *stream) {
	remote := remoteOf(s.Conn)
	err := s.SetReadDeadline(time.Now().Add(streamTimeout))
	refused := accepted
	if err == nil {
		refused, err = s.receive()
	}
	if err != nil {
		if refused != accepted {
			t.refuse(refused, remote)
		}
		_ = s.Close() // the reason is err
		return
	}
	select {
	case t.streams <- s:
	case <-t.done:
		_ = s.Close() // memberlist has stopped
	}
}
