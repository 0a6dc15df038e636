//go:build linux

package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// Node is one dsnode process that can be hurt.
type Node struct {
	Name string
	Site *Site

	lab   *Lab
	ports ports
	// binary is another build than the lab has; see Use.
	binary string

	mu   sync.Mutex // guards cmd, done
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
}

type ports struct{ api, admin, gossip, rpc int }

// newPorts is how far RestartWithNewPorts moves.
const newPorts = 1000

func newNode(l *Lab, s *Site, index int) *Node {
	at := 10 * index
	return &Node{
		Name: fmt.Sprintf("%s-%d", s.Name, index+1), Site: s, lab: l,
		ports: ports{api: 8080 + at, admin: 8081 + at, gossip: 7956 + at, rpc: 7957 + at},
	}
}

// Start starts the process. It is an error of the test when it runs already.
func (n *Node) Start() {
	t := n.lab.t
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.runningLocked() {
		t.Fatalf("%s runs already", n.Name)
	}
	log, err := os.OpenFile(n.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }() // the process has its own descriptor
	cmd := exec.Command(n.program(), "run", "--config", filepath.Join(n.dir(), "node.yaml"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := n.lab.Net.Start(n.Site.Index, cmd); err != nil {
		t.Fatalf("start %s: %v", n.Name, err)
	}
	done := make(chan struct{})
	n.cmd, n.done = cmd, done
	go func() {
		_ = cmd.Wait() // how it ended is in the log, and most are killed
		close(done)
	}()
}

// Use makes the node run another build from its next start on; "" is the one
// that the lab has built.
func (n *Node) Use(binary string) { n.binary = binary }

func (n *Node) program() string {
	if n.binary != "" {
		return n.binary
	}
	return n.lab.binary
}

// Kill ends the process as a power failure does, and waits until it is gone.
func (n *Node) Kill() { n.signal(syscall.SIGKILL, 10*time.Second) }

// Terminate asks the process to drain and leave, and waits until it is gone.
func (n *Node) Terminate(within time.Duration) { n.signal(syscall.SIGTERM, within) }

// Stop freezes the process; its kernel still acknowledges what peers send.
func (n *Node) Stop() { n.signal(syscall.SIGSTOP, 0) }

// Continue ends a Stop.
func (n *Node) Continue() { n.signal(syscall.SIGCONT, 0) }

// Restart kills the process, if it lives, and starts it with the same files.
func (n *Node) Restart() {
	if n.Running() {
		n.Kill()
	}
	n.Start()
}

// RestartWithNewPorts comes back under the same name at other addresses.
func (n *Node) RestartWithNewPorts() {
	if n.Running() {
		n.Kill()
	}
	n.ports.api += newPorts
	n.ports.admin += newPorts
	n.ports.gossip += newPorts
	n.ports.rpc += newPorts
	n.writeConfig()
	n.Start()
}

// WipeDisk removes all that a node that does not run has kept.
func (n *Node) WipeDisk() {
	t := n.lab.t
	t.Helper()
	if n.Running() {
		t.Fatalf("%s runs: a disk is lost with its node down", n.Name)
	}
	if err := os.RemoveAll(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(n.DataDir(), 0o700); err != nil {
		t.Fatal(err)
	}
}

func (n *Node) signal(sig syscall.Signal, within time.Duration) {
	t := n.lab.t
	t.Helper()
	n.mu.Lock()
	cmd, done := n.cmd, n.done
	n.mu.Unlock()
	if cmd == nil {
		t.Fatalf("%s was never started", n.Name)
	}
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("send %v to %s: %v", sig, n.Name, err)
	}
	if within == 0 {
		return
	}
	select {
	case <-done:
	case <-time.After(within):
		t.Fatalf("%s still runs %s after %v", n.Name, within, sig)
	}
}

// Running is whether the process lives, stopped or not.
func (n *Node) Running() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.runningLocked()
}

func (n *Node) runningLocked() bool {
	if n.cmd == nil {
		return false
	}
	select {
	case <-n.done:
		return false
	default:
		return true
	}
}

// PID of the process, 0 before the first start.
func (n *Node) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return 0
	}
	return n.cmd.Process.Pid
}

