//go:build linux

package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
	"github.com/dsnode/dsnode/test/skip"
)

// deploy/haproxy.cfg works with a real haproxy: the primary's port follows the role
// through a switchover and the loss of a site, and the clients' port always serves.
func TestFailoverBehindHAProxy(t *testing.T) {
	program := haproxy(t)
	s := begin(t, lab.Topology{Nodes: []int{2, 2, 1}})
	balancer := startHAProxy(t, s.lab, program)
	first, epoch, _ := s.primary()

	begun := time.Now()
	if _, err := s.lab.Nodes()[2].Switchover(t.Context(), "beijing"); err != nil {
		t.Fatal(err)
	}
	s.awaitChange(begun, epoch+1, within(5*time.Second), s.lab.Nodes())
	balancer.wantPrimary("beijing")
	if failed := balancer.failures(port{clients, time.Time{}}); len(failed) > 0 {
		t.Errorf("a client failed in a switchover: %v", failed[0])
	}
	s.lab.WaitHealthy(within(returns))
	if _, err := s.lab.Nodes()[2].Switchover(t.Context(), first.Name); err != nil {
		t.Fatal(err)
	}
	balancer.wantPrimary(first.Name)
	s.lab.WaitHealthy(within(returns))

	_, epoch, _ = s.primary()
	fault := time.Now()
	first.Kill()
	c := s.awaitChange(fault, epoch+1, within(replaces), s.others(first))
	balancer.wantPrimary(c.site)
	s.continueLoad()
	// Requests that ran on the killed nodes fail. Once the balancer has seen a refused
	// connection, another site serves requests.
	if failed := balancer.failures(port{clients, fault.Add(within(time.Second))}); len(failed) > 0 {
		t.Errorf("%d clients failed after a site was lost, first: %v", len(failed), failed[0])
	}
	t.Logf("requests that failed when the site was lost: %d", len(balancer.failures(port{clients, fault})))
	t.Logf("the primary's port: %s", balancer.timeline(fault))
	balancer.wantRightSites(s.role)
	s.end(first)
}

func haproxy(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"haproxy", "/usr/sbin/haproxy", "/usr/local/sbin/haproxy"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	skip.Unless(t, false, "haproxy is not installed")
	return ""
}

