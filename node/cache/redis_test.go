package cache

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/test/skip"
)

// server is a real redis-server, or the program that DSNODE_TEST_REDIS names, such as
// valkey-server.
type server struct {
	t    *testing.T
	addr string
	dir  string
	args []string // in addition to those of all servers
	cmd  *exec.Cmd
}

func startRedis(t *testing.T, args ...string) *server {
	t.Helper()
	s := &server{t: t, addr: freeAddr(t), dir: t.TempDir(), args: args}
	s.start()
	return s
}

func redisBinary(t *testing.T) string {
	t.Helper()
	binary := cmp.Or(os.Getenv("DSNODE_TEST_REDIS"), "redis-server")
	path, err := exec.LookPath(binary)
	skip.Unless(t, err == nil, binary+" is not installed")
	return path
}

// freeAddr gives an address that is free now.
func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	return ln.Addr().String()
}

func portOf(t *testing.T, addr string) string {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func (s *server) start() {
	s.t.Helper()
	path, port := redisBinary(s.t), portOf(s.t, s.addr)
	args := []string{"--bind", "127.0.0.1", "--dir", s.dir, "--save", "", "--appendonly", "no", "--daemonize", "no"}
	if slices.Contains(s.args, "--tls-port") {
		args = append(args, "--port", "0")
	} else {
		args = append(args, "--port", port)
	}
	if i := slices.Index(s.args, "--sentinel"); i >= 0 {
		// A sentinel writes into the file that it is started with.
		conf := filepath.Join(s.dir, "sentinel.conf")
		text := "port " + port + "\nbind 127.0.0.1\ndir " + s.dir + "\n" + s.args[i+1]
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
		args = []string{conf, "--sentinel"}
	} else {
		args = append(args, s.args...)
	}
	s.cmd = exec.Command(path, args...)
	output := &log{}
	s.cmd.Stdout, s.cmd.Stderr = output, output
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		s.kill()
		if s.t.Failed() {
			s.t.Logf("output of %v:\n%s", args, output)
		}
	})
	eventually(s.t, "redis answers", func() bool {
		c, err := net.DialTimeout("tcp", s.addr, time.Second)
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
}

func (s *server) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill() // it may have ended
	_ = s.cmd.Wait()         // it was killed
	s.cmd = nil
}

func redisAt(addr string) config.SiteCache {
	return config.SiteCache{Shared: config.SharedRedis, Redis: config.Redis{URL: "redis://" + addr + "/1", Mode: config.RedisSingle}}
}

// TestRedis: Redis has the answers, sealed, with an expiry.
func TestRedis(t *testing.T) {
	s := startRedis(t)
	r := newRig(t, nil, redisAt(s.addr)).run()
	const canary = "canary-7f3a91"
	k := r.key("tenant "+canary, `{"prompt":"`+canary+`"}`)
	r.keep(k, streamed("data: "+canary+"\n\n", "data: [DONE]\n\n"))
	f, ok := r.Shared(t.Context(), k, "m", life)
	if !ok || !f.Fresh || string(f.Answer.Body) != "data: "+canary+"\n\ndata: [DONE]\n\n" || len(f.Answer.Ends) != 2 {
		t.Fatalf("%v %+v", ok, f)
	}
	client := redis.NewClient(&redis.Options{Addr: s.addr, DB: 1}) // without the cache's deadlines
	defer func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	}()
	names, err := client.Keys(t.Context(), "*").Result()
	if err != nil || len(names) != 1 || !strings.HasPrefix(names[0], redisPrefix) {
		t.Fatalf("%v %q", err, names)
	}
	value, err := client.Get(t.Context(), names[0]).Result()
	if err != nil || strings.Contains(names[0]+value, "canary") {
		t.Errorf("%v, in clear: %q", err, value)
	}
	if ttl := client.PTTL(t.Context(), names[0]).Val(); ttl < 24*time.Hour || ttl > 25*time.Hour {
		t.Errorf("kept for %s", ttl)
	}
	// A copy under another key is not used.
	other := r.key("tenant b", `{"prompt":"x"}`)
	if err := client.Set(t.Context(), redisKey(other), value, 0).Err(); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Shared(t.Context(), other, "m", life); ok {
		t.Error("the copy opens")
	}
	// A huge value is not read whole.
	if err := client.SetRange(t.Context(), redisKey(other), maxAnswer+2*maxOverhead, "x").Err(); err != nil {
		t.Fatal(err)
	}
	got, _ := r.shared.Load().store.get(t.Context(), other)
	if len(got) > maxAnswer+maxOverhead+1 {
		t.Errorf("%d bytes were read", len(got))
	}
	// It is sealed in a dump, too.
	if err := client.Save(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	dump, err := os.ReadFile(filepath.Join(s.dir, "dump.rdb"))
	if err != nil || strings.Contains(string(dump), "canary") {
		t.Errorf("%v, or in clear on disk", err)
	}
}

