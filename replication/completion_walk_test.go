package replication

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// endings decides which streams are retired, for all nodes of a world.
type endings struct {
	mu    sync.Mutex // guards ended
	ended map[journal.Stream]bool
}

func (e *endings) retired(s journal.Stream) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ended[s]
}

func (e *endings) end(s journal.Stream) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ended[s] = true
}

// endingWorld makes nodes whose streams end when retireStreams says so.
func endingWorld(t *testing.T, names ...string) (*world, *endings) {
	e := &endings{ended: map[journal.Stream]bool{}}
	w := newWorld(t, names...)
	w.tune = func(n *node) { n.retired = e.retired; n.segment = 64 << 10 }
	return w.start(), e
}

// retireStreams ends the streams of earlier processes that every member holds, as far as
// the node knows, and drops them at all nodes that run. As in a real cluster, the node must
// have all of them itself.
func (n *node) retireStreams(e *endings) (streams int) {
	current := map[journal.Stream]bool{}
	for _, o := range n.w.nodes {
		current[o.stream] = true
	}
	for s, end := range n.log.Ends() {
		if n.holdsMost(s) && !current[s] && !n.table.Partial() && n.repl.HeldByAll(s) >= end.Durable {
			e.end(s)
			streams++
		}
	}
	for _, o := range n.w.nodes {
		if o.stop != nil {
			o.repl.trim()
		}
	}
	return streams
}

// holdsMost reports whether all nodes run, and none has more of a stream.
func (n *node) holdsMost(s journal.Stream) bool {
	for _, o := range n.w.nodes {
		if o.stop == nil || o.holds(s) > n.holds(s) {
			return false
		}
	}
	return true
}

// awaitRetired waits until all streams of earlier processes have been dropped.
func (n *node) awaitRetired(e *endings) {
	n.w.t.Helper()
	eventually(n.w.t, "the streams of earlier processes are dropped everywhere", func() bool {
		n.retireStreams(e)
		for _, o := range n.w.nodes {
			if len(o.log.Ends()) > len(n.w.nodes) {
				return false
			}
		}
		return true
	})
}

func (n *node) restart() { n.halt(); n.start() }

func (n *node) loseDisk() { n.halt(); n.wipe(); n.start() }

// healthy reports whether all nodes run and say of themselves that they have everything.
func (w *world) healthy() bool {
	for _, n := range w.nodes {
		if n.stop == nil {
			return false
		}
		if st := n.repl.Standing(); !st.CaughtUp {
			return false
		}
	}
	return true
}

// jobs returns the ids of a table's jobs.
func (n *node) jobs() map[journal.JobID]bool {
	n.w.t.Helper()
	ids := map[journal.JobID]bool{}
	f := jobtable.Filter{AllTenants: true, Limit: jobtable.MaxLimit}
	for more := true; more; {
		rows, next, err := n.table.List(f)
		if err != nil {
			n.w.t.Fatal(err)
		}
		for _, r := range rows {
			ids[r.ID()] = true
			f.After = r.ID()
		}
		more = next && len(rows) > 0
	}
	return ids
}

// Nodes lose their disks one after the other, each as soon as all say that they have
// everything. All jobs are of streams that have ended, so they exist as rows alone.
func TestDiskLossesInARowLoseNoRows(t *testing.T) {
	w, e := endingWorld(t, "a1", "b1", "c1")
	total := 0
	for i, name := range w.order {
		n := w.nodes[name]
		w.wantEverywhere(n.stream, n.submit(40+i, 100))
		total += 40 + i
	}
	for _, n := range w.nodes {
		n.restart()
	}
	eventually(t, "all are healthy", w.healthy)
	w.nodes["b1"].awaitRetired(e)
	for range 2 {
		for _, name := range w.order {
			w.nodes[name].loseDisk()
			eventually(t, "all are healthy after the loss of "+name, w.healthy)
			for _, n := range w.nodes {
				if got := len(n.jobs()); got != total {
					t.Fatalf("every node says that it has everything after the loss of %s's disk, and %s has %d jobs of %d", name, n.name, got, total)
				}
			}
		}
	}
}

// A disk that is replaced by an old image of itself lacks rows although its table was
// complete. The node finds out by itself.
func TestTableOfAnOldImageBecomesPartial(t *testing.T) {
	w, e := endingWorld(t, "a1", "b1", "c1")
	a1, b1, c1 := w.nodes["a1"], w.nodes["b1"], w.nodes["c1"]
	eventually(t, "all are healthy", w.healthy)
	b1.halt()
	image := b1.image()
	b1.start()
	w.wantEverywhere(c1.stream, c1.submit(30, 100))
	c1.restart()
	eventually(t, "all are healthy", w.healthy)
	a1.awaitRetired(e)
	b1.halt()
	b1.restore(image)
	w.sever("a1", "b1", true)
	w.sever("b1", "c1", true)
	b1.start()
	if st := b1.repl.Standing(); st.CaughtUp || b1.table.Partial() {
		t.Errorf("before it has compared its table: %+v", st)
	}
	w.sever("a1", "b1", false)
	w.sever("b1", "c1", false)
	eventually(t, "all are healthy", w.healthy)
	if got := len(b1.jobs()); got != 30 {
		t.Errorf("complete with %d jobs of 30", got)
	}
}

