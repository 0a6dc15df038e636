package replication

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/notify"
)

// maxMarks bounds the tracked streams of one holder: twice the streams of a log, since
// dropped streams stay tracked for a while.
const maxMarks = 2 * journal.MaxStreams

// maxHolders bounds the tracked nodes.
const maxHolders = 256

// tracker keeps the watermarks of all nodes, wakes calls that wait for durability, and
// collects the changes to be sent to each peer.
type tracker struct {
	self    string
	waiting int // maximum of waiters
	retired func(journal.Stream) bool
	log     *slog.Logger
	changed notify.Broadcast // sent at each change of a watermark or the members

	mu      sync.Mutex // guards the fields below
	marks   Watermarks
	members []Member
	nodes   []string // names of members
	waits   map[journal.Stream]*waits
	waiters int
	updates map[*markUpdates]struct{}
	full    bool // a limit was reached and logged
}

func newTracker(self string, epoch uint64, waiting int, retired func(journal.Stream) bool, log *slog.Logger) *tracker {
	return &tracker{
		self: self, waiting: waiting, retired: retired, log: log,
		marks: Watermarks{self: {Epoch: epoch, Ends: map[journal.Stream]uint64{}}},
		waits: map[journal.Stream]*waits{}, updates: map[*markUpdates]struct{}{},
	}
}

// markKey names one watermark.
type markKey struct {
	holder string
	stream journal.Stream
}

// markUpdates collects the watermarks that changed since they were last sent to a peer.
type markUpdates struct {
	l     *tracker
	peer  string
	dirty map[markKey]struct{} // guarded by l.mu
	wake  chan struct{}        // capacity 1: dirty is not empty
}

// subscribe returns updates that first contain all watermarks, including the peer's own:
// they show a node that its disk has lost records.
func (l *tracker) subscribe(peer string) *markUpdates {
	t := &markUpdates{l: l, peer: peer, dirty: map[markKey]struct{}{}, wake: make(chan struct{}, 1)}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.updates[t] = struct{}{}
	for holder, h := range l.marks {
		for s := range h.Ends {
			t.dirty[markKey{holder, s}] = struct{}{}
		}
	}
	return t
}

func (t *markUpdates) close() {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	delete(t.l.updates, t)
}

// maxUpdate bounds the watermarks of one message; each takes some 60 bytes.
const maxUpdate = 16384

// take returns the changes and removes them. If some are left it signals wake again.
func (t *markUpdates) take() Watermarks {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	out := Watermarks{}
	n := 0
	for p := range t.dirty {
		if n >= maxUpdate {
			notify.Wake(t.wake)
			return out
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
	return out
}

// ack returns this node's own watermarks of some streams, to be sent at once.
func (t *markUpdates) ack(streams []journal.Stream) Watermarks {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	own := t.l.marks[t.l.self]
	out := Held{Epoch: own.Epoch, Ends: make(map[journal.Stream]uint64, len(streams))}
	for _, s := range streams {
		out.Ends[s] = own.Ends[s]
		delete(t.dirty, markKey{t.l.self, s})
	}
	return Watermarks{t.l.self: out}
}

// markChanged must be called with mu held for each watermark that changed. except is the
// peer that reported it, which is not sent the change.
func (l *tracker) markChanged(holder string, s journal.Stream, except string) {
	for t := range l.updates {
		if t.peer == except {
			continue
		}
		t.dirty[markKey{holder, s}] = struct{}{}
		notify.Wake(t.wake)
	}
	l.releaseWaiters(s)
}

// setOwn updates this node's own watermarks and returns the streams that advanced. They
// never decrease: a loss of records is detected when the node starts.
func (l *tracker) setOwn(ends map[journal.Stream]uint64) (advanced []journal.Stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.marks[l.self]
	for s, seq := range ends {
		if was, had := own.Ends[s]; !had || seq > was {
			own.Ends[s] = seq
			advanced = append(advanced, s)
			l.markChanged(l.self, s, "")
		}
	}
	if len(advanced) > 0 {
		l.changed.Send()
	}
	return advanced
}

// merge merges the watermarks that a peer sent. Only this node knows what it holds: when
// peers have higher numbers, they are from before its disk was lost, and the epoch
// rises above theirs.
func (l *tracker) merge(from string, theirs Watermarks) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.withoutRetired(theirs)
	if mine, ok := theirs[l.self]; ok {
		own := l.marks[l.self]
		lost := mine.Epoch > own.Epoch
		for s, seq := range mine.Ends {
			lost = lost || mine.Epoch == own.Epoch && seq > own.Ends[s]
		}
		if lost {
			l.log.Warn("peers have higher watermarks of this node than its disk; publishing them again under a new epoch", "epoch", mine.Epoch+1)
			l.marks[l.self] = Held{Epoch: mine.Epoch + 1, Ends: own.Ends}
			for s := range own.Ends {
				l.markChanged(l.self, s, "")
			}
			l.changed.Send()
		}
		delete(theirs, l.self)
	}
	for holder, h := range theirs {
		if !l.mayTrack(holder, len(h.Ends)) {
			delete(theirs, holder)
		}
	}
	any := false
	l.marks.Merge(theirs, func(holder string, s journal.Stream) {
		any = true
		l.markChanged(holder, s, from)
	})
	if any {
		l.changed.Send()
	}
}

// withoutRetired removes the watermarks of retired streams that are not tracked, or no
// longer: a peer still has those that this node has forgotten. The caller holds mu.
func (l *tracker) withoutRetired(theirs Watermarks) {
	for holder, h := range theirs {
		known := l.marks[holder].Ends
		maps.DeleteFunc(h.Ends, func(s journal.Stream, _ uint64) bool {
			_, tracked := known[s]
			return !tracked && l.retired(s)
		})
	}
}

// forget removes the watermarks of retired streams that this node does not hold. Nodes that
// still hold one don't count as having records that others lack.
func (l *tracker) forget(held func(journal.Stream) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.marks {
		maps.DeleteFunc(h.Ends, func(s journal.Stream, _ uint64) bool { return !held(s) && l.retired(s) })
	}
}

// mostHeld returns up to where any of the nodes holds a stream.
func (l *tracker) mostHeld(s journal.Stream, nodes []string) (most uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range nodes {
		most = max(most, l.marks[n].Ends[s])
	}
	return most
}

// mayTrack enforces the limits; the caller holds mu. A holder that is not a member may
// become one soon: another node has learned of it earlier.
func (l *tracker) mayTrack(holder string, more int) bool {
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
		l.log.Error("too many streams or nodes; the watermarks of some are not tracked", "holder", holder, "known", len(known.Ends)+more)
	}
	return false
}

