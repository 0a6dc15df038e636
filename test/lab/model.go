//go:build linux

package lab

import (
	"context"
	"fmt"
	"sync"

	"github.com/dsnode/dsnode/node/modelsim"
)

// modelPort is the same in every site, since each has its own namespace.
const modelPort = 9000

// ModelServer is a site's simulated model server. It listens in the site and runs
// in the test's process, so that a test can read the requests that it got.
type ModelServer struct {
	*modelsim.Server

	lab  *Lab
	site *Site

	mu     sync.Mutex // guards cancel, done
	cancel context.CancelFunc
	done   chan struct{}
}

func newModelServer(l *Lab, s *Site) *ModelServer {
	return &ModelServer{lab: l, site: s, Server: modelsim.New(modelsim.Options{})}
}

// Start opens the port.
func (m *ModelServer) Start() {
	m.lab.t.Helper()
	ln, err := m.lab.Net.Listen(m.site.Index, modelPort)
	if err != nil {
		m.lab.t.Fatalf("start the model server of %s: %v", m.site.Name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	m.mu.Lock()
	m.cancel, m.done = cancel, done
	m.mu.Unlock()
	go func() {
		defer close(done)
		if err := m.Run(ctx, ln); err != nil {
			m.lab.t.Errorf("model server of %s: %v", m.site.Name, err)
		}
	}()
}

// Kill closes the port and all connections, as the end of a process does. Start
// starts the server again.
func (m *ModelServer) Kill() { m.end() }

func (m *ModelServer) end() {
	m.mu.Lock()
	cancel, done := m.cancel, m.done
	m.cancel, m.done = nil, nil
	m.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

func (m *ModelServer) name() string { return m.site.Name + "-sim" }

func (m *ModelServer) url() string {
	return fmt.Sprintf("http://%s:%d/v1", m.lab.Net.Addr(m.site.Index), modelPort)
}
