package storage

import (
	"fmt"
	"testing"
)

// Each operation is one transaction with two syncs. The batch is what raft stores
// in one call.
func BenchmarkStoreLogs(b *testing.B) {
	for _, batch := range []uint64{1, 32} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			s := openRaft(b, b.TempDir())
			data := make([]byte, 200)
			var last uint64
			b.ReportAllocs()
			for b.Loop() {
				logs := entriesFrom(last+1, last+batch, 1)
				for _, l := range logs {
					l.Data = data
				}
				mustStore(b, s, logs...)
				last += batch
			}
			b.ReportMetric(float64(last)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

// BenchmarkOpen measures a restart up to the first read by raft.
func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	s := openRaft(b, dir)
	for i := range uint64(20) {
		mustStore(b, s, entriesFrom(1+1000*i, 1000+1000*i, 1)...)
	}
	closeRaft(b, s)
	for b.Loop() {
		closeRaft(b, openRaft(b, dir))
	}
}
