package jobtable

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/storage/journal"
)

// model is a simple reference implementation beside the real table.
type model struct {
	w     *world
	table *Table
	logs  []*log
	seen  map[*log]int // records applied
	rows  map[journal.JobID]Row
	ids   []journal.JobID
	subs  map[journal.JobID]journal.Submission
	dirs  func() string
	dir   string
}

func (m *model) open(t *rapid.T) {
	var err error
	if m.table, err = Open(m.w.options(m.dir)); err != nil {
		t.Fatal(err)
	}
	m.table.db.NoSync = true // the test copies files, which shows unsynced writes too
}

// write adds a record to a journal, without applying it.
func (m *model) write(t *rapid.T) {
	l := rapid.SampledFrom(m.logs).Draw(t, "log")
	m.w.pass(time.Duration(rapid.IntRange(0, 2).Draw(t, "ms")) * time.Millisecond)
	if len(m.ids) == 0 || rapid.IntRange(0, 2).Draw(t, "new") == 0 {
		var id journal.JobID
		binary.BigEndian.PutUint64(id[:], uint64(m.w.time().UnixMilli())<<16)
		if rapid.Bool().Draw(t, "idempotent") { // an HMAC may have any value
			binary.BigEndian.PutUint64(id[:], rapid.Uint64Min(1).Draw(t, "hmac")) // the zero id means "from the start"
		}
		id[15] = byte(rapid.IntRange(0, 3).Draw(t, "bucket")) // few stripes
		binary.BigEndian.PutUint32(id[8:], uint32(len(m.ids)))
		m.ids = append(m.ids, id)
		m.subs[id] = journal.Submission{
			Tenant:    rapid.SampledFrom([]string{"", "x", "y"}).Draw(t, "tenant"),
			KeyHash:   rapid.SampledFrom([]string{"", "", "k1", "k2"}).Draw(t, "key"),
			ExpiresAt: m.w.time().Add(time.Hour),
			Body:      make([]byte, rapid.SampledFrom([]int{0, 10, 1000, 20_000}).Draw(t, "body")),
		}
	}
	id := rapid.SampledFrom(m.ids).Draw(t, "job")
	token := journal.Token{Generation: 1, Index: rapid.Uint64Range(0, 3).Draw(t, "token")}
	attempt := rapid.Uint32Range(0, 3).Draw(t, "attempt")
	switch kind := rapid.SampledFrom([]journal.Kind{1, 1, 1, 2, 2, 3, 4, 5, 6}).Draw(t, "kind"); kind {
	case journal.Submitted:
		l.submit(id, m.subs[id])
	case journal.Finished:
		status := rapid.SampledFrom(statuses[2:]).Draw(t, "status")
		l.finish(id, token, attempt, journal.Outcome{Status: status, Body: make([]byte, 100*attempt)})
	default:
		l.write(journal.Record{Kind: kind, Job: id, Token: token, Attempt: attempt})
	}
}

func (m *model) apply(t *rapid.T) {
	l := rapid.SampledFrom(m.logs).Draw(t, "log")
	n := rapid.IntRange(0, len(l.all)-m.seen[l]).Draw(t, "n")
	again := rapid.IntRange(0, m.seen[l]).Draw(t, "again")
	m.table.Apply(l.stream, l.all[m.seen[l]-again:m.seen[l]+n])
	for _, r := range l.all[m.seen[l] : m.seen[l]+n] {
		m.rows[r.Job] = Row{Join(m.rows[r.Job].Records, []journal.Record{r})}
	}
	m.seen[l] += n
}

func (m *model) commit(t *rapid.T) {
	if err := m.table.commit(); err != nil {
		t.Fatal(err)
	}
}

