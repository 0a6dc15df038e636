package mesh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// Bounds of what a node carries for others.
const (
	maxRelayed     = 1024 // tunnels through this node
	maxRelayedEach = 512  // of them for one peer

	relayBuffer = 16 << 10 // bytes a direction: one TLS record
	// relayHalfOpen is how long one direction may last after the other's end.
	relayHalfOpen = 2 * time.Second
	// relayWordsMax bounds what a refusal quotes, in bytes.
	relayWordsMax = 512
)

// relayed counts the tunnels through this node, by who asked for them.
type relayed struct {
	most, each int

	mu  sync.Mutex // guards all, of
	all int
	of  map[string]int
}

func (r *relayed) enter(node string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all >= r.most || r.of[node] >= r.each {
		return false
	}
	r.all++
	r.of[node]++
	return true
}

func (r *relayed) leave(node string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all--
	if r.of[node]--; r.of[node] == 0 {
		delete(r.of, node)
	}
}

// relay carries a tunnel for a peer until one of its ends, or ctx, ends. Both
// halves are on the mesh's list with their sites: what cuts a site off here
// ends the tunnels from and to it.
func (m *Mesh) relay(ctx context.Context, from *PeerConn) {
	defer func() { _ = from.Close() }() // nothing more to say
	stop := context.AfterFunc(ctx, from.cut)
	defer stop()

	if !m.relayed.enter(from.peer.Node) {
		m.answerTunnel(from, &RefusedError{Code: CodeNoTunnel, Message: "too many tunnels lead through here"})
		return
	}
	defer m.relayed.leave(from.peer.Node)
	to, refused := m.extend(ctx, from)
	if refused != nil {
		m.answerTunnel(from, refused)
		return
	}
	defer func() { _ = to.Close() }()
	if m.answerTunnel(from, nil) {
		splice(ctx, from, to)
	}
}

// extend dials the node that a tunnel is for: directly, or not at all. A tunnel
// through two nodes would hide from each who is at its other end.
func (m *Mesh) extend(ctx context.Context, from *PeerConn) (*PeerConn, *RefusedError) {
	refuse := func(code, format string, args ...any) (*PeerConn, *RefusedError) {
		return nil, &RefusedError{Code: code, Message: fmt.Sprintf(format, args...)}
	}
	target := from.target
	if target == from.peer.Node || target == m.opts.Credentials.Identity().Node {
		return refuse(CodeNoTunnel, "a tunnel needs three nodes")
	}
	addr, ok := m.opts.Address(target)
	if !ok {
		return refuse(CodeUnreached, "no address of %s is known here", target)
	}
	if via := m.ways.via(target); via != "" {
		return refuse(CodeUnreached, "%s is reached from here only through %s", target, via)
	}
	ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout) // the asker waits no longer
	defer cancel()
	to, err := m.dial(ctx, greeting{kind: KindRelayed, node: target}, addr)
	if err != nil {
		words := err.Error()
		return refuse(CodeUnreached, "%s", strings.ToValidUTF8(words[:min(len(words), relayWordsMax)], ""))
	}
	return to, nil
}

// answerTunnel tells who asked how it went, and reports whether it was told
// that all is well.
func (m *Mesh) answerTunnel(from *PeerConn, refused *RefusedError) bool {
	self := m.opts.Membership()
	reply := prefaceReply{Format: prefaceFormat, ClusterID: self.ClusterID, Generation: self.Generation}
	result := "ok"
	if refused != nil {
		reply.Code, reply.Message = refused.Code, m.opts.Credentials.Identity().Node+" says: "+refused.Message
		result = refused.Code
	}
	m.metrics.tunnels.WithLabelValues("relayed", result).Inc()
	answer, err := appendPreface(nil, reply)
	if err == nil {
		err = errors.Join(from.SetWriteDeadline(time.Now().Add(m.opts.DialTimeout)), writeAll(from, answer), from.SetWriteDeadline(time.Time{}))
	}
	return err == nil && refused == nil
}

func writeAll(to io.Writer, b []byte) error {
	_, err := to.Write(b)
	return err
}

// splice carries bytes both ways until both directions have ended, one has
// failed, or ctx ends.
func splice(ctx context.Context, a, b *PeerConn) {
	cut := func() { a.cut(); b.cut() }
	stop := context.AfterFunc(ctx, cut)
	defer stop()
	back := make(chan struct{})
	go func() {
		defer close(back)
		pump(a, b, cut)
	}()
	pump(b, a, cut)
	<-back
}

// pump carries one direction. TLS's farewell is passed on, so that what is on
// its way back still arrives; anything else ends both directions.
func pump(to, from *PeerConn, cut func()) {
	_, err := io.CopyBuffer(to, from, make([]byte, relayBuffer))
	if err == nil {
		err = errors.Join(to.CloseWrite(), to.SetReadDeadline(time.Now().Add(relayHalfOpen)))
	}
	if err != nil {
		cut()
	}
}
