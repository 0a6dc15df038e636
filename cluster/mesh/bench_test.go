package mesh

import (
	"context"
	"testing"

	"github.com/dsnode/dsnode/test/async"
)

// BenchmarkDial measures a new connection, both sides included: TCP, mutual TLS
// and preface.
func BenchmarkDial(b *testing.B) {
	ca, book := newTLSAuthority(b, "dev"), newTestBook()
	hub := newTestPeer(b, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.serve(b, book)
	ln := hub.Listener(KindHTTP)
	async.Run(b, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
		for {
			conn, err := ln.Accept()
			if err != nil {
				return nil
			}
			_ = conn.Close()
		}
	})
	peer := newTestPeer(b, ca, book, Identity{"dev", "b", "b-1"}, nil)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		conn, err := peer.Dial(ctx, KindHTTP, "a-1")
		if err != nil {
			b.Fatal(err)
		}
		_ = conn.Close()
	}
}

// BenchmarkHTTPBetweenPeers measures one small request over an open connection,
// both sides included.
func BenchmarkHTTPBetweenPeers(b *testing.B) {
	ca, book := newTLSAuthority(b, "dev"), newTestBook()
	hub := newTestPeer(b, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.serve(b, book)
	hub.serveHTTP(b)
	peer := newTestPeer(b, ca, book, Identity{"dev", "b", "b-1"}, nil)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := post(ctx, peer.Mesh, "a-1", "hello"); err != nil {
			b.Fatal(err)
		}
	}
}
