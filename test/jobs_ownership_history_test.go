//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/test/lab"
)

// ownerHistory records what clients read of the owners of streams.
type ownerHistory struct {
	config string // proposed by a read through the log, with a comment that differs each time

	mu      sync.Mutex // guards all below
	streams map[string]*streamHistory
	reads   []ownerRead // through the log
	local   int         // other reads, of the node's copy
	latest  map[string]view
	wrong   []string
}

// streamHistory is the owners of a stream that any client has read.
type streamHistory struct {
	owners map[agreed.FenceToken]ownerSeen
}

type ownerSeen struct {
	agreed.JobStream
	seen time.Time // the end of the first read that returned it
}

// first returns the earliest owner that a client has read.
func (s *streamHistory) first() ownerSeen {
	tokens := slices.SortedFunc(maps.Keys(s.owners), agreed.FenceToken.Compare)
	return s.owners[tokens[0]]
}

// ownerRead is one read through the log.
type ownerRead struct {
	client    int
	call, end time.Time
	streams   map[string]ownerState
}

// view is the newest state that a process has shown.
type view struct {
	ownership uint64
	streams   map[string]ownerState
	gone      map[string]bool
}

// client reads from one node until ctx ends, one time in three through the log.
func (b *ownerHistory) client(ctx context.Context, id int, n *lab.Node, seed uint64) {
	random := rand.New(rand.NewPCG(seed, uint64(id)))
	for round := 0; ctx.Err() == nil; round++ {
		rest(ctx, time.Duration(100+random.IntN(400))*time.Millisecond)
		through := random.IntN(3) == 0
		b.read(ctx, id, n, round, through)
	}
}

// read reads the owners from a node. Through the log, it first changes the
// configuration: that returns once the node has applied the change, so what the node
// shows after that is at least as new.
func (b *ownerHistory) read(ctx context.Context, id int, n *lab.Node, round int, through bool) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	pid, call := n.PID(), time.Now()
	if through {
		if err := n.ApplyConfig(ctx, fmt.Sprintf("%s# read at %s, round %d\n", b.config, n.Name, round)); err != nil {
			return
		}
	}
	got, err := n.JobStreams(ctx)
	if err != nil || n.PID() != pid {
		return
	}
	end := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	now := make(map[string]ownerState, len(got.Data))
	for _, j := range got.Data {
		now[j.Key()] = ownerState{owner: j.Owner, token: j.Token}
		b.note(j, end)
	}
	b.rises(fmt.Sprintf("%s (process %d)", n.Name, pid), got.Ownership, now)
	if !through {
		b.local++
		return
	}
	b.reads = append(b.reads, ownerRead{client: id, call: call, end: end, streams: now})
}

// note records an owner. A token must have one owner of one stream.
func (b *ownerHistory) note(j agreed.JobStream, end time.Time) {
	s := b.streams[j.Key()]
	if s == nil {
		s = &streamHistory{owners: map[agreed.FenceToken]ownerSeen{}}
		b.streams[j.Key()] = s
	}
	o, known := s.owners[j.Token]
	if known && (o.Owner != j.Owner || o.Before != j.Before) {
		b.complain("%s under token %v: %s and %s", j.Key(), j.Token, o.Owner, j.Owner)
	}
	if !known || end.Before(o.seen) {
		s.owners[j.Token] = ownerSeen{j, end}
	}
}

// rises checks that a process never shows an older state than before. A node has one
// client, so its answers are in order.
func (b *ownerHistory) rises(who string, ownership uint64, now map[string]ownerState) {
	if b.latest == nil {
		b.latest = map[string]view{}
	}
	was := b.latest[who]
	if ownership < was.ownership {
		b.complain("%s went back from change %d to %d", who, was.ownership, ownership)
	}
	next := view{ownership: ownership, streams: now, gone: was.gone}
	if next.gone == nil {
		next.gone = map[string]bool{}
	}
	for key, h := range was.streams {
		if is, here := now[key]; !here {
			next.gone[key] = true
		} else if is.token.Compare(h.token) < 0 {
			b.complain("%s showed %s under %v, then under %v", who, key, h.token, is.token)
		}
	}
	for key := range now {
		if next.gone[key] {
			b.complain("%s shows %s again, which it had shown as ended", who, key)
		}
	}
	b.latest[who] = next
}

func (b *ownerHistory) complain(format string, args ...any) {
	if len(b.wrong) < 50 {
		b.wrong = append(b.wrong, fmt.Sprintf(format, args...))
	}
}

// readAll reads once more at every node, through the log.
func (b *ownerHistory) readAll(t *testing.T, l *lab.Lab) {
	t.Helper()
	for i, n := range l.Nodes() {
		b.read(t.Context(), i, n, -1, true)
	}
}

