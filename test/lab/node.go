//go:build linux

package lab

import (
	"bufio"
	"cmp"
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

	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/node/admin"
)

// Node is one dsnode, with its process and its disk.
type Node struct {
	Name string
	Site *Site

	lab   *Lab
	ports ports
	// binary overrides Topology.Binary if set; see Use.
	binary string
	// edit changes node.yaml after Topology.Node has; see Configure.
	edit func(*node.Config)

	mu   sync.Mutex // guards cmd, done
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
}

type ports struct{ api, admin, gossip, rpc int }

// newPorts is what RestartWithNewPorts adds to each port.
const newPorts = 1000

func newNode(l *Lab, s *Site, index int) *Node {
	at := 10 * index
	return &Node{
		Name: fmt.Sprintf("%s-%d", s.Name, index+1), Site: s, lab: l,
		ports: ports{api: 8080 + at, admin: 8081 + at, gossip: 7956 + at, rpc: 7957 + at},
	}
}

// Start starts the process. The test fails when it runs already.
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
	cmd := exec.Command(cmp.Or(n.binary, n.lab.top.Binary), "run", "--config", filepath.Join(n.dir(), "node.yaml"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := n.lab.Net.Start(n.Site.Index, cmd); err != nil {
		t.Fatalf("start %s: %v", n.Name, err)
	}
	done := make(chan struct{})
	n.cmd, n.done = cmd, done
	go func() {
		_ = cmd.Wait() // most are killed; for others the log has the reason
		close(done)
	}()
}

// Use makes the node run another binary from its next start on.
func (n *Node) Use(binary string) { n.binary = binary }

// Configure writes the node's node.yaml again, with an edit that replaces that of an
// earlier call. It counts from the next start on. Nil: no edit.
func (n *Node) Configure(edit func(*node.Config)) {
	n.lab.t.Helper()
	n.edit = edit
	n.writeConfig()
}

// Kill sends SIGKILL and waits until the process has ended.
func (n *Node) Kill() { n.signal(syscall.SIGKILL, 10*time.Second) }

// Terminate sends SIGTERM, on which the process drains, and waits until it has ended.
func (n *Node) Terminate(within time.Duration) { n.signal(syscall.SIGTERM, within) }

// Stop sends SIGSTOP. The kernel still acknowledges what peers send to the process.
func (n *Node) Stop() { n.signal(syscall.SIGSTOP, 0) }

// Continue sends SIGCONT.
func (n *Node) Continue() { n.signal(syscall.SIGCONT, 0) }

// Restart kills the process if it runs, and starts it again with the same files.
func (n *Node) Restart() {
	if n.Running() {
		n.Kill()
	}
	n.Start()
}

// RestartWithNewPorts restarts the node under the same name on other ports.
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

// WipeDisk removes the data of a node that does not run.
func (n *Node) WipeDisk() {
	t := n.lab.t
	t.Helper()
	if n.Running() {
		t.Fatalf("%s runs: kill it before its disk is wiped", n.Name)
	}
	if err := os.RemoveAll(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(n.DataDir(), 0o700); err != nil {
		t.Fatal(err)
	}
}

// LoseDisk kills the node, and starts it again with an empty disk.
func (n *Node) LoseDisk() {
	n.Kill()
	n.WipeDisk()
	n.Start()
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

// Running reports whether the process exists, also a stopped one.
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

// PID returns the process id, 0 before the first start.
func (n *Node) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return 0
	}
	return n.cmd.Process.Pid
}

// end kills the process at the end of a test, if it runs.
func (n *Node) end() {
	n.mu.Lock()
	cmd, done := n.cmd, n.done
	n.mu.Unlock()
	if cmd != nil {
		_ = cmd.Process.Kill() // fails if it has ended
		<-done
	}
}

// API returns the node's base URL for clients of all sites.
func (n *Node) API() string {
	return fmt.Sprintf("http://%s:%d", n.lab.Net.Addr(n.Site.Index), n.ports.api)
}

// AdminURL returns the base URL of the admin port, for clients in the node's site.
func (n *Node) AdminURL() string { return fmt.Sprintf("http://127.0.0.1:%d", n.ports.admin) }

// DataDir returns the directory with the node's data.
func (n *Node) DataDir() string { return filepath.Join(n.dir(), "data") }

// LogFile returns the file with the output of all the node's processes.
func (n *Node) LogFile() string { return filepath.Join(n.dir(), "node.log") }

func (n *Node) dir() string { return filepath.Join(n.lab.dir, n.Name) }

// LogTail returns the last lines of the log.
func (n *Node) LogTail(lines int) string {
	text, err := os.ReadFile(n.LogFile())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Status asks the node's admin port for the status.
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

// ConfigText returns the agreed cluster.yaml.
func (n *Node) ConfigText(ctx context.Context) (string, error) {
	answer, err := n.get(ctx, n.AdminURL()+"/admin/v1/config")
	if err != nil {
		return "", err
	}
	var c admin.ConfigVersion
	if err := json.Unmarshal(answer, &c); err != nil {
		return "", fmt.Errorf("%s's configuration: %w", n.Name, err)
	}
	return c.Text, nil
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

// Metrics returns the node's samples by series, such as
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

// ask sends a request from within the node's site. A status other than 2xx is an
// error.
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

// AnonMemory returns the process's anonymous memory in bytes.
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

// CPU returns the user and system time that the process has used.
func (n *Node) CPU(t testing.TB) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.PID()))
	if err != nil {
		t.Fatal(err)
	}
	// utime and stime are fields 12 and 13 after the name, which is in parentheses.
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
	return time.Duration(ticks) * 10 * time.Millisecond // the kernel reports hundredths of a second
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
