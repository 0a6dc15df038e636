package replication

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	completeAgain = 250 * time.Millisecond
	// askAgain is when a node is asked again whose records have not all arrived: it may have
	// lost its disk, and they may never come.
	askAgain = 5 * time.Second
	// rowsStall bounds the time without any rows from a peer.
	rowsStall = 30 * time.Second
	// lackedOften is how often in a row a node must report rows that are missing here. A
	// stream that a node has just begun to receive can look like one that is gone.
	lackedOften = 3
	// appliedWait bounds the wait for a table that is behind its journals.
	appliedWait  = 10 * time.Second
	appliedAgain = 50 * time.Millisecond
	// maxGone bounds the streams in one list of streams that are gone.
	maxGone = 32768
)

var errPartial = status.Error(codes.Unavailable, "this node's table is new or was damaged, and is being filled")

// A table lacks rows for one reason only: their records are in no journal that this node
// can pull. Records of a stream that nodes still hold arrive as records or, where they were
// trimmed, as rows. Once all members held a stream and its jobs had ended, it is dropped
// everywhere. Then its records exist as rows of tables alone, and a node whose disk was lost,
// or replaced by an old image, can't pull them.
//
// What the table includes of each stream is in the table itself (AppliedAll), also for
// streams that are gone. So two nodes find out by comparing these numbers whether one lacks
// rows that the other has, at any moment and under any load. A table is complete if it
// includes as much of every stream that is gone as every complete table of another node.

// completion completes the table, and compares it with those of the other members.
type completion struct {
	r        *Replication
	founding bool // this node had no journals when it started, and its table is the first

	// Only the goroutine of run uses these.
	heard      []string
	pending    map[string]standing // of nodes that this node has not caught up with
	saysGone   map[string]bool     // by node: whether its newest standing did
	lacked     map[string]int      // by node: how often in a row this node's table lacked rows of it
	compareAt  time.Duration       // when all nodes are compared again
	from       string              // the complete table whose rows were merged, while partial
	rounds     int                 // in a row in which no node had a complete table, and the rows of all were merged
	roundOf    []string
	lastErrors map[string]string // by node; to log each error once

	mu       sync.Mutex      // guards the fields below
	compared map[string]bool // nodes that this node has caught up with since it hears them
	ever     bool            // it has caught up with some node
	source   string          // whose rows are being merged
	jobs     int64           // of the source
}

func newCompletion(r *Replication) *completion {
	return &completion{
		r: r, founding: len(r.opts.Log.Ends()) == 0, pending: map[string]standing{}, saysGone: map[string]bool{},
		lacked: map[string]int{}, lastErrors: map[string]string{}, compared: map[string]bool{},
	}
}

// Standing is how complete this node's table and journals are.
type Standing struct {
	// Partial means that rows may be missing in the table, since Since, if that is known.
	Partial bool
	Since   time.Time
	// Jobs is how many jobs the table has, and Of how many the table of the node From has,
	// whose rows are being merged; From is empty before that.
	Jobs, Of int64
	From     string
	// Behind are the members that are heard, and that held records when this node began to
	// hear them that it has not received yet, or have not answered.
	Behind []string
	// CaughtUp means that the table is not partial, that Behind is empty, and that this node
	// has caught up with some member since its start, unless it has no peers.
	CaughtUp bool
}

// Standing returns that of this node.
func (r *Replication) Standing() Standing {
	st := Standing{Partial: r.opts.Table.Partial(), CaughtUp: true}
	_, heard := r.members(func(m Member) bool { return m.Heard })
	members := len(r.opts.Members())
	f := r.completion
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range heard {
		if m.Node != r.opts.Self && !f.compared[m.Node] {
			st.Behind = append(st.Behind, m.Node)
		}
	}
	slices.Sort(st.Behind)
	st.CaughtUp = !st.Partial && len(st.Behind) == 0 && (members == 1 || f.ever)
	if st.Partial {
		st.Since, st.Jobs, st.Of, st.From = r.opts.Table.PartialSince(), r.opts.Table.Jobs(), f.jobs, f.source
	}
	return st
}

// run completes the table at once if it is partial, and compares it with every other
// member: as soon as that is heard, also after a cut, and then every minute.
func (f *completion) run(ctx context.Context) error {
	for {
		if err := f.pass(ctx); err != nil {
			return err
		}
		if !pause(ctx, completeAgain) {
			return nil
		}
	}
}

