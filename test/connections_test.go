//go:build linux

package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/ports"
	"github.com/dsnode/dsnode/test/lab"
)

// TestSilentConnectionsKeepNobodyOut: clients that open connections and then owe the node a
// request take all that its ports may have, and more. Others are served at once, also
// where the process may open few files: those for upstreams are not the clients' to take.
func TestSilentConnectionsKeepNobodyOut(t *testing.T) {
	parallelIfShort(t)
	// The short form has fewer connections: opening 9,500 takes half a minute on a busy
	// machine.
	limit := 2000
	if full() {
		limit = config.DefaultLimits().Connections
	}
	l := lab.Start(t, lab.Topology{Nodes: []int{1}, Cluster: func(text string) string {
		return text + fmt.Sprintf("limits: {connections: %d}\n", limit)
	}})
	n := l.Sites[0].Nodes[0]
	l.WaitHealthy(within(returns))
	api, operators := strings.TrimPrefix(n.API(), "http://"), strings.TrimPrefix(n.AdminURL(), "http://")

	// The limit is that of a process with the hard limit of this one: the node raises the
	// soft one itself.
	most := min(limit, ports.Divide(ports.OpenFiles()).Clients)
	for _, tt := range []struct {
		name, ulimit  string
		silent, admin int
	}{
		{"an ordinary limit", "ulimit -S -n 256", most + 1300, 300},
		{"256 open files", "ulimit -n 256", 400, 100},
	} {
		script := filepath.Join(t.TempDir(), "dsnode")
		if err := os.WriteFile(script, []byte("#!/bin/sh\n"+tt.ulimit+"\nexec "+lab.Build(t)+" \"$@\"\n"), 0o700); err != nil { //nolint:gosec // a program
			t.Fatal(err)
		}
		n.Use(script)
		n.Restart()
		l.WaitFor(within(returns), "an answer after the restart", func(ctx context.Context) error {
			_, err := l.Ask(ctx, n, lab.FastModel, "Ready?")
			return err
		})
		conns := hold(t, l, api, tt.silent)
		conns = append(conns, hold(t, l, operators, tt.admin)...)
		for i := range 5 {
			l.Sites[0].Client().CloseIdleConnections() // it has one from before
			ctx, cancel := context.WithTimeout(t.Context(), within(2*time.Second))
			if _, err := l.Ask(ctx, n, lab.FastModel, fmt.Sprintf("%s: question %d?", tt.name, i)); err != nil {
				t.Errorf("%s, %d silent connections: %v", tt.name, tt.silent, err)
			}
			if _, err := n.Status(ctx); err != nil {
				t.Errorf("%s, %d silent connections with operators: %v", tt.name, tt.admin, err)
			}
			cancel()
		}
		samples, err := n.Metrics(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, port := range []string{"client", "admin"} {
			series := fmt.Sprintf("dsnode_connections_refused_total{port=%q,reason=", port)
			if samples[series+`"silent"}`] == 0 || samples[series+`"full"}`] != 0 {
				t.Errorf("%s: the port %s refused %v as silent and %v for lack of room", tt.name, port, samples[series+`"silent"}`], samples[series+`"full"}`])
			}
		}
		for _, c := range conns {
			_ = c.Close() // most are closed at the other end
		}
	}
}

// hold opens connections that send nothing, a part of a header, or a part of a body.
func hold(t *testing.T, l *lab.Lab, addr string, count int) []net.Conn {
	t.Helper()
	texts := []string{"", "", "POST /v1/jobs HTTP/1.1\r\nHost: loc", "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"}
	conns := make([]net.Conn, count)
	var g errgroup.Group
	g.SetLimit(16)
	for i := range conns {
		g.Go(func() (err error) {
			if conns[i], err = l.Net.Dial(t.Context(), 0, addr); err == nil {
				_, _ = io.WriteString(conns[i], texts[i%len(texts)]) // it may have had to give way
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	return conns
}