// balancer is a haproxy in the third site, which keeps running, with a client at each
// of its ports that sends 20 requests per second.
type balancer struct {
	t  *testing.T
	at *lab.Site

	mu     sync.Mutex // guards asked
	asked  []balanced
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// balanced is one request through the balancer.
type balanced struct {
	port     int
	asked    time.Time
	answered time.Time
	site     string // of the node that answered
	err      error
}

const (
	clients = 8000
	primary = 8001
)

// port selects requests to a port that were sent after a time.
type port struct {
	number int
	since  time.Time
}

func startHAProxy(t *testing.T, l *lab.Lab, program string) *balancer {
	t.Helper()
	text, err := os.ReadFile("../deploy/haproxy.cfg")
	if err != nil {
		t.Fatal(err)
	}
	config := string(text)
	for i, sample := range []string{"10.0.0.5:8080", "10.0.0.6:8080", "10.1.0.5:8080", "10.1.0.6:8080", "10.2.0.5:8080"} {
		if strings.Count(config, sample) != 2 {
			t.Fatalf("deploy/haproxy.cfg names %s %d times, want once for each port", sample, strings.Count(config, sample))
		}
		config = strings.ReplaceAll(config, sample, strings.TrimPrefix(l.Nodes()[i].API(), "http://"))
	}
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	site := l.Sites[2]
	var log strings.Builder // read it only after Wait
	cmd := exec.Command(program, "-db", "-f", file)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := l.Net.Start(site.Index, cmd); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &balancer{t: t, at: site, cancel: cancel}
	t.Cleanup(func() {
		cancel()
		b.wg.Wait()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			lines := strings.Split(log.String(), "\n")
			t.Logf("--- end of haproxy's log\n%s", strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	})
	// haproxy counts every server as up until its first check of it, and asks them in turn.
	l.WaitFor(within(10*time.Second), "haproxy to serve on both ports and to have checked each server", func(ctx context.Context) error {
		first := b.ask(ctx, primary)
		for range l.Nodes() {
			if got := b.ask(ctx, primary); got.err != nil || got.site != first.site {
				return fmt.Errorf("at the primary's port answers %q, then %q: %w", first.site, got.site, errors.Join(first.err, got.err))
			}
		}
		return errors.Join(first.err, b.ask(ctx, clients).err)
	})
	for _, number := range []int{clients, primary} {
		b.wg.Go(func() {
			for tick := time.NewTicker(50 * time.Millisecond); ; {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				// Slow requests must not delay later ones.
				b.wg.Go(func() {
					ask, cancel := context.WithTimeout(context.Background(), 20*time.Second)
					defer cancel()
					got := b.ask(ask, number)
					b.mu.Lock()
					defer b.mu.Unlock()
					b.asked = append(b.asked, got)
				})
			}
		})
	}
	return b
}

// ask sends a request to a port: a completion to the clients', and to the primary's
// one whose answer names the site.
func (b *balancer) ask(ctx context.Context, number int) balanced {
	got := balanced{port: number, asked: time.Now()}
	method, path, body := http.MethodGet, "/healthz/live", ""
	if number == clients {
		method, path = http.MethodPost, "/v1/chat/completions"
		body = fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"Hello"}]}`, lab.FastModel)
	}
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://127.0.0.1:%d%s", number, path), strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := b.at.Client().Do(req)
	if err == nil {
		var text []byte
		text, err = io.ReadAll(resp.Body)
		_ = resp.Body.Close() // read to its end, or err says what was wrong
		var says struct{ Site string }
		switch {
		case err != nil:
		case resp.StatusCode != http.StatusOK:
			err = fmt.Errorf("answered %s: %.100s", resp.Status, text)
		case number == primary:
			err = json.Unmarshal(text, &says)
			got.site = says.Site
		}
	}
	got.answered, got.err = time.Now(), err
	return got
}

// wantPrimary waits until a site answers at the primary's port, which takes a health
// check after the site has begun to act.
func (b *balancer) wantPrimary(site string) {
	b.t.Helper()
	deadline := time.Now().Add(within(5 * time.Second))
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		got := b.ask(ctx, primary)
		cancel()
		if got.err == nil && got.site == site {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("at the primary's port answers %q, %v; want %s", got.site, got.err, site)
		}
	}
}

func (b *balancer) failures(p port) []error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var failed []error
	for _, a := range b.asked {
		if a.port == p.number && a.err != nil && a.asked.After(p.since) {
			failed = append(failed, fmt.Errorf("asked at %s: %w", a.asked.Format("15:04:05.000"), a.err))
		}
	}
	return failed
}

// timeline describes which sites answered at the primary's port, and since when.
func (b *balancer) timeline(since time.Time) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	slices.SortFunc(b.asked, func(x, y balanced) int { return x.asked.Compare(y.asked) })
	var words []string
	last := ""
	for _, a := range b.asked {
		if a.port != primary || a.asked.Before(since) {
			continue
		}
		now := a.site
		if a.err != nil {
			now = "none"
		}
		if now != last {
			words = append(words, fmt.Sprintf("%s at %.2f s", now, a.asked.Sub(since).Seconds()))
			last = now
		}
	}
	return strings.Join(words, ", ")
}

// wantRightSites fails the test if a site answered at the primary's port after
// another one had acted as primary for longer than a health check takes.
func (b *balancer) wantRightSites(role *lab.RoleWatch) {
	b.t.Helper()
	checked := within(time.Second)
	// The balancer may notice that a site acts before the watch does.
	noticed := within(250 * time.Millisecond)
	b.mu.Lock()
	defer b.mu.Unlock()
	runs := role.Runs()
	right := 0
	for _, a := range b.asked {
		if a.port != primary || a.err != nil {
			continue
		}
		var newest lab.Acting
		for _, r := range runs {
			if r.First.Answered.Before(a.asked.Add(-checked)) && r.Epoch >= newest.Epoch {
				newest = r
			}
		}
		later := slices.ContainsFunc(runs, func(r lab.Acting) bool {
			return r.Epoch > newest.Epoch && r.Site == a.site && r.First.Asked.Before(a.answered.Add(noticed))
		})
		if newest.Site != "" && a.site != newest.Site && !later {
			b.t.Errorf("at %s the primary's port was answered by %s; %s had acted since %s", a.asked.Format("15:04:05.000"), a.site, newest.Site, newest.First.Answered.Format("15:04:05.000"))
			return
		}
		right++
	}
	if right < 20 {
		b.t.Errorf("the primary's port answered only %d times", right)
	}
}
