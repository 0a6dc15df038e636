//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestDevFromStartToEnd uses the real binary: start it, send requests, kill a node and a
// model server, start the node again, end dev, and start it again.
func TestDevFromStartToEnd(t *testing.T) {
	exe := buildDsnode(t)
	port := freeBasePort(t)
	data := filepath.Join(t.TempDir(), "cluster")
	cache := t.TempDir()
	start := func(args ...string) *transcript {
		return startDsnode(t, cache, exe, append([]string{"dev", "--data-dir", data, "--base-port", fmt.Sprint(port)}, args...)...)
	}
	api := func(site int) string { return fmt.Sprintf("http://127.0.0.1:%d", port+100*site+1) }

	dev := start()
	up := dev.waitFor(t, 60*time.Second, `3 sites are up after ([0-9.]+) s`)
	t.Logf("healthy after %s s", up[1])
	for site := range 3 {
		for _, stream := range []bool{false, true} {
			if by, err := askDev(api(site), stream); err != nil || by != devSites[site].name {
				t.Errorf("site %d, stream %v: answered by %q, %v", site, stream, by, err)
			}
		}
	}
	// The CLI finds the cluster without --admin.
	if out, err := dsnode(cache, exe, "status", "-o", "json"); err != nil || !strings.Contains(out, `"healthy": true`) && !strings.Contains(out, `"healthy":true`) {
		t.Errorf("status: %v\n%s", err, out)
	}

	// A node is killed; the printed command starts it again.
	node := dev.waitFor(t, 10*time.Second, `(?m)^beijing-1 .* (\d+)$`)
	kill9(t, node[1])
	back := dev.waitFor(t, 20*time.Second, `Node beijing-1 \(pid \d+\) has ended: .*Start it again with\n  (.*)\n`)
	replacement := startDsnode(t, cache, strings.Fields(back[1])[0], strings.Fields(back[1])[1:]...)
	waitHealthy(t, cache, exe, 20*time.Second)

	// A model server is killed; the next site answers its clients.
	sim := dev.waitFor(t, 10*time.Second, `(?m)^shanghai-a's model server .* (\d+)$`)
	kill9(t, sim[1])
	dev.waitFor(t, 20*time.Second, `The model server of shanghai-a \(pid \d+\) has ended: .*Start it again with\n  (.*)\n`)
	for _, stream := range []bool{false, true} {
		if by, err := askDev(api(0), stream); err != nil || by != "shanghai-b" {
			t.Errorf("without its model server, stream %v: answered by %q, %v; want the same city", stream, by, err)
		}
	}

	// Ctrl-C ends all processes, also the node that was started by hand.
	dev.interrupt(t)
	if err := dev.wait(t, 20*time.Second); err != nil {
		t.Errorf("dev ended with %v", err)
	}
	if err := replacement.wait(t, 20*time.Second); err != nil {
		t.Errorf("the node that was started by hand ended with %v", err)
	}
	if pids := processesOf(t, exe); len(pids) > 0 {
		t.Errorf("processes left behind: %v", pids)
	}
	if _, err := os.Stat(filepath.Join(cache, "dsnode", "dev.json")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the record of the running cluster is still there: %v", err)
	}

	// The same directory starts the same cluster.
	again := start()
	again.waitFor(t, 60*time.Second, `3 sites are up after`)
	if by, err := askDev(api(2), false); err != nil || by != "beijing" {
		t.Errorf("after a restart: answered by %q, %v", by, err)
	}
	// A second dev on the same ports is refused and does not disturb the first.
	second := startDsnode(t, t.TempDir(), exe, "dev", "--base-port", fmt.Sprint(port))
	if err := second.wait(t, 20*time.Second); err == nil || !strings.Contains(second.text(), "are in use") {
		t.Errorf("a second dev on the same ports: %v\n%s", err, second.text())
	}
	waitHealthy(t, cache, exe, 20*time.Second)

	// The children of a killed dev end.
	if err := again.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := again.wait(t, 20*time.Second); err == nil {
		t.Error("a killed dev ended without an error")
	}
	if !waitFor(20*time.Second, func() bool { return len(processesOf(t, exe)) == 0 }) {
		t.Errorf("processes outlived a killed dev: %v", processesOf(t, exe))
	}
}