// operations returns the history for the model: the reads through the log; each change,
// from the time that its proposer set to the end of the first read that returned it;
// and for each stream an end at an unknown time, possibly never.
func (b *ownerHistory) operations() []porcupine.Operation {
	b.mu.Lock()
	defer b.mu.Unlock()
	var ops []porcupine.Operation
	for key, s := range b.streams {
		opened := time.Now()
		if first := s.first(); first.Before != "" { // adopted before a client read its first owner
			ops = append(ops, porcupine.Operation{
				ClientId: 100, Input: ownerOp{stream: key, to: ownerState{owner: first.Before, token: agreed.FenceToken{Index: 1}}}, Output: ownerState{},
				Call: first.OpenedAt.UnixNano(), Return: first.seen.UnixNano(),
			})
		}
		for _, o := range s.owners {
			op, call := ownerOp{stream: key, from: o.Before, to: ownerState{owner: o.Owner, token: o.Token}}, o.OwnedAt
			if o.Before == "" {
				call = o.OpenedAt
			}
			if o.OpenedAt.Before(opened) {
				opened = o.OpenedAt
			}
			ops = append(ops, porcupine.Operation{ClientId: 100, Input: op, Output: ownerState{}, Call: call.UnixNano(), Return: o.seen.UnixNano()})
		}
		ops = append(ops, porcupine.Operation{ClientId: 101, Input: ownerOp{stream: key, ends: true}, Output: ownerState{}, Call: opened.UnixNano(), Return: never})
		for _, r := range b.reads {
			ops = append(ops, porcupine.Operation{
				ClientId: r.client, Input: ownerOp{stream: key, read: true}, Output: r.streams[key],
				Call: r.call.UnixNano(), Return: r.end.UnixNano(),
			})
		}
	}
	return ops
}

func (b *ownerHistory) adoptions() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, s := range b.streams {
		for _, o := range s.owners {
			if o.Before != "" {
				n++
			}
		}
	}
	return n
}

func (b *ownerHistory) summary() string {
	most := 0
	for _, s := range b.streams {
		most = max(most, len(s.owners))
	}
	return fmt.Sprintf("%d reads through the log and %d others, of %d streams; %d changes of owner, at most %d owners of one stream", len(b.reads), b.local, len(b.streams), b.adoptions(), most)
}

// startRecords copies the journals that each node has written itself, since nodes drop
// streams that have ended.
type startRecords struct {
	lab    *lab.Lab
	dir    string
	copied map[string]time.Time // modification time by file
	failed error
}

func newStartRecords(t *testing.T, l *lab.Lab) *startRecords {
	return &startRecords{lab: l, dir: t.TempDir(), copied: map[string]time.Time{}}
}

func (b *startRecords) follow(ctx context.Context) {
	for ctx.Err() == nil {
		b.copyAll()
		rest(ctx, 2*time.Second)
	}
}

func (b *startRecords) copyAll() {
	for _, n := range b.lab.Nodes() {
		if err := b.copy(n); err != nil && !errors.Is(err, fs.ErrNotExist) { // a stream may be dropped meanwhile
			b.failed = err
		}
	}
}

func (b *startRecords) copy(n *lab.Node) error {
	from := filepath.Join(n.DataDir(), "journal", n.Name)
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".seg") {
			return err
		}
		info, err := d.Info()
		if err != nil || b.copied[path].Equal(info.ModTime()) {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		to := filepath.Join(b.dir, n.Name, n.Name, rel)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			return err
		}
		b.copied[path] = info.ModTime()
		return os.WriteFile(to, text, 0o600)
	})
}

func (b *startRecords) siteOf(node string) string {
	for _, n := range b.lab.Nodes() {
		if n.Name == node {
			return n.Site.Name
		}
	}
	return ""
}

// start is a Started record.
type start struct {
	by    string // node that wrote it
	token agreed.FenceToken
	home  string // stream that the job was submitted in
}

