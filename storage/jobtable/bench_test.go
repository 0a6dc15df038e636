package jobtable

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/journal"
)

// manyJobs is the number of jobs in the table for lists and restarts.
var manyJobs = flag.Int("jobs", 20_000, "jobs in the benchmarks of a large table")

func BenchmarkSubmit(b *testing.B) {
	w := newWorld(b)
	table := start(b, w.options(b.TempDir()))
	l := w.log("a")
	for range b.N {
		w.pass(50 * time.Microsecond)
		l.submit(w.newID(), journal.Submission{Tenant: fmt.Sprint(l.seq % 10), Body: make([]byte, 1100)})
	}
	applyAll(b, table, l)
}

// BenchmarkLife submits, starts and finishes jobs. 64 are in progress at a time, so
// most rows are written once or twice.
func BenchmarkLife(b *testing.B) {
	w := newWorld(b)
	table := start(b, w.options(b.TempDir()))
	l := w.log("a")
	live(b, w, l, b.N)
	applyAll(b, table, l)
}

// live writes the records of n jobs, 64 of them at once.
func live(b *testing.B, w *world, l *log, n int) {
	b.Helper()
	token := journal.Token{Generation: 1, Index: 9}
	var waiting, working []journal.JobID
	for i := range n + 128 {
		w.pass(50 * time.Microsecond)
		if i < n {
			id := w.newID()
			l.submit(id, journal.Submission{Tenant: fmt.Sprint(i % 10), Body: make([]byte, 1100)})
			waiting = append(waiting, id)
		}
		if len(waiting) > 32 || i >= n && len(waiting) > 0 {
			l.start(waiting[0], token, 1)
			working, waiting = append(working, waiting[0]), waiting[1:]
		}
		if len(working) > 32 || i >= n+64 && len(working) > 0 {
			l.finish(working[0], token, 1, journal.Outcome{Status: journal.Succeeded, Body: make([]byte, 800)})
			working = working[1:]
		}
	}
}

func applyAll(b *testing.B, table *running, l *log) {
	b.Helper()
	before := cpuTime(b)
	b.ResetTimer()
	for from := 0; from < len(l.all); from += 64 {
		table.Apply(l.stream, l.all[from:min(len(l.all), from+64)])
	}
	if err := table.flush(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/job")
	b.StopTimer()
}

// cpuTime is that of the process, which other load on the machine hardly changes.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkMany queries a table of -jobs finished jobs, and opens it again.
func BenchmarkMany(b *testing.B) {
	w := newWorld(b)
	dir := b.TempDir()
	o := w.options(dir)
	table := start(b, o)
	l := w.log("a")
	for done := 0; done < *manyJobs; done += 10_000 {
		l.all = l.all[:0]
		live(b, w, l, min(10_000, *manyJobs-done))
		table.Apply(l.stream, l.all)
	}
	l.all = nil
	if err := table.flush(b.Context()); err != nil {
		b.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, File))
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("%d jobs: file of %d bytes a job", *manyJobs, info.Size()/int64(*manyJobs))
	for _, q := range []struct {
		name string
		f    Filter
	}{
		{"page of a tenant", Filter{Tenant: "3", Limit: 20}},
		{"status without jobs", Filter{Tenant: "3", Status: []journal.Status{journal.Failed}}},
		{"page of all", Filter{AllTenants: true, Limit: 20}},
	} {
		b.Run(q.name, func(b *testing.B) {
			for b.Loop() {
				if _, _, err := table.List(q.f); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("digests", func(b *testing.B) {
		for b.Loop() {
			if _, err := table.Digests(); err != nil {
				b.Fatal(err)
			}
		}
	})
	table.end()
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			table, err := Open(o)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(anonymous(b), "anon-MB")
			if err := table.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("open after a kill", func(b *testing.B) {
		mark := filepath.Join(dir, markFile)
		for b.Loop() {
			m, _, err := markFormat.Read(mark)
			if err != nil {
				b.Fatal(err)
			}
			m.State = boltfile.MarkOpen
			if err := os.WriteFile(mark, markFormat.Append(nil, m), 0o600); err != nil {
				b.Fatal(err)
			}
			table, err := Open(o)
			if err != nil {
				b.Fatal(err)
			}
			if err := table.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	table = start(b, o)
	b.Run("check", func(b *testing.B) {
		for b.Loop() {
			table.check(b)
		}
	})
}

var rssAnon = regexp.MustCompile(`RssAnon:\s+(\d+) kB`)

// anonymous memory of the process, in MB.
func anonymous(b *testing.B) float64 {
	b.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Skip("no /proc here: ", err)
	}
	m := rssAnon.FindSubmatch(status)
	if m == nil {
		b.Skip("this kernel does not tell anonymous memory apart")
	}
	kb, err := strconv.Atoi(string(m[1]))
	if err != nil {
		b.Fatal(err)
	}
	return float64(kb) / 1024
}
