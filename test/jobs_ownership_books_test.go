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

// holdingBook is what clients saw of who executes which stream.
type holdingBook struct {
	config string // what a read through the log proposes, with a remark

	mu      sync.Mutex // guards all below
	streams map[string]*streamSeen
	reads   []holdingRead // through the log
	local   int           // reads past it
	latest  map[string]view
	wrong   []string
}

// streamSeen is all that was ever seen of a stream.
type streamSeen struct {
	owners map[agreed.FenceToken]ownerSeen
}

type ownerSeen struct {
	agreed.JobStream
	seen time.Time // the end of the first read that saw it
}

// first is the earliest owner that was seen.
func (s *streamSeen) first() ownerSeen {
	tokens := slices.SortedFunc(maps.Keys(s.owners), agreed.FenceToken.Compare)
	return s.owners[tokens[0]]
}

// holdingRead is one answer.
type holdingRead struct {
	client    int
	call, end time.Time
	streams   map[string]holding
}

// view is the newest that one process has shown.
type view struct {
	ownership uint64
	streams   map[string]holding
	gone      map[string]bool
}

// client asks at one node until ctx ends, one time in three through the log.
func (b *holdingBook) client(ctx context.Context, id int, n *lab.Node, seed uint64) {
	random := rand.New(rand.NewPCG(seed, uint64(id)))
	for round := 0; ctx.Err() == nil; round++ {
		rest(ctx, time.Duration(100+random.IntN(400))*time.Millisecond)
		through := random.IntN(3) == 0
		b.read(ctx, id, n, round, through)
	}
}

