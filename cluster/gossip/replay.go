package gossip

import (
	"container/list"
	"encoding/binary"
	"sync"
)

const (
	// maxSenders bounds the processes whose numbers are remembered. In a cluster of 256
	// nodes each may have started eight times, with two sequences each time.
	maxSenders = 4096
	// windowBlocks bounds how far a message may be overtaken by others of its sender:
	// 31 × 64 messages, which is a second or more of the largest cluster.
	windowBlocks = 32
	windowSize   = (windowBlocks - 1) * 64
	// maxUnnumbered bounds the nonces of earlier versions that are remembered: at least
	// so many, at most twice as many.
	maxUnnumbered = 1 << 13
)

// replays remembers which sealed messages were received, so that each takes effect once.
// Only messages that a key has authenticated get here, so nobody without the key can
// fill it.
type replays struct {
	numbered func() bool // all members number their messages, so others are old

	mu      sync.Mutex // guards what follows
	senders map[[7]byte]*list.Element
	order   list.List // of *sender, the last heard in front
	// Unnumbered nonces in two generations: when the newer one is full, the older one is
	// forgotten.
	newer, older map[[nonceSize]byte]struct{}
}

// sender is a process that sends numbered messages.
type sender struct {
	instance [7]byte
	window   window
}

func newReplays(numbered func() bool) *replays {
	return &replays{
		numbered: numbered, senders: map[[7]byte]*list.Element{},
		newer: map[[nonceSize]byte]struct{}{},
	}
}

// first notes a nonce and reports whether it is new.
func (r *replays) first(nonce [nonceSize]byte) bool {
	if nonce[0] != numberedNonce {
		return !r.numbered() && r.firstUnnumbered(nonce)
	}
	instance := [7]byte(nonce[1:8])
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.senders[instance]
	if !ok {
		if len(r.senders) >= maxSenders {
			oldest := r.order.Remove(r.order.Back()).(*sender)
			delete(r.senders, oldest.instance)
		}
		e = r.order.PushFront(&sender{instance: instance})
		r.senders[instance] = e
	}
	r.order.MoveToFront(e)
	return e.Value.(*sender).window.first(uint64(binary.BigEndian.Uint32(nonce[8:])))
}

func (r *replays) firstUnnumbered(nonce [nonceSize]byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, newer := r.newer[nonce]
	_, older := r.older[nonce]
	if newer || older {
		return false
	}
	if len(r.newer) >= maxUnnumbered {
		r.older, r.newer = r.newer, make(map[[nonceSize]byte]struct{}, maxUnnumbered)
	}
	r.newer[nonce] = struct{}{}
	return true
}

// window remembers which of a sender's latest numbers were received (RFC 6479). Numbers
// below the window are refused.
type window struct {
	last   uint64
	blocks [windowBlocks]uint64 // a ring of bits
}

func (w *window) first(number uint64) bool {
	block := number / 64
	switch {
	case number > w.last:
		current := w.last / 64
		for i := uint64(1); i <= min(block-current, windowBlocks); i++ {
			w.blocks[(current+i)%windowBlocks] = 0
		}
		w.last = number
	case w.last-number > windowSize:
		return false
	}
	bits, bit := &w.blocks[block%windowBlocks], uint64(1)<<(number%64)
	if *bits&bit != 0 {
		return false
	}
	*bits |= bit
	return true
}