// setMembers removes the watermarks of former members and checks the waiting calls again.
func (l *tracker) setMembers(members []Member) {
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
		l.releaseWaiters(s)
	}
	l.changed.Send()
}

// held returns up to where a node holds a stream.
func (l *tracker) held(node string, s journal.Stream) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.marks[node].Ends[s]
}

// epoch returns the epoch of a node's watermarks, 0 when none are known.
func (l *tracker) epoch(node string) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.marks[node].Epoch
}

// heldElsewhere reports whether another node holds more of a stream than this one has held
// since it started.
func (l *tracker) heldElsewhere(s journal.Stream) bool {
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

func (l *tracker) heldByAll(s journal.Stream) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.marks.HeldByAll(s, l.nodes)
}

// gains returns how many records each node holds that this one lacks, by stream.
func (l *tracker) gains() map[journal.Stream]map[string]uint64 {
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

// behind returns how many records of the origins are known to be held by some node, but by
// none of the holders.
func (l *tracker) behind(origins, holders []string) int64 {
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

// durableTo returns, for each durability, up to where a stream that this node writes has
// it. The caller holds mu.
func (l *tracker) durableTo(s journal.Stream) (through [len(levels)]uint64) {
	own := l.marks[l.self].Ends[s]
	var self Member
	for _, m := range l.members {
		if m.Node == l.self {
			self = m
		}
	}
	through[0] = own
	if self.Node == "" {
		return through // not a member yet: copies on other nodes don't count
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

// waits are the calls that wait for one stream, by durability, ordered by sequence number.
type waits [len(levels)][]*wait

type wait struct {
	seq  uint64
	done chan struct{}
}

// releaseWaiters wakes the calls whose record is durable now. The caller holds mu.
func (l *tracker) releaseWaiters(s journal.Stream) {
	w := l.waits[s]
	if w == nil {
		return
	}
	left := 0
	for i, through := range l.durableTo(s) {
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

// await blocks until record seq of s has the durability.
func (l *tracker) await(ctx context.Context, s journal.Stream, seq uint64, level int) error {
	l.mu.Lock()
	if l.durableTo(s)[level] >= seq {
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
	// Calls arrive almost in the order of their records, so search from the end.
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
	at, _ = slices.BinarySearchFunc(w[level], seq, func(w *wait, seq uint64) int { return cmp.Compare(w.seq, seq) })
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
