package journal

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// countingDisk counts syncs.
type countingDisk struct {
	osDisk
	syncs atomic.Int64
}

type countingFile struct {
	file
	d *countingDisk
}

func (d *countingDisk) open(path string, flags int) (file, error) {
	f, err := d.osDisk.open(path, flags)
	return countingFile{f, d}, err
}

func (f countingFile) sync() error {
	f.d.syncs.Add(1)
	return f.file.sync()
}

// BenchmarkAppend measures durable appends of 1 KiB by the number of concurrent
// callers.
func BenchmarkAppend(b *testing.B) {
	for _, inFlight := range []int{1, 64, 256} {
		b.Run(fmt.Sprint(inFlight), func(b *testing.B) {
			d := &countingDisk{}
			l, err := open(testOptions(b.TempDir()), d)
			if err != nil {
				b.Fatal(err)
			}
			defer mustClose(b, l)
			id := streamOf(1)
			mustCreate(b, l, id)
			d.syncs.Store(0)
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
			b.ReportMetric(float64(b.N)/float64(d.syncs.Load()), "appends/sync")
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

// BenchmarkDisk measures the disk without a journal: one write and one fdatasync at a
// time, at the end of a file and over allocated blocks.
func BenchmarkDisk(b *testing.B) {
	for _, before := range []int64{0, 64 << 20} {
		name := "extending"
		if before > 0 {
			name = "prewritten"
		}
		b.Run(name, func(b *testing.B) {
			f, err := osDisk{}.open(filepath.Join(b.TempDir(), "f"), os.O_RDWR|os.O_CREATE)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			for at := int64(0); at < before; at += 1 << 20 {
				if _, err := f.WriteAt(make([]byte, 1<<20), at); err != nil {
					b.Fatal(err)
				}
			}
			if err := f.sync(); err != nil {
				b.Fatal(err)
			}
			frame := bytes.Repeat([]byte{7}, 1150)
			at := int64(0)
			b.ResetTimer()
			for range b.N {
				if _, err := f.WriteAt(frame, at); err != nil {
					b.Fatal(err)
				}
				if err := f.sync(); err != nil {
					b.Fatal(err)
				}
				if at += int64(len(frame)); before > 0 && at > before-4096 {
					at = 0
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "syncs/s")
		})
	}
}
