package replication

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/storage/journal"
)

// BenchmarkCatchUp measures how fast a node that was away receives the records of
// 1 KiB that it missed.
func BenchmarkCatchUp(b *testing.B) {
	for name, noTable := range map[string]bool{"journal": true, "journal+table": false} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, "a1", "b1")
			w.tune = func(n *node) { n.noTable, n.limits.BulkBytesPerSecond = noTable, 1<<30 }
			w.delay = 30 * time.Millisecond
			a1, b1 := w.nodes["a1"], w.nodes["b1"]
			a1.start()
			seq := a1.submit(b.N, 1000)
			b.SetBytes(1000)
			b.ResetTimer()
			b1.start()
			eventually(b, "b1 holds all records", func() bool { return b1.holds(a1.stream) == seq })
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

// BenchmarkTwoCities measures how long a submission takes to be in two cities with a
// round trip of 30 ms between them, and the part of the local disk.
func BenchmarkTwoCities(b *testing.B) {
	for name, clients := range map[string]int{"1": 1, "64": 64} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, "a1", "c1")
			w.delay = 30 * time.Millisecond
			w.start().connected()
			a1 := w.nodes["a1"]
			var mu sync.Mutex
			var whole, own []time.Duration
			var wg sync.WaitGroup
			b.ResetTimer()
			for c := range clients {
				wg.Go(func() {
					for i := c; i < b.N; i += clients {
						r := a1.submission(1000)
						began := time.Now()
						seq, err := a1.log.Append(context.Background(), a1.stream, []journal.Record{r})
						if err != nil {
							b.Error(err)
							return
						}
						appended := time.Since(began)
						if err := a1.repl.Await(context.Background(), a1.stream, seq, journal.DurableTwoCities); err != nil {
							b.Error(err)
							return
						}
						mu.Lock()
						whole, own = append(whole, time.Since(began)), append(own, appended)
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			slices.Sort(whole)
			slices.Sort(own)
			ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
			b.ReportMetric(ms(whole[len(whole)/2]), "p50-ms")
			b.ReportMetric(ms(whole[len(whole)*99/100]), "p99-ms")
			b.ReportMetric(ms(own[len(own)/2]), "own-p50-ms")
		})
	}
}

// The time until a node that lost its disk has all rows again, by the number of jobs that
// have ended. Their streams have ended too, so all arrive as rows. A million jobs need
// DSNODE_TEST_FULL=1 and about 6 GB of disk.
func BenchmarkCompletionAfterALoss(b *testing.B) {
	for _, jobs := range []int{1_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(jobs), func(b *testing.B) {
			if jobs > 100_000 && os.Getenv("DSNODE_TEST_FULL") == "" {
				b.Skip("needs DSNODE_TEST_FULL=1")
			}
			ended := &endings{ended: map[journal.Stream]bool{}}
			w := newWorld(b, "a1", "b1")
			w.tune = func(n *node) { n.retired = ended.retired }
			w.start()
			a1, b1 := w.nodes["a1"], w.nodes["b1"]
			a1.finish(jobs)
			end, _ := a1.log.End(a1.stream)
			w.wantEverywhere(a1.stream, end.Durable)
			a1.restart()
			a1.awaitRetired(ended)
			size := float64(0)
			for b.Loop() {
				b.StopTimer()
				b1.halt()
				b1.wipe()
				b.StartTimer()
				b1.start()
				eventuallyWithin(b, time.Hour, "b1 is complete", func() bool { return b1.repl.Standing().CaughtUp })
				if got := b1.table.Jobs(); got != int64(jobs) {
					b.Fatalf("complete with %d jobs of %d", got, jobs)
				}
				size = testutil.ToFloat64(a1.repl.metrics.sent)
			}
			b.ReportMetric(size/float64(b.N)/(1<<20), "MB-sent/op")
		})
	}
}

// finish appends jobs that have ended, with bodies and results of 1 KiB.
func (n *node) finish(jobs int) {
	n.w.t.Helper()
	for jobs > 0 {
		var records []journal.Record
		for range min(jobs, 128) {
			sub := n.submission(1024)
			end := journal.Record{Stream: n.stream, Job: sub.Job, Attempt: 1}
			body := make([]byte, 1024)
			_, _ = rand.Read(body) // never fails
			if err := n.sealer.SealOutcome(&end, &journal.Outcome{Status: journal.Succeeded, Code: 200, Body: body}); err != nil {
				n.w.t.Fatal(err)
			}
			records = append(records, sub, end)
			jobs--
		}
		if _, err := n.log.Append(context.Background(), n.stream, records); err != nil {
			n.w.t.Fatal(err)
		}
	}
}