// records reads the copies and returns the starts by job and attempt.
func (b *startRecords) records(t *testing.T) map[string][]start {
	t.Helper()
	starts, home := map[string][]start{}, map[journal.JobID]string{}
	for _, n := range b.lab.Nodes() {
		log, err := journal.Open(journal.Options{
			Dir: filepath.Join(b.dir, n.Name), Clock: journal.NewHLC(time.Now, time.Hour),
			Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		})
		if err != nil {
			t.Fatal(err)
		}
		for s, end := range log.Ends() {
			if err := log.Replay(s, end.First, func(records []journal.Record) error {
				for _, r := range records {
					switch r.Kind {
					case journal.Submitted:
						home[r.Job] = s.String()
					case journal.Started:
						id := fmt.Sprintf("%s-%d", r.Job, r.Attempt)
						starts[id] = append(starts[id], start{by: s.Origin, token: agreed.FenceToken{Generation: r.Token.Generation, Index: r.Token.Index}})
					case journal.Retrying, journal.Finished, journal.CancelAsked, journal.Deleted:
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for id, all := range starts {
		job, err := journal.ParseJobID(id[:strings.LastIndexByte(id, '-')])
		if err != nil {
			t.Fatal(err)
		}
		for i := range all {
			all[i].home = home[job]
		}
	}
	return starts
}

// leaseEnds is how long after a change the previous owner may still start jobs: its
// last lease, and 50 ms between the check of the lease and the start.
const leaseEnds = 1200*time.Millisecond + 50*time.Millisecond

// inFlight bounds the time that a request takes within a site on a busy machine.
const inFlight = 100 * time.Millisecond

// verify compares the requests to model servers with starts and owners.
func (b *startRecords) verify(t *testing.T, owners *ownerHistory, requests *requestLog) {
	t.Helper()
	if b.failed != nil {
		t.Fatal(b.failed)
	}
	starts := b.records(t)
	var wrong []string
	written, alone := 0, 0
	for id, all := range starts {
		for _, s := range all {
			written++
			origin, _, _ := strings.Cut(s.home, "/")
			owner := origin
			if s.token.Index == 0 {
				alone++
			} else if seen := owners.streams[s.home]; seen != nil {
				if o, known := seen.owners[s.token]; known {
					owner = o.Owner
				} else {
					owner = s.by // no client has read that token; two users of it are found below
				}
			}
			if s.by != owner {
				wrong = append(wrong, fmt.Sprintf("%s of %s was started by %s under %v, the token of %s", id, s.home, s.by, s.token, owner))
			}
		}
	}
	type executed struct {
		request
		start
	}
	of := map[string][]executed{}
	unsure := 0
	for _, r := range requests.seen {
		all := starts[r.id]
		if len(all) == 0 {
			wrong = append(wrong, fmt.Sprintf("%s was requested, and no journal has a start of it", r.id))
			continue
		}
		// Two owners may start the same attempt. Each asks the model server of its own
		// site first, and the result ends the attempt.
		by := slices.Compact(slices.DeleteFunc(slices.Clone(all), func(s start) bool { return b.siteOf(s.by) != r.site }))
		if len(by) != 1 {
			unsure++
			continue
		}
		of[by[0].home] = append(of[by[0].home], executed{r, by[0]})
	}
	if unsure > len(requests.seen)/20 {
		wrong = append(wrong, fmt.Sprintf("of %d of %d requests the sender can't be determined", unsure, len(requests.seen)))
	}
	excused := 0
	for home, all := range of {
		first := map[agreed.FenceToken]executed{}
		for _, e := range all {
			f, known := first[e.token]
			if known && f.by != e.by {
				wrong = append(wrong, fmt.Sprintf("%s: %s and %s both started under %v", home, f.by, e.by, e.token))
			}
			if !known || e.at.Before(f.at) {
				first[e.token] = e
			}
		}
		for _, e := range all {
			limit, why := time.Time{}, ""
			lower := func(at time.Time, what string) {
				if limit.IsZero() || at.Before(limit) {
					limit, why = at, what
				}
			}
			for token, f := range first {
				if token.Compare(e.token) > 0 && f.by != e.by {
					lower(f.at, fmt.Sprintf("the first start of %s under %v", f.by, token))
				}
			}
			if seen := owners.streams[home]; seen != nil {
				for token, o := range seen.owners {
					if token.Compare(e.token) > 0 && o.Owner != e.by {
						lower(o.seen.Add(leaseEnds), "the end of the last lease before "+o.Owner)
					}
				}
			}
			switch {
			case limit.IsZero() || e.at.Before(limit.Add(inFlight)):
			case requests.justResumed(e.by, e.at):
				excused++
			default:
				wrong = append(wrong, fmt.Sprintf("%s of %s came from %s under %v %s after %s", e.id, home, e.by, e.token, strconv.Quote(e.at.Sub(limit).String()), why))
			}
		}
	}
	t.Logf("%d starts in the journals (%d of them by isolated nodes), %d requests; %d of two possible senders, %d from a process that had just been stopped", written, alone, len(requests.seen), unsure, excused)
	if len(requests.seen) < 200 {
		t.Errorf("only %d requests, too few for the test to prove anything", len(requests.seen))
	}
	report(t, "starts break law 4", wrong)
}