func buildDsnode(t *testing.T) string {
	t.Helper()
	exe := filepath.Join(t.TempDir(), "dsnode")
	cmd := exec.Command("go", "build", "-o", exe, ".")
	// Without the race detector, as users run it: the test checks times.
	cmd.Env = append(os.Environ(), "GOFLAGS="+strings.ReplaceAll(os.Getenv("GOFLAGS"), "-race", ""))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return exe
}

// freeBasePort finds a base port whose ports are all free.
func freeBasePort(t *testing.T) int {
	t.Helper()
	for range 50 {
		p := plan(t, devFlags{nodesPerSite: 1, basePort: 10000 + rand.IntN(200)*100})
		if p.checkPorts() == nil {
			return p.record.BasePort
		}
	}
	t.Fatal("found no free range of ports")
	return 0
}

// transcript is a running program and its output so far, stdout and stderr.
type transcript struct {
	cmd   *exec.Cmd
	begun time.Time
	ended chan struct{}
	err   error // of Wait; read after ended is closed

	mu  sync.Mutex // guards out
	out bytes.Buffer
}

func (p *transcript) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *transcript) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

func startDsnode(t *testing.T, cache, exe string, args ...string) *transcript {
	t.Helper()
	p := &transcript{cmd: exec.Command(exe, args...), begun: time.Now(), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+cache)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it has ended, unless the test failed
		<-p.ended
		if t.Failed() {
			t.Logf("--- dsnode %s\n%s", strings.Join(args, " "), p.text())
		}
	})
	return p
}

func (p *transcript) waitFor(t *testing.T, within time.Duration, pattern string) []string {
	t.Helper()
	expr := regexp.MustCompile(pattern)
	var match []string
	if !waitFor(within, func() bool {
		match = expr.FindStringSubmatch(p.text())
		return match != nil || closed(p.ended)
	}) || match == nil {
		t.Fatalf("%q was not printed within %v:\n%s", pattern, within, p.text())
	}
	return match
}

func (p *transcript) interrupt(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
}

func (p *transcript) wait(t *testing.T, within time.Duration) error {
	t.Helper()
	if !waitFor(within, func() bool { return closed(p.ended) }) {
		t.Fatalf("still running after %v:\n%s", within, p.text())
	}
	return p.err
}

func dsnode(cache, exe string, args ...string) (string, error) {
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+cache)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func waitHealthy(t *testing.T, cache, exe string, within time.Duration) {
	t.Helper()
	var out string
	if !waitFor(within, func() (ok bool) {
		var err error
		out, err = dsnode(cache, exe, "status")
		return err == nil
	}) {
		t.Fatalf("not healthy within %v:\n%s", within, out)
	}
}

// askDev sends one request and returns the site whose model server answered.
func askDev(base string, stream bool) (site string, err error) {
	body := fmt.Sprintf(`{"model":"deepseek-chat","stream":%v,"messages":[{"role":"user","content":"Hello"}]}`, stream)
	client := &http.Client{Timeout: 15 * time.Second}
	resp, err := client.Post(base+"/v1/chat/completions", "application/json", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return "", err
	}
	switch {
	case resp.StatusCode != http.StatusOK:
		return "", fmt.Errorf("%s: %s", resp.Status, text)
	case stream && !bytes.HasSuffix(bytes.TrimSpace(text), []byte("data: [DONE]")):
		return "", fmt.Errorf("the stream does not end with [DONE]: %s", text)
	case !stream && !json.Valid(text):
		return "", fmt.Errorf("not JSON: %s", text)
	}
	return resp.Header.Get("X-Dsnode-Site"), nil
}

func kill9(t *testing.T, pid string) {
	t.Helper()
	if out, err := exec.Command("kill", "-9", pid).CombinedOutput(); err != nil {
		t.Fatalf("kill -9 %s: %v %s", pid, err, out)
	}
}

// processesOf lists the processes that run this binary.
func processesOf(t *testing.T, exe string) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var pids []string
	for _, e := range entries {
		if at, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe")); err == nil && at == exe {
			pids = append(pids, e.Name())
		}
	}
	return pids
}
