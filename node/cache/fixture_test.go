package cache

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a cache whose clock, purges, log and configuration the test controls.
type rig struct {
	*Cache
	t      *testing.T
	dir    string
	ring   *keyring.Ring
	keys   []keyring.DataKey
	ahead  atomic.Int64 // how far the cache's clock is ahead, nanoseconds
	purges atomic.Pointer[agreed.CachePurges]
	logs   *log
	env    sync.Map // environment variables
	conf   *config.Config
	stop   func()
}

type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newRig makes a cache with the given shared tier, and with the directory, ring and clock
// of like, unless that is nil. It does not run yet.
func newRig(t *testing.T, like *rig, site config.SiteCache) *rig {
	t.Helper()
	r := &rig{t: t, logs: &log{}}
	if like == nil {
		r.dir = t.TempDir()
		r.ring, r.keys = keyringtest.New(t, 1)
	} else {
		r.dir, r.ring, r.keys = like.dir, like.ring, like.keys
		r.ahead.Store(like.ahead.Load())
	}
	r.purges.Store(&agreed.CachePurges{})
	var err error
	r.Cache, err = New(Options{
		Dir: r.dir, Site: "east", Ring: r.ring, Purges: r.purges.Load, OutboundBytes: 1 << 20,
		Files: Files{ReadFile: os.ReadFile, LookupEnv: func(name string) (string, bool) {
			v, ok := r.env.Load(name)
			text, _ := v.(string)
			return text, ok
		}},
		Logger: slog.New(slog.NewTextHandler(r.logs, nil)),
		Now:    func() time.Time { return time.Now().Add(time.Duration(r.ahead.Load())) },
	})
	if err != nil {
		t.Fatal(err)
	}
	r.conf = &config.Config{Cache: config.DefaultCache()}
	r.conf.Cache.Sites = map[string]config.SiteCache{"east": site}
	r.conf.Cache.SharedBytes = 16 << 20
	r.Configure(r.conf)
	return r
}

var (
	embeddedTier = config.SiteCache{Shared: config.SharedEmbedded}
	noTier       = config.SiteCache{Shared: config.SharedOff}
	life         = Life{Local: 10 * time.Minute, Shared: time.Hour, Stale: 24 * time.Hour}
)

// run starts the cache and waits until the shared tier is open.
func (r *rig) run() *rig {
	r.t.Helper()
	r.start()
	if r.want().site.Shared != config.SharedOff {
		eventually(r.t, "the shared tier is open", func() bool { return r.shared.Load() != nil })
	}
	return r
}

// start starts the cache.
func (r *rig) start() {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				r.t.Errorf("run: %v\n%s", err, r.logs)
			}
		})
	}
	r.t.Cleanup(r.stop)
}

func (r *rig) key(owner, body string) Key {
	r.t.Helper()
	k, ok := r.Key(&Question{Owner: owner, Endpoint: "/v1/chat/completions", Model: "m", Shape: Plain, Body: []byte(body)})
	if !ok {
		r.t.Fatal("no key")
	}
	return k
}

func plainAnswer(text string) *Answer {
	return &Answer{ContentType: "application/json", Body: []byte(text)}
}

// keep stores an answer and waits until it is in the shared tier.
func (r *rig) keep(k Key, a *Answer) {
	r.t.Helper()
	r.Keep(k, "m", a)
	again := time.Now().Add(time.Second)
	eventually(r.t, "the answer is written", func() bool {
		if time.Now().After(again) { // on a busy machine a write may time out
			again = time.Now().Add(time.Second)
			r.Keep(k, "m", a)
		}
		s := r.shared.Load()
		if s == nil {
			return false
		}
		v, err := s.get(r.t.Context(), k)
		if err != nil {
			return false
		}
		e, err := parseEntry(k, v) // an earlier answer may be there
		return err == nil && e.StoredAt.Equal(a.StoredAt) && e.Purge == a.Purge
	})
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("not after 20 s: %s", what)
		}
		<-tick.C
	}
}