// end kills without a word; for the end of a test.
func (n *Node) end() {
	n.mu.Lock()
	cmd, done := n.cmd, n.done
	n.mu.Unlock()
	if cmd != nil {
		_ = cmd.Process.Kill() // it may have ended
		<-done
	}
}

// API is the node's base URL for clients of any site.
func (n *Node) API() string {
	return fmt.Sprintf("http://%s:%d", n.lab.Net.Addr(n.Site.Index), n.ports.api)
}

// AdminURL is for clients in the node's own site.
func (n *Node) AdminURL() string { return fmt.Sprintf("http://127.0.0.1:%d", n.ports.admin) }

// DataDir is the node's disk.
func (n *Node) DataDir() string { return filepath.Join(n.dir(), "data") }

// LogFile holds what the process wrote, all its starts.
func (n *Node) LogFile() string { return filepath.Join(n.dir(), "node.log") }

func (n *Node) dir() string { return filepath.Join(n.lab.dir, n.Name) }

// LogTail is the last lines of the log.
func (n *Node) LogTail(lines int) string {
	text, err := os.ReadFile(n.LogFile())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Status asks the node's admin port how the cluster is.
func (n *Node) Status(ctx context.Context) (admin.Status, error) {
	var s admin.Status
	text, err := n.get(ctx, n.AdminURL()+"/admin/v1/status")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("%s's status: %w", n.Name, err)
	}
	return s, nil
}

// ApplyConfig proposes a new cluster.yaml through this node.
func (n *Node) ApplyConfig(ctx context.Context, text string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, n.AdminURL()+"/admin/v1/config?author=lab", strings.NewReader(text))
	if err != nil {
		return err
	}
	_, err = n.ask(req)
	return err
}

// Metrics are the node's samples by series, as on the page:
// `dsnode_primary{site="beijing"}`.
func (n *Node) Metrics(ctx context.Context) (map[string]float64, error) {
	text, err := n.get(ctx, n.AdminURL()+"/metrics")
	if err != nil {
		return nil, err
	}
	samples := map[string]float64{}
	for s := bufio.NewScanner(strings.NewReader(string(text))); s.Scan(); {
		series, value, found := cutLast(s.Text(), " ")
		if !found || strings.HasPrefix(series, "#") {
			continue
		}
		if v, err := strconv.ParseFloat(value, 64); err == nil {
			samples[series] = v
		}
	}
	return samples, nil
}

func (n *Node) get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return n.ask(req)
}

// ask sends a request from within the node's site; anything but 2xx is an error.
func (n *Node) ask(req *http.Request) ([]byte, error) {
	resp, err := n.Site.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s answered %s: %s", req.Method, req.URL, resp.Status, text)
	}
	return text, nil
}

// AnonMemory is what the process holds in memory that no file backs, in bytes.
func (n *Node) AnonMemory(t testing.TB) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", n.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Anonymous:" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatalf("no Anonymous line in the memory map of %s", n.Name)
	return 0
}

// CPU is the user and system time that the process has used.
func (n *Node) CPU(t testing.TB) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.PID()))
	if err != nil {
		t.Fatal(err)
	}
	// After the name in parentheses, utime and stime are the 12th and 13th.
	_, rest, _ := cutLast(string(text), ")")
	f := strings.Fields(rest)
	if len(f) < 13 {
		t.Fatalf("stat of %s has %d fields", n.Name, len(f))
	}
	var ticks int64
	for _, field := range f[11:13] {
		v, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += v
	}
	return time.Duration(ticks) * 10 * time.Millisecond // Linux counts in 100ths for users
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