func (f *completion) pass(ctx context.Context) error {
	if f.r.opts.Table.Rebuilding() {
		f.founding, f.from, f.rounds = false, "", 0 // rows merged before are lost again
		return nil
	}
	others := f.others()
	if len(others) == 0 {
		return f.alone()
	}
	partial := f.r.opts.Table.Partial()
	now := f.r.opts.Boottime()
	again := now >= f.compareAt
	if again {
		f.compareAt = now + compareEvery
	}
	_, heard := f.r.members(func(m Member) bool { return m.Heard })
	var ask []string
	f.heard = f.heard[:0]
	for _, m := range heard {
		f.heard = append(f.heard, m.Node)
		st, pending := f.pending[m.Node]
		waits := pending && now-st.at < askAgain || f.isCompared(m.Node)
		if m.Node != f.r.opts.Self && (partial || again || f.lacked[m.Node] > 0 || !waits) {
			ask = append(ask, m.Node)
		}
	}
	f.retain(others)
	answers := f.r.askStandings(ctx, ask)
	for node, st := range answers {
		f.noteLacks(node, &st)
		f.saysGone[node] = st.saysGone
		if !f.isCompared(node) {
			st.at = now
			f.pending[node] = st
		}
	}
	var err error
	if partial {
		err = f.complete(ctx, others, answers)
	} else {
		err = f.compare(ctx, answers)
	}
	f.catchUp()
	return err
}

// others returns the names of the other members, sorted.
func (f *completion) others() []string {
	var others []string
	for _, m := range f.r.opts.Members() {
		if m.Node != f.r.opts.Self {
			others = append(others, m.Node)
		}
	}
	slices.Sort(others)
	return others
}

// retain removes what is known of former members, and what this node has compared itself
// with of members that it does not hear: they may change.
func (f *completion) retain(others []string) {
	former := func(node string) bool { _, member := slices.BinarySearch(others, node); return !member }
	unheard := func(node string) bool { return former(node) || !slices.Contains(f.heard, node) }
	maps.DeleteFunc(f.pending, func(node string, _ standing) bool { return unheard(node) })
	maps.DeleteFunc(f.saysGone, func(node string, _ bool) bool { return former(node) })
	maps.DeleteFunc(f.lacked, func(node string, _ int) bool { return former(node) })
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.compared, func(node string, _ bool) bool { return unheard(node) })
}

func (f *completion) isCompared(node string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.compared[node]
}

// catchUp notes the nodes whose journals this node has caught up with.
func (f *completion) catchUp() {
	own := f.r.opts.Log.Ends()
	for node, st := range f.pending {
		if f.lacked[node] == 0 && f.r.holdsAll(own, st.held) && (st.partial || f.showsAll(f.rowsOnly(&st))) {
			delete(f.pending, node)
			f.mu.Lock()
			f.compared[node], f.ever = true, true
			f.mu.Unlock()
		}
	}
}

// holdsAll reports whether this node holds as much of all streams, and its table shows it.
// Retired ones don't count.
func (r *Replication) holdsAll(own map[journal.Stream]journal.End, held map[journal.Stream]uint64) bool {
	for s, seq := range held {
		if (own[s].Durable < seq || r.opts.Table.Visible(s) < seq) && !r.opts.Retired(s) {
			return false
		}
	}
	return true
}

// alone handles a node without peers. Nobody else has rows: a new node's table is complete,
// and that of an older node as complete as its journals can make it.
func (f *completion) alone() error {
	t := f.r.opts.Table
	// Members is read again: right after a start it may have been an old list before Current.
	if !t.Partial() && t.Proven() || !f.r.opts.Current() || len(f.r.opts.Members()) != 1 || f.r.opts.Members()[0].Node != f.r.opts.Self {
		return nil
	}
	if t.Partial() && !f.founding {
		f.r.opts.Logger.Error("the job table has been rebuilt from this node's journals; older jobs may be lost")
	}
	return t.SetWhole()
}

// noteLacks counts how often in a row this node's table lacked rows that another node's has.
func (f *completion) noteLacks(node string, st *standing) {
	if _, _, lacks := f.lacks(st); lacks {
		f.lacked[node]++
	} else {
		delete(f.lacked, node)
	}
}

