package replication

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/dsnode/dsnode/storage/journal"
)

// maxMarks bounds the streams that are known of one holder: twice what a log
// holds, since those that are gone stay known while the process lives.
const maxMarks = 2 * journal.MaxStreams

// maxHolders bounds the nodes whose marks are known.
const maxHolders = 256

// ledger keeps the marks of all nodes up to date, wakes those who wait for
// durability, and notes for each connection what has to be told to the peer.
type ledger struct {
	self    string
	waiting int // bound of waiters
	log     *slog.Logger

	mu      sync.Mutex // guards all below
	marks   Marks
	members []Member
	nodes   []string // of members
	waits   map[journal.Stream]*waits
	waiters int
	tells   map[*tell]struct{}
	changed chan struct{} // closed at the next change of a mark
	full    bool          // the bound of streams was reached, and said so
}

func newLedger(self string, epoch uint64, waiting int, log *slog.Logger) *ledger {
	return &ledger{
		self: self, waiting: waiting, log: log,
		marks: Marks{self: {Epoch: epoch, Ends: map[journal.Stream]uint64{}}},
		waits: map[journal.Stream]*waits{}, tells: map[*tell]struct{}{},
		changed: make(chan struct{}),
	}
}

// place is one mark.
type place struct {
	holder string
	stream journal.Stream
}

// tell collects what changed since a peer was last told.
type tell struct {
	l     *ledger
	peer  string
	dirty map[place]struct{} // guarded by l.mu
	wake  chan struct{}      // has room for one: something is dirty
}

// subscribe begins with everything being new to the peer, its own marks too:
// that is how a node learns that it lost its disk.
func (l *ledger) subscribe(peer string) *tell {
	t := &tell{l: l, peer: peer, dirty: map[place]struct{}{}, wake: make(chan struct{}, 1)}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tells[t] = struct{}{}
	for holder, h := range l.marks {
		for s := range h.Ends {
			t.dirty[place{holder, s}] = struct{}{}
		}
	}
	return t
}

func (t *tell) close() {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	delete(t.l.tells, t)
}

// maxTold bounds the marks of one message: some 60 bytes each.
const maxTold = 16384

// take gives what changed and forgets it; more says that some is left.
func (t *tell) take() (out Marks, more bool) {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	out = Marks{}
	n := 0
	for p := range t.dirty {
		if n >= maxTold {
			return out, true
		}
		delete(t.dirty, p)
		h, known := t.l.marks[p.holder]
		if !known {
			continue
		}
		o, begun := out[p.holder]
		if !begun {
			o = Held{Epoch: h.Epoch, Ends: map[journal.Stream]uint64{}}
			out[p.holder] = o
		}
		if seq, ok := h.Ends[p.stream]; ok {
			o.Ends[p.stream] = seq
			n++
		}
	}
	return out, false
}

// ack gives this node's own marks of some streams, to be told at once.
func (t *tell) ack(streams []journal.Stream) Marks {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	own := t.l.marks[t.l.self]
	out := Held{Epoch: own.Epoch, Ends: make(map[journal.Stream]uint64, len(streams))}
	for _, s := range streams {
		out.Ends[s] = own.Ends[s]
		delete(t.dirty, place{t.l.self, s})
	}
	return Marks{t.l.self: out}
}

