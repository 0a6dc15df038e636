package journal

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// BenchmarkAppend is durable appends of 1 KiB, by how many callers wait at once.
func BenchmarkAppend(b *testing.B) {
	for _, inFlight := range []int{1, 64, 256} {
		b.Run(fmt.Sprint(inFlight), func(b *testing.B) {
			l := mustOpen(b, testOptions(b.TempDir()))
			id := streamOf(1)
			mustCreate(b, l, id)
			payload := bytes.Repeat([]byte{7}, 1024)
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			b.ResetTimer()
			began := time.Now()
			for range inFlight {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						r := []Record{{Kind: Submitted, Job: JobID{1}, Payload: payload, Token: Token{1, 1}}}
						if _, err := l.Append(context.Background(), id, r); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "appends/s")
		})
	}
}

func BenchmarkSealSubmission(b *testing.B) {
	ring, _ := keyringtest.New(b, 1)
	s := NewSealer(ring)
	v := Submission{
		Tenant: "tenant", KeyID: "key_0123456789abcdef", Endpoint: "/v1/chat/completions", Model: "deepseek-chat",
		Durability: DurableSite, Priority: 5, Site: "east", CreatedAt: time.Now(), ExpiresAt: time.Now().Add(time.Hour),
		Body: bytes.Repeat([]byte{'x'}, 1024),
	}
	r := Record{Stream: streamOf(1), Job: JobID{1}, Token: Token{1, 1}}
	b.ReportAllocs()
	for b.Loop() {
		if err := s.SealSubmission(&r, &v); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenSubmission(b *testing.B) {
	ring, _ := keyringtest.New(b, 1)
	s := NewSealer(ring)
	v := Submission{Endpoint: "/v1/chat/completions", Model: "deepseek-chat", Body: bytes.Repeat([]byte{'x'}, 1024)}
	r := Record{Stream: streamOf(1), Job: JobID{1}, Token: Token{1, 1}}
	if err := s.SealSubmission(&r, &v); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.OpenSubmission(&r); err != nil {
			b.Fatal(err)
		}
	}
}