// rowsOnly returns what a node's table includes of the streams that this node can't pull, or
// no longer: those that are gone there, and those that are retired and will be in a moment.
func (f *completion) rowsOnly(st *standing) map[journal.Stream]uint64 {
	rows := maps.Clone(st.gone)
	for s, seq := range st.held {
		if f.r.opts.Retired(s) {
			rows[s] = max(rows[s], seq)
		}
	}
	return rows
}

// showsAll reports whether this node's table shows as much of all streams.
func (f *completion) showsAll(gone map[journal.Stream]uint64) bool {
	for s, seq := range gone {
		if f.r.opts.Table.Visible(s) < seq {
			return false
		}
	}
	return true
}

// lacks returns a stream of which this node's table includes less than the complete table of
// another node, and how much that one includes; false if there is none. A stream that a
// living node still holds can be pulled.
func (f *completion) lacks(st *standing) (s journal.Stream, through uint64, lacks bool) {
	if st.partial {
		return s, 0, false
	}
	for s, seq := range f.rowsOnly(st) {
		end, held := f.r.opts.Log.End(s)
		if f.r.opts.Table.Visible(s) >= seq || held && end.Durable >= seq { // the table will have it in a moment
			continue
		}
		if f.r.opts.Retired(s) || f.r.tracker.mostHeld(s, f.heard) < seq {
			return s, seq, true
		}
	}
	return s, 0, false
}

// compare compares a table that is not partial with those of other nodes. If it lacks rows,
// it becomes partial: this node's disk was replaced by an older one, say. Only a table of an
// earlier version, which did not note what it lacks, stays in use meanwhile.
func (f *completion) compare(ctx context.Context, answers map[string]standing) error {
	t, log := f.r.opts.Table, f.r.opts.Logger
	for _, node := range slices.Sorted(maps.Keys(answers)) {
		st := answers[node]
		s, through, lacks := f.lacks(&st)
		switch {
		case !lacks || f.lacked[node] < lackedOften:
		case t.Proven():
			log.Error("this node's job table lacks rows that another node has; getting all rows of other nodes",
				"peer", node, "stream", s.String(), "until", through, "has", t.Applied(s))
			return t.SetPartial()
		default:
			log.Warn("this node's job table was written by an earlier version and lacks rows that another node has; getting all rows of that node", "peer", node)
			if _, err := f.join(ctx, node, false); err != nil {
				return nil // logged; the next pass tries again
			}
		}
	}
	if t.Proven() {
		return nil
	}
	for _, node := range f.others() {
		if !f.isCompared(node) || !f.saysGone[node] {
			return nil
		}
	}
	log.Info("the job table of an earlier version has been compared with those of all other nodes and is complete")
	return t.SetWhole()
}

// complete merges the rows of another node whose table is complete. If there is none among
// all members, it merges those of every member: then nobody has more.
func (f *completion) complete(ctx context.Context, others []string, answers map[string]standing) error {
	nodes := slices.Sorted(maps.Keys(answers))
	for _, node := range nodes {
		st := answers[node]
		if st.partial {
			continue
		}
		if f.from != "" && f.lacked[node] < lackedOften {
			continue
		}
		if whole, err := f.join(ctx, node, false); err == nil && whole {
			f.from = node
		}
	}
	if f.from != "" {
		compared := false
		for node, st := range answers {
			if f.noteLacks(node, &st); f.lacked[node] > 0 {
				return nil // streams were dropped meanwhile, or a join failed: again
			}
			compared = compared || !st.partial
		}
		if !compared {
			return nil // nobody answers any more who could tell what is still missing
		}
		f.r.opts.Logger.Warn("the job table is complete", "from", f.from, "jobs", f.r.opts.Table.Jobs())
		return f.whole()
	}
	if !f.r.opts.Current() || !slices.Equal(nodes, others) || !slices.Equal(others, f.others()) {
		f.rounds = 0
		return nil
	}
	// Nobody has a complete table. Rows go from one partial table to another while this node
	// reads them, so it reads all of them twice: whatever exists when all members are known
	// to be partial is where it stays, and is read in the second round.
	for _, node := range nodes {
		if whole, err := f.join(ctx, node, true); err != nil || whole {
			f.rounds = 0
			return nil
		}
	}
	if !slices.Equal(f.roundOf, nodes) {
		f.rounds, f.roundOf = 0, nodes
	}
	if f.rounds++; f.rounds < 2 {
		return nil
	}
	f.r.opts.Logger.Error("no node has a complete job table: this one has been completed with the rows of all other nodes; older jobs may be lost",
		"other_nodes", nodes)
	return f.whole()
}