// TestRedisFails: when Redis fails, a few lookups take up to 60 ms, then the breaker opens
// and lookups take no time. When Redis is back, the breaker closes by itself.
func TestRedisFails(t *testing.T) {
	for _, c := range []struct {
		name       string
		harm, mend func(s *server)
	}{
		{"stopped", func(s *server) { s.kill() }, func(s *server) { s.start() }},
		{"frozen", func(s *server) { s.signal(syscall.SIGSTOP) }, func(s *server) { s.signal(syscall.SIGCONT) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startRedis(t)
			r := newRig(t, nil, redisAt(s.addr)).run()
			k := r.key("tenant a", `{"model":"m"}`)
			r.keep(k, plainAnswer("{}"))
			c.harm(s)
			r.wantNoWaiting(k)
			c.mend(s)
			eventually(t, "the breaker closes", func() bool { return !r.shared.Load().reads.isOpen() })
			r.keep(r.key("tenant a", `{"model":"n"}`), plainAnswer("{}"))
		})
	}
}

// TestRedisBlackHole: a server that accepts connections and never answers, and one whose
// packets are dropped, cost no more than one that is down.
func TestRedisBlackHole(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var accepted sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	accepted.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
		}
	})
	defer func() {
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
		accepted.Wait()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			_ = c.Close() // the other side is gone
		}
	}()
	for _, addr := range []string{ln.Addr().String(), fullBacklog(t)} {
		r := newRig(t, nil, redisAt(addr)).run()
		r.wantNoWaiting(r.key("tenant a", `{"model":"m"}`))
		r.stop()
	}
}

// fullBacklog gives the address of a listener whose backlog is full, so that the kernel
// drops packets to it.
func fullBacklog(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) }) // the test is over
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", sa.(*syscall.SockaddrInet4).Port) //nolint:errcheck,forcetypeassert // it was bound as such
	for range 16 {
		c, err := net.DialTimeout("tcp", addr, 100*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { _ = c.Close() }) // the test is over
	}
	t.Fatal("the backlog does not fill up")
	return ""
}

// wantNoWaiting looks a key up while the tier fails, and wants the breaker to open.
func (r *rig) wantNoWaiting(k Key) {
	r.t.Helper()
	// A lookup ends after 50 ms. Ten times that is only exceeded by one that waits for the
	// store, which never answers.
	const allowed = 500 * time.Millisecond
	var first []time.Duration
	for range 20 {
		begun := time.Now()
		if _, ok := r.Shared(r.t.Context(), k, "m", life); ok {
			r.t.Fatal("a hit")
		}
		first = append(first, time.Since(begun))
		if r.shared.Load().reads.isOpen() {
			break
		}
	}
	if !r.shared.Load().reads.isOpen() {
		r.t.Fatalf("the breaker is closed after %v", first)
	}
	late := 0 // on a busy machine a few are
	for _, d := range first {
		if d > allowed {
			late++
		}
	}
	if late > len(first)/2 {
		r.t.Errorf("the first lookups took %v", first)
	}
	// Now neither lookups nor writes wait.
	var most, all time.Duration
	for range 200 {
		begun := time.Now()
		_, _ = r.Shared(r.t.Context(), k, "m", life)
		r.Keep(k, "m", plainAnswer("{}"))
		took := time.Since(begun)
		all += took
		most = max(most, took)
	}
	if mean := all / 200; mean > 10*time.Millisecond { // each would wait 50 ms
		r.t.Errorf("with an open breaker a lookup takes %s, at most %s", mean, most)
	}
	r.t.Logf("the first lookups took %v, later ones %s on average, %s at most", first, all/200, most)
}

// TestHangingTier: lookups end although the store ignores their context, and they hold
// no more goroutines than the bound.
func TestHangingTier(t *testing.T) {
	r := newRig(t, nil, noTier)
	release := make(chan struct{})
	defer close(release)
	s := newShared(hanging{release}, func(bool, error) {}, func(bool, error) {})
	r.shared.Store(s)
	defer r.shared.Store(nil)
	k := r.key("tenant a", "{}")
	var group sync.WaitGroup
	for range 2 * maxCommands {
		group.Go(func() {
			if _, ok := r.Shared(t.Context(), k, "m", life); ok {
				t.Error("an answer")
			}
		})
	}
	group.Wait()
	if n := len(s.slots); n > maxCommands {
		t.Errorf("%d commands hang", n)
	}
	if !s.reads.isOpen() {
		t.Error("the breaker is closed")
	}
	// A client that goes away is not a failure of the tier.
	fresh := newShared(hanging{release}, func(bool, error) {}, func(bool, error) {})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 10 {
		_, _ = fresh.get(ctx, k)
	}
	if fresh.reads.isOpen() {
		t.Error("clients that went away opened the breaker")
	}
}

type hanging struct{ until chan struct{} }

func (h hanging) get(context.Context, Key) ([]byte, error)          { <-h.until; return nil, nil }
func (h hanging) put(context.Context, []Entry, time.Duration) error { <-h.until; return nil }
func (h hanging) drop(context.Context, []Key) error                 { <-h.until; return nil }
func (h hanging) sweep(context.Context, time.Time) error            { <-h.until; return nil }
func (h hanging) ping(context.Context) error                        { <-h.until; return nil }
func (hanging) size() (entries, bytes int64, known bool)            { return 0, 0, false }
func (hanging) close() error                                        { return nil }