// note is called with mu held for each mark that changed, except for the peer
// that told it.
func (l *ledger) note(holder string, s journal.Stream, except string) {
	for t := range l.tells {
		if t.peer == except {
			continue
		}
		t.dirty[place{holder, s}] = struct{}{}
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
	l.release(s)
}

func (l *ledger) announce() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// watch is closed at the next change of a mark or of the members.
func (l *ledger) watch() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// setOwn takes in what this node holds now and gives the streams that went on.
// It never goes down: what a node loses it finds out when it starts.
func (l *ledger) setOwn(ends map[journal.Stream]uint64) (advanced []journal.Stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.marks[l.self]
	for s, seq := range ends {
		if was, had := own.Ends[s]; !had || seq > was {
			own.Ends[s] = seq
			advanced = append(advanced, s)
			l.note(l.self, s, "")
		}
	}
	if len(advanced) > 0 {
		l.announce()
	}
	return advanced
}

// raise begins a new epoch of this node's own marks.
func (l *ledger) raise(epoch uint64, ends map[journal.Stream]uint64) {
	fresh := Held{Epoch: epoch, Ends: make(map[journal.Stream]uint64, len(ends))}
	old := l.marks[l.self]
	for s, seq := range ends {
		fresh.Ends[s] = seq
	}
	l.marks[l.self] = fresh
	for s := range fresh.Ends {
		l.note(l.self, s, "")
	}
	for s := range old.Ends {
		if _, still := fresh.Ends[s]; !still {
			l.note(l.self, s, "")
		}
	}
	l.announce()
}

// hear takes in what a peer told. This node alone says what it holds: when
// others remember more, it was before its disk was lost, so the epoch rises above
// theirs.
func (l *ledger) hear(from string, told Marks) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if mine, ok := told[l.self]; ok {
		own := l.marks[l.self]
		lost := mine.Epoch > own.Epoch
		for s, seq := range mine.Ends {
			lost = lost || mine.Epoch == own.Epoch && seq > own.Ends[s]
		}
		if lost {
			l.log.Warn("others remember more of this node's disk than there is; told them anew", "epoch", mine.Epoch+1)
			l.raise(mine.Epoch+1, own.Ends)
		}
		delete(told, l.self)
	}
	for holder, h := range told {
		if !l.roomFor(holder, len(h.Ends)) {
			delete(told, holder)
		}
	}
	any := false
	l.marks.Merge(told, func(holder string, s journal.Stream) {
		any = true
		l.note(holder, s, from)
	})
	if any {
		l.announce()
	}
}

// roomFor bounds what is known; with mu held. A holder that is no member may be
// one soon: other nodes heard of it earlier.
func (l *ledger) roomFor(holder string, more int) bool {
	known, has := l.marks[holder]
	switch {
	case len(known.Ends)+more > 2*maxMarks:
	case has, len(l.marks) < maxHolders:
		return true
	case slices.Contains(l.nodes, holder):
		for stranger := range l.marks {
			if stranger != l.self && !slices.Contains(l.nodes, stranger) {
				delete(l.marks, stranger)
			}
		}
		return len(l.marks) < maxHolders
	}
	if !l.full {
		l.full = true
		l.log.Error("too many streams or nodes are known; the marks of some are not followed", "holder", holder, "known", len(known.Ends)+more)
	}
	return false
}

// setMembers forgets who is no member any more, and looks again at who waits.
func (l *ledger) setMembers(members []Member) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.nodes
	l.members, l.nodes = members, nil
	for _, m := range members {
		l.nodes = append(l.nodes, m.Node)
	}
	for _, holder := range before {
		if holder != l.self && !slices.Contains(l.nodes, holder) {
			delete(l.marks, holder)
		}
	}
	for s := range l.waits {
		l.release(s)
	}
	l.announce()
}

// held is up to where a node holds a stream.
func (l *ledger) held(node string, s journal.Stream) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.marks[node].Ends[s]
}

// epoch is that of a node's marks, 0 when none are known.
func (l *ledger) epoch(node string) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.marks[node].Epoch
}

// elsewhere reports whether another node holds more of a stream than this one
// ever held while it ran.
func (l *ledger) elsewhere(s journal.Stream) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.marks[l.self].Ends[s]
	for _, h := range l.marks {
		if h.Ends[s] > own {
			return true
		}
	}
	return false
}

func (l *ledger) heldByAll(s journal.Stream) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.marks.HeldByAll(s, l.nodes)
}