func (f *completion) whole() error {
	f.from, f.rounds = "", 0
	f.setSource("", 0)
	return f.r.opts.Table.SetWhole()
}

func (f *completion) setSource(node string, jobs int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.source, f.jobs = node, jobs
}

// join is joinTable, with a log line for each new error.
func (f *completion) join(ctx context.Context, peer string, anyway bool) (whole bool, err error) {
	whole, err = f.joinTable(ctx, peer, anyway)
	if err == nil {
		delete(f.lastErrors, peer)
	} else if ctx.Err() == nil && f.lastErrors[peer] != err.Error() {
		f.lastErrors[peer] = err.Error()
		f.r.opts.Logger.Warn("can't get the job table of a peer; retrying", "peer", peer, "err", err)
	}
	return whole, err
}

// joinTable merges all rows of a peer's table, and reports whether that makes this node's
// table complete with regard to that peer. If it can't, it merges them only if anyway is set.
func (f *completion) joinTable(ctx context.Context, peer string, anyway bool) (whole bool, err error) {
	r := f.r
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stalled := time.AfterFunc(rowsStall, cancel)
	defer stalled.Stop()
	conn, err := r.opts.Dial(peer)
	if err != nil {
		return false, fmt.Errorf("ask %s for its table: %w", peer, err)
	}
	stream, err := replicationpb.NewReplicationClient(conn).Table(ctx, &replicationpb.TableRequest{Format: wireFormat})
	if err != nil {
		return false, fmt.Errorf("ask %s for its table: %w", peer, err)
	}
	m, err := stream.Recv()
	if err != nil {
		return false, fmt.Errorf("ask %s for its table: %w", peer, err)
	}
	head, err := readTableHead(m)
	if err != nil {
		return false, fmt.Errorf("table of %s: %w", peer, err)
	}
	whole = !m.GetPartial() && r.coversTrimmed(head.applied)
	if !whole && !anyway {
		return false, nil
	}
	r.opts.Logger.Info("receiving the rows of a peer's job table", "peer", peer, "jobs", m.GetJobs(), "enough", whole)
	f.setSource(peer, int64(min(m.GetJobs(), 1<<62)))
	var page []byte
	for {
		if page = append(page, m.GetRows()...); len(page) > maxRow {
			return false, fmt.Errorf("%w: a page of the table of %s", errWindowExceeded, peer)
		}
		if !m.GetMore() && len(page) > 0 {
			if err := r.awaitKeys(ctx, peer, page); err != nil {
				return false, fmt.Errorf("read rows of %s: %w", peer, err)
			}
			if err := r.opts.Table.MergeSoon(page); err != nil {
				return false, fmt.Errorf("merge rows of %s: %w", peer, err)
			}
			page = nil
		}
		stalled.Reset(rowsStall)
		if m, err = stream.Recv(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return false, fmt.Errorf("receive the table of %s: %w", peer, err)
		}
	}
	if !whole {
		return false, r.opts.Table.SetAppliedAll(ctx, nil) // makes the rows durable
	}
	return true, r.include(ctx, head)
}

// include notes what the merged rows include, and continues the journals after records that
// the peer has trimmed.
func (r *Replication) include(ctx context.Context, h tableHead) error {
	all := maps.Clone(h.applied)
	maps.Copy(all, h.gone)
	// In this order: if a journal continued after records that the table doesn't have, they
	// would be lost.
	if err := r.opts.Table.SetAppliedAll(ctx, all); err != nil {
		return err
	}
	advanced := map[journal.Stream]uint64{}
	for s, first := range h.begins {
		through := h.applied[s]
		e, held := r.opts.Log.End(s)
		if e.Durable+1 >= first || through+1 < first || held && e.Own || r.opts.Retired(s) {
			continue
		}
		if err := r.opts.Log.ReceiveFrom(s, through+1); err != nil {
			if errors.Is(err, journal.ErrFrozen) {
				continue
			}
			return fmt.Errorf("continue stream %s after the rows of a table: %w", s, err)
		}
		advanced[s] = through
	}
	r.advanced(advanced)
	return nil
}

// coversTrimmed reports whether a table that has applied these records includes everything
// that was trimmed on this node.
func (r *Replication) coversTrimmed(applied map[journal.Stream]uint64) bool {
	for s, e := range r.opts.Log.Ends() {
		if e.First > applied[s]+1 && !r.opts.Retired(s) {
			return false
		}
	}
	return true
}