// read reads through the log, when it should: a change returns once this node has
// applied it, so what it shows after it is as new as the change at least.
func (b *holdingBook) read(ctx context.Context, id int, n *lab.Node, round int, through bool) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	pid, call := n.PID(), time.Now()
	if through {
		if err := n.ApplyConfig(ctx, fmt.Sprintf("%s# %s asks for the %dth time\n", b.config, n.Name, round)); err != nil {
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
	now := make(map[string]holding, len(got.Data))
	for _, j := range got.Data {
		now[j.Key()] = holding{owner: j.Owner, token: j.Token}
		b.note(j, end)
	}
	b.rises(fmt.Sprintf("%s (process %d)", n.Name, pid), got.Ownership, now)
	if !through {
		b.local++
		return
	}
	b.reads = append(b.reads, holdingRead{client: id, call: call, end: end, streams: now})
}

// note: a token makes one node the owner of one stream.
func (b *holdingBook) note(j agreed.JobStream, end time.Time) {
	s := b.streams[j.Key()]
	if s == nil {
		s = &streamSeen{owners: map[agreed.FenceToken]ownerSeen{}}
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

// rises: what one process shows may be old, and never older than what it showed.
// Answers to one client come one after the other.
func (b *holdingBook) rises(who string, ownership uint64, now map[string]holding) {
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
			b.complain("%s shows %s again, which it had shown as done with", who, key)
		}
	}
	b.latest[who] = next
}

func (b *holdingBook) complain(format string, args ...any) {
	if len(b.wrong) < 50 {
		b.wrong = append(b.wrong, fmt.Sprintf(format, args...))
	}
}

// readAll reads once more at every node, through the log.
func (b *holdingBook) readAll(t *testing.T, l *lab.Lab) {
	t.Helper()
	for i, n := range l.Nodes() {
		b.read(t.Context(), i, n, -1, true)
	}
}

// operations are the history: the reads through the log, each change between the
// time that its proposer gave it and the first sight of it, and for streams that
// are gone an end at an unknown time.
func (b *holdingBook) operations() []porcupine.Operation {
	b.mu.Lock()
	defer b.mu.Unlock()
	var ops []porcupine.Operation
	for key, s := range b.streams {
		opened := time.Now()
		if first := s.first(); first.Before != "" { // adopted before anybody saw its first owner
			ops = append(ops, porcupine.Operation{
				ClientId: 100, Input: holdingOp{stream: key, to: holding{owner: first.Before, token: agreed.FenceToken{Index: 1}}}, Output: holding{},
				Call: first.OpenedAt.UnixNano(), Return: first.seen.UnixNano(),
			})
		}
		for _, o := range s.owners {
			op, call := holdingOp{stream: key, from: o.Before, to: holding{owner: o.Owner, token: o.Token}}, o.OwnedAt
			if o.Before == "" {
				call = o.OpenedAt
			}
			if o.OpenedAt.Before(opened) {
				opened = o.OpenedAt
			}
			ops = append(ops, porcupine.Operation{ClientId: 100, Input: op, Output: holding{}, Call: call.UnixNano(), Return: o.seen.UnixNano()})
		}
		ops = append(ops, porcupine.Operation{ClientId: 101, Input: holdingOp{stream: key, ends: true}, Output: holding{}, Call: opened.UnixNano(), Return: never})
		for _, r := range b.reads {
			ops = append(ops, porcupine.Operation{
				ClientId: r.client, Input: holdingOp{stream: key, read: true}, Output: r.streams[key],
				Call: r.call.UnixNano(), Return: r.end.UnixNano(),
			})
		}
	}
	return ops
}

func (b *holdingBook) adoptions() int {
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

func (b *holdingBook) summary() string {
	most := 0
	for _, s := range b.streams {
		most = max(most, len(s.owners))
	}
	return fmt.Sprintf("%d reads through the log, %d past it, of %d streams; %d changes of owner, at most %d owners of one stream", len(b.reads), b.local, len(b.streams), b.adoptions(), most)
}

// startBook keeps copies of what each node wrote itself, so that what is done with
// and dropped can be looked at afterwards.
type startBook struct {
	lab    *lab.Lab
	dir    string
	copied map[string]time.Time // by file, as of when
	failed error
}

func newStartBook(t *testing.T, l *lab.Lab) *startBook {
	return &startBook{lab: l, dir: t.TempDir(), copied: map[string]time.Time{}}
}

func (b *startBook) follow(ctx context.Context) {
	for ctx.Err() == nil {
		b.copyAll()
		rest(ctx, 2*time.Second)
	}
}

func (b *startBook) copyAll() {
	for _, n := range b.lab.Nodes() {
		if err := b.copy(n); err != nil && !errors.Is(err, fs.ErrNotExist) { // a stream that goes this moment
			b.failed = err
		}
	}
}

func (b *startBook) copy(n *lab.Node) error {
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

func (b *startBook) siteOf(node string) string {
	for _, n := range b.lab.Nodes() {
		if n.Name == node {
			return n.Site.Name
		}
	}
	return ""
}

// start is a record of a start: who wrote it, under which token.
type start struct {
	by    string
	token agreed.FenceToken
	home  string
}

// records reads the copies: the starts by attempt of a job, and where each job was
// taken.
func (b *startBook) records(t *testing.T) map[string][]start {
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

// leaseEnds is how long after a change of owner the one before may still start
// something: its last lease, and what may be between the check and the start.
const leaseEnds = 1200*time.Millisecond + 50*time.Millisecond

// onItsWay is how long a request may take within a site of a busy machine.
const onItsWay = 100 * time.Millisecond

// verify holds what the model servers were asked against who owned what.
func (b *startBook) verify(t *testing.T, owners *holdingBook, asked *requestBook) {
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
					owner = s.by // nobody saw that token; two that used it are found below
				}
			}
			if s.by != owner {
				wrong = append(wrong, fmt.Sprintf("%s of %s was started by %s under %v, which is %s's", id, s.home, s.by, s.token, owner))
			}
		}
	}
	type executed struct {
		request
		start
	}
	of := map[string][]executed{}
	unsure := 0
	for _, r := range asked.seen {
		all := starts[r.id]
		if len(all) == 0 {
			wrong = append(wrong, fmt.Sprintf("%s was asked for and stands in no journal as begun", r.id))
			continue
		}
		// Two owners may begin the same attempt. Each asks its own site first, and
		// what came of it is final for the attempt.
		by := slices.Compact(slices.DeleteFunc(slices.Clone(all), func(s start) bool { return b.siteOf(s.by) != r.site }))
		if len(by) != 1 {
			unsure++
			continue
		}
		of[by[0].home] = append(of[by[0].home], executed{r, by[0]})
	}
	if unsure > len(asked.seen)/20 {
		wrong = append(wrong, fmt.Sprintf("whose %d of %d requests were can't be told", unsure, len(asked.seen)))
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
					lower(f.at, fmt.Sprintf("%s began under %v", f.by, token))
				}
			}
			if seen := owners.streams[home]; seen != nil {
				for token, o := range seen.owners {
					if token.Compare(e.token) > 0 && o.Owner != e.by {
						lower(o.seen.Add(leaseEnds), "the last lease ended before "+o.Owner)
					}
				}
			}
			switch {
			case limit.IsZero() || e.at.Before(limit.Add(onItsWay)):
			case asked.justResumed(e.by, e.at):
				excused++
			default:
				wrong = append(wrong, fmt.Sprintf("%s of %s came from %s under %v %s after %s", e.id, home, e.by, e.token, strconv.Quote(e.at.Sub(limit).String()), why))
			}
		}
	}
	t.Logf("%d starts in the journals (%d of them alone), %d requests came; %d that two nodes of one site may have made, %d from a process that had just been stopped", written, alone, len(asked.seen), unsure, excused)
	if len(asked.seen) < 200 {
		t.Errorf("only %d requests came, that proves little", len(asked.seen))
	}
	report(t, "starts break law 4", wrong)
}