// A table of an earlier version may lack rows, and has no note of that. It stays in use
// while it gets them.
func TestTableOfAnEarlierVersionIsComparedAndStaysInUse(t *testing.T) {
	w, e := endingWorld(t, "a1", "b1")
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	w.wantEverywhere(a1.stream, a1.submit(30, 100))
	a1.restart()
	eventually(t, "all are healthy", w.healthy)
	b1.awaitRetired(e)
	b1.halt()
	b1.wipe()
	w.sever("a1", "b1", true)
	b1.start()
	b1.halt()
	for _, note := range []string{"jobs.partial", "jobs.whole"} {
		if err := os.RemoveAll(b1.dir + "/" + note); err != nil {
			t.Fatal(err)
		}
	}
	b1.start()
	partial := false
	w.sever("a1", "b1", false)
	eventually(t, "b1's table is proven", func() bool { partial = partial || b1.table.Partial(); return b1.table.Proven() })
	if partial {
		t.Error("the table was partial meanwhile")
	}
	if got := len(b1.jobs()); got != 30 {
		t.Errorf("proven with %d jobs of 30", got)
	}
}

// Random sequences of losses, restarts, crashes while rows are missing, old images and
// cuts, where a disk is lost only when every node says that it has everything. A node that
// says so has every job.
func TestCompleteTablesHaveEveryRow(t *testing.T) {
	walks, steps := 2, 12
	if os.Getenv("DSNODE_TEST_FULL") != "" {
		walks, steps = 30, 40
	}
	for walk := range walks {
		t.Run(fmt.Sprint(walk), func(t *testing.T) { walkTables(t, steps) })
	}
}

func walkTables(t *testing.T, steps int) {
	seed := uint64(time.Now().UnixNano())
	var trail []string
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d: %s", seed, strings.Join(trail, ", "))
		}
	})
	random := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // not a secret
	w, e := endingWorld(t, "a1", "b1", "c1")
	images := map[string]string{}
	total := 0
	pick := func() *node { return w.nodes[w.order[random.IntN(len(w.order))]] }
	repair := func() {
		for i, a := range w.order {
			for _, b := range w.order[i+1:] {
				w.sever(a, b, false)
			}
		}
		for _, n := range w.nodes {
			if n.stop == nil {
				n.start()
			}
		}
		for _, n := range w.nodes { // jobs that only their own node has yet may be lost
			for s, end := range n.log.Ends() {
				if !e.retired(s) {
					w.wantEverywhere(s, end.Durable)
					w.wantVisible(s, end.Durable)
				}
			}
		}
		eventually(t, "all are healthy", w.healthy)
		for _, n := range w.nodes {
			if got := len(n.jobs()); got != total {
				t.Fatalf("every node says that it has everything, and %s has %d jobs of %d", n.name, got, total)
			}
		}
	}
	actions := map[string]func(*node){
		"submit": func(n *node) {
			if n.stop != nil {
				count := 1 + random.IntN(20)
				total += count
				n.submit(count, 200)
			}
		},
		"restart": func(n *node) {
			if n.stop != nil {
				n.restart()
			}
		},
		"stop": func(n *node) { n.halt() },
		"end streams": func(n *node) {
			if n.stop != nil {
				n.retireStreams(e)
			}
		},
		"cut": func(n *node) {
			if o := pick(); o != n {
				w.sever(n.name, o.name, true)
			}
		},
		"image": func(n *node) {
			repair() // no job may be on this disk alone when the image is restored
			n.halt()
			images[n.name] = n.image()
			n.start()
		},
		"lose disk": func(n *node) { repair(); n.loseDisk() },
		"lose disk and crash": func(n *node) {
			repair()
			n.loseDisk()
			time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond) // the random moment
			n.restart()
		},
		"restore image": func(n *node) {
			if image := images[n.name]; image != "" {
				repair()
				n.halt()
				n.restore(image)
				n.start()
			}
		},
		"repair": func(*node) { repair() },
	}
	var names []string
	for name := range actions {
		names = append(names, name)
	}
	slices.Sort(names)
	for range steps {
		name, n := names[random.IntN(len(names))], pick()
		trail = append(trail, name+" "+n.name)
		actions[name](n)
	}
	repair()
}

// wantVisible waits until all nodes' tables show all of a stream.
func (w *world) wantVisible(s journal.Stream, seq uint64) {
	w.t.Helper()
	for _, n := range w.nodes {
		eventually(w.t, fmt.Sprintf("%s shows %s to %d", n.name, s, seq), func() bool { return n.table.Visible(s) >= seq })
	}
}

// image copies the disk of a node that does not run.
func (n *node) image() string {
	n.w.t.Helper()
	dir := n.w.t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(n.dir)); err != nil {
		n.w.t.Fatal(err)
	}
	return dir
}

// restore replaces the disk of a node that does not run.
func (n *node) restore(image string) {
	n.w.t.Helper()
	n.wipe()
	if err := os.CopyFS(n.dir, os.DirFS(image)); err != nil {
		n.w.t.Fatal(err)
	}
}
