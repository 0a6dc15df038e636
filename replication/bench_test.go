package replication

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

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