// gains is how many records each node holds that this one lacks, by stream.
func (l *ledger) gains() map[journal.Stream]map[string]uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.marks[l.self].Ends
	out := map[journal.Stream]map[string]uint64{}
	for node, h := range l.marks {
		if node == l.self {
			continue
		}
		for s, seq := range h.Ends {
			if seq <= own[s] {
				continue
			}
			if out[s] == nil {
				out[s] = map[string]uint64{}
			}
			out[s][node] = seq - own[s]
		}
	}
	return out
}

// behind is how many records of the origins some node is known to hold and none
// of the holders does.
func (l *ledger) behind(origins, holders []string) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	most, have := map[journal.Stream]uint64{}, map[journal.Stream]uint64{}
	for node, h := range l.marks {
		holder := slices.Contains(holders, node)
		for s, seq := range h.Ends {
			if slices.Contains(origins, s.Origin) {
				most[s] = max(most[s], seq)
				if holder {
					have[s] = max(have[s], seq)
				}
			}
		}
	}
	n := int64(0)
	for s, seq := range most {
		n += int64(seq - have[s])
	}
	return n
}

// reached is, for each level, up to where a stream that this node writes is that
// durable.
func (l *ledger) reached(s journal.Stream) (through [len(levels)]uint64) {
	own := l.marks[l.self].Ends[s]
	var self Member
	for _, m := range l.members {
		if m.Node == l.self {
			self = m
		}
	}
	through[0] = own
	if self.Node == "" {
		return through // no member yet: nobody else counts
	}
	for _, m := range l.members {
		seq := min(own, l.marks[m.Node].Ends[s])
		for i, level := range levels[1:] {
			if seq > through[i+1] && counts(level, self, m) {
				through[i+1] = seq
			}
		}
	}
	return through
}

// waits are those who wait for one stream, for each level in the order of their
// numbers.
type waits [len(levels)][]*wait

type wait struct {
	seq  uint64
	done chan struct{}
}

func bySeq(w *wait, seq uint64) int {
	switch {
	case w.seq < seq:
		return -1
	case w.seq > seq:
		return 1
	}
	return 0
}

// release lets those go whose record is durable now; with mu held.
func (l *ledger) release(s journal.Stream) {
	w := l.waits[s]
	if w == nil {
		return
	}
	left := 0
	for i, through := range l.reached(s) {
		n := 0
		for n < len(w[i]) && w[i][n].seq <= through {
			close(w[i][n].done)
			w[i][n] = nil
			n++
		}
		w[i] = w[i][n:]
		l.waiters -= n
		left += len(w[i])
	}
	if left == 0 {
		delete(l.waits, s)
	}
}

// await blocks until record seq of s is durable to the level.
func (l *ledger) await(ctx context.Context, s journal.Stream, seq uint64, level int) error {
	l.mu.Lock()
	if l.reached(s)[level] >= seq {
		l.mu.Unlock()
		return nil
	}
	if l.waiters >= l.waiting {
		l.mu.Unlock()
		return ErrTooManyWaiting
	}
	w := l.waits[s]
	if w == nil {
		w = &waits{}
		l.waits[s] = w
	}
	mine := &wait{seq: seq, done: make(chan struct{})}
	// Records are waited for in their order, or nearly.
	at := len(w[level])
	for at > 0 && w[level][at-1].seq > seq {
		at--
	}
	w[level] = slices.Insert(w[level], at, mine)
	l.waiters++
	l.mu.Unlock()

	select {
	case <-mine.done:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-mine.done:
		return nil
	default:
	}
	at, _ = slices.BinarySearchFunc(w[level], seq, bySeq)
	for at < len(w[level]) && w[level][at] != mine {
		at++
	}
	w[level] = slices.Delete(w[level], at, at+1)
	l.waiters--
	if l.waits[s] == w && len(w[0])+len(w[1])+len(w[2])+len(w[3]) == 0 {
		delete(l.waits, s)
	}
	return fmt.Errorf("wait until record %d of %s is durable (%s): %w", seq, s, levels[level], ctx.Err())
}