// crash continues with the files as a killed process leaves them.
func (m *model) crash(t *rapid.T) {
	next := m.dirs()
	for _, name := range []string{File, markFile} {
		if err := copyFile(filepath.Join(next, name), filepath.Join(m.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	m.close(t)
	m.dir = next
	m.open(t)
	m.replay(t)
}

// copyFile copies in the kernel: the file is large and mostly empty, and the race
// detector checks every byte that passes through memory.
func copyFile(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = dst.ReadFrom(src)
	return errors.Join(err, dst.Close())
}

func (m *model) restart(t *rapid.T) {
	m.close(t)
	m.open(t)
	m.replay(t)
}

func (m *model) close(t *rapid.T) {
	if err := m.table.Close(); err != nil {
		t.Fatal(err)
	}
}

// replay applies the journals, as a node does at its start.
func (m *model) replay(t *rapid.T) {
	for _, l := range m.logs {
		applied := int(m.table.Applied(l.stream))
		if applied > m.seen[l] {
			t.Fatalf("%d of %d records are applied", applied, m.seen[l])
		}
		m.table.Apply(l.stream, l.all[applied:m.seen[l]])
	}
}

// compare compares the results of all queries with the model's.
func (m *model) compare(t *rapid.T) {
	if err := m.table.usable(); err != nil {
		t.Fatal(err)
	}
	counts := map[journal.Status]int64{}
	for _, s := range statuses {
		counts[s] = 0
	}
	live := map[journal.Stream]int64{}
	byKey := map[string][]journal.JobID{}
	for _, id := range m.ids {
		want := m.rows[id]
		got, ok, err := m.table.Get(id)
		if err != nil || ok != want.visible() || !equal(got.Records, want.Records) {
			t.Fatalf("Get(%s) = %v, %v, %v; want %v", id, got, ok, err, want)
		}
		if !want.visible() || want.Deleted() {
			continue
		}
		counts[want.Status()]++
		if key := m.subs[id].KeyHash; key != "" {
			byKey[key] = append(byKey[key], id)
		}
		if !want.Status().Final() {
			for _, s := range want.AcceptedBy() {
				live[s]++
			}
		}
	}
	if got := m.table.Counts(); !maps.Equal(got, counts) {
		t.Fatalf("counts %v, want %v", got, counts)
	}
	if got := m.table.LiveCounts(); !maps.Equal(got, live) {
		t.Fatalf("live %v, want %v", got, live)
	}
	for _, l := range m.logs {
		got := map[journal.JobID]bool{}
		err := m.table.Live(l.stream, func(r Row) bool {
			if got[r.ID()] || r.Status().Final() || !slices.Contains(r.AcceptedBy(), l.stream) {
				t.Fatalf("Live returned %v", r)
			}
			got[r.ID()] = true
			return true
		})
		if err != nil || int64(len(got)) != live[l.stream] {
			t.Fatalf("Live returned %d rows of %d, %v", len(got), live[l.stream], err)
		}
	}
	for _, key := range []string{"k1", "k2", "k3"} {
		want := byKey[key]
		slices.SortFunc(want, journal.JobID.Compare)
		if got, err := m.table.FindKey(key); err != nil || !slices.Equal(got, want) {
			t.Fatalf("FindKey(%s) = %v, %v; want %v", key, got, err, want)
		}
	}
	m.compareLists(t)
}

// compareLists pages through a list in both directions.
func (m *model) compareLists(t *rapid.T) {
	f := Filter{
		AllTenants: rapid.Bool().Draw(t, "all tenants"),
		Tenant:     rapid.SampledFrom([]string{"", "x", "y"}).Draw(t, "of"),
		Status:     rapid.SliceOfNDistinct(rapid.SampledFrom(statuses[:]), 0, 3, rapid.ID).Draw(t, "statuses"),
		Limit:      rapid.IntRange(1, 5).Draw(t, "limit"),
	}
	var want []journal.JobID
	for _, id := range m.ids {
		if row := m.rows[id]; row.visible() && !row.Deleted() && (f.AllTenants || m.subs[id].Tenant == f.Tenant) &&
			(len(f.Status) == 0 || slices.Contains(f.Status, row.Status())) {
			want = append(want, id)
		}
	}
	slices.SortFunc(want, func(a, b journal.JobID) int {
		x, _ := m.rows[a].Submitted()
		y, _ := m.rows[b].Submitted()
		return compareKeys(&listed{x.Clock, a}, &listed{y.Clock, b})
	})
	list := func(f Filter) (ids []journal.JobID, more bool) {
		rows, more, err := m.table.List(f)
		if err != nil {
			t.Fatalf("List(%+v): %v", f, err)
		}
		for _, r := range rows {
			if !equal(r.Records, m.rows[r.ID()].Records) {
				t.Fatalf("List returned %v, want %v", r, m.rows[r.ID()])
			}
			ids = append(ids, r.ID())
		}
		return ids, more
	}
	var got []journal.JobID
	for more := true; more; {
		page := f
		if len(got) > 0 {
			page.After = got[len(got)-1]
		}
		var ids []journal.JobID
		ids, more = list(page)
		if more && len(ids) != f.Limit {
			t.Fatalf("List returned %d rows of a limit of %d, and more is true", len(ids), f.Limit)
		}
		got = append(got, ids...)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("List(%+v) = %v, want %v", f, got, want)
	}
	if len(want) == 0 {
		return
	}
	at := rapid.IntRange(0, len(want)-1).Draw(t, "before")
	f.Before = want[at]
	ids, more := list(f)
	from := max(0, at-f.Limit)
	if !slices.Equal(ids, want[from:at]) || more != (from > 0) {
		t.Fatalf("List(%+v) = %v, %v; want %v", f, ids, more, want[from:at])
	}
}

func checkNow(t interface{ Fatal(...any) }, table *Table) {
	if err := table.commit(); err != nil {
		t.Fatal(err)
	}
	if err := table.view(func(tx *bbolt.Tx) error { return checkTables(context.Background(), tx) }); err != nil {
		t.Fatal(err)
	}
}

// The table behaves like the model for any records in any order, and any number of
// restarts and kills.
func TestTableAgainstAModel(t *testing.T) {
	root := t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		m := &model{
			w: newWorld(t), seen: map[*log]int{}, rows: map[journal.JobID]Row{}, subs: map[journal.JobID]journal.Submission{},
			dirs: func() string {
				n++
				dir := filepath.Join(root, fmt.Sprint(n))
				if err := os.Mkdir(dir, 0o700); err != nil {
					rt.Fatal(err)
				}
				return dir
			},
		}
		m.dir = m.dirs()
		for _, origin := range []string{"a", "ab", "c"} {
			m.logs = append(m.logs, m.w.log(origin))
		}
		m.open(rt)
		rt.Repeat(map[string]func(*rapid.T){
			"write":   m.write,
			"write2":  m.write,
			"write3":  m.write,
			"apply":   m.apply,
			"apply2":  m.apply,
			"commit":  m.commit,
			"crash":   m.crash,
			"restart": m.restart,
			"compare": m.compare,
		})
		m.compare(rt)
		checkNow(rt, m.table)
		m.compare(rt)
		m.compareCopy(rt)
		m.close(rt)
	})
}

// compareCopy makes a second table from pages of rows, and expects the same digests.
func (m *model) compareCopy(t *rapid.T) {
	other, err := Open(m.w.options(m.dirs()))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	size := rapid.SampledFrom([]int{1, 3000, 100_000}).Draw(t, "page")
	var all []byte
	for after, more := (journal.JobID{}), true; more; {
		var frames []byte
		if frames, after, more, err = m.table.Rows(after, size); err != nil {
			t.Fatal(err)
		}
		all = append(all, frames...)
	}
	records, err := parseFrames(all)
	if err != nil {
		t.Fatal(err)
	}
	records = rapid.Permutation(records).Draw(t, "order")
	for i := range records {
		if err := other.join(records[i].Job, []journal.Record{records[i]}, absenceUnknown); err != nil {
			t.Fatal(err)
		}
	}
	checkNow(t, other)
	mine, err := m.table.Digests()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := other.Digests()
	if err != nil || mine != theirs {
		t.Fatalf("digests differ (%v)", err)
	}
	for n := range 4 {
		b, _, more, err := m.table.Bucket(byte(n), journal.JobID{}, 1<<30)
		if err != nil || more {
			t.Fatal(err, more)
		}
		var want []byte
		for _, id := range slices.SortedFunc(maps.Keys(m.rows), journal.JobID.Compare) {
			if int(bucketOf(id)) == n {
				if want, err = appendFrames(want, m.rows[id].Records); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !bytes.Equal(b, want) {
			t.Fatalf("bucket %d has %d bytes, want %d", n, len(b), len(want))
		}
	}
}
