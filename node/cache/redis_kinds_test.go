package cache

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/dsnode/dsnode/cluster/config"
)

// client gives a client of the server without the cache's deadlines.
func (s *server) client(o redis.Options) *redis.Client {
	o.Addr, o.MaintNotificationsConfig = s.addr, nil
	c := redis.NewClient(&o)
	s.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return c
}

func (s *server) do(c *redis.Client, args ...any) string {
	s.t.Helper()
	v, err := c.Do(context.WithoutCancel(s.t.Context()), args...).Result()
	if err != nil {
		s.t.Fatalf("%v: %v", args, err)
	}
	return fmt.Sprint(v)
}

// keepMany keeps answers to n questions and gives their keys.
func (r *rig) keepMany(n int) []Key {
	r.t.Helper()
	var keys []Key
	for i := range n {
		k := r.key("tenant a", fmt.Sprintf(`{"i":%d,"at":%d}`, i, time.Now().UnixNano()))
		r.Keep(k, "m", plainAnswer(fmt.Sprintf(`{"i":%d}`, i)))
		keys = append(keys, k)
	}
	return keys
}

// wantAll waits until all keys are hits.
func (r *rig) wantAll(what string, keys []Key) {
	r.t.Helper()
	again := time.Now().Add(time.Second)
	eventually(r.t, what, func() bool {
		late := time.Now().After(again)
		for _, k := range keys {
			if _, ok := r.Shared(r.t.Context(), k, "m", life); ok {
				continue
			}
			if f, ok := r.Local(k, "m", life); late && ok { // on a busy machine a write may time out
				again = time.Now().Add(time.Second)
				r.writes.Offer(pendingWrite{key: k, answer: f.Answer})
			}
			return false
		}
		return true
	})
}

func (r *rig) wantState(state string) {
	r.t.Helper()
	eventually(r.t, "the shared tier is "+state, func() bool { return r.Stats().Shared.State == state })
}

// TestRedisSentinel: the master that the sentinels name is used, with a user and
// passwords for it and for them. When it dies, the new master is used.
func TestRedisSentinel(t *testing.T) {
	t.Parallel()
	auth := []string{
		"--user", "dsnode", "on", ">hunter2", "~dsnode:cache:*", "+getrange", "+set", "+del",
		"--repl-diskless-sync-delay", "0", "--repl-timeout", "5",
	}
	first := startRedis(t, auth...)
	second := startRedis(t, append(auth, "--replicaof", "127.0.0.1", portOf(t, first.addr))...)
	to := second.client(redis.Options{})
	eventually(t, "the replica follows", func() bool { return strings.Contains(second.do(to, "info", "replication"), "master_link_status:up") })
	watch := startRedis(t, "--sentinel", "requirepass s3ntinel\nsentinel monitor cache 127.0.0.1 "+portOf(t, first.addr)+" 1\n"+
		"sentinel down-after-milliseconds cache 300\nsentinel failover-timeout cache 5000\n")
	sentinel := watch.client(redis.Options{Password: "s3ntinel"})
	eventually(t, "the sentinel knows the replica", func() bool {
		return strings.Contains(watch.do(sentinel, "sentinel", "replicas", "cache"), portOf(t, second.addr))
	})
	conf := config.SiteCache{Shared: config.SharedRedis, Redis: config.Redis{
		URL:  "redis://dsnode@" + freeAddr(t) + "/0?addr=" + watch.addr, // the first sentinel is down
		Mode: config.RedisSentinel, Master: "cache", Password: config.Secret{Env: "R"}, SentinelPassword: config.Secret{Env: "S"},
	}}
	r := newRig(t, nil, conf)
	r.env.Store("R", "hunter2")
	r.env.Store("S", "s3ntinel")
	r.run()
	r.wantState("ok")
	before := r.keepMany(20)
	r.wantAll("answers are kept", before)
	eventually(t, "the replica has them", func() bool { return second.do(to, "dbsize") == "20" })

	first.kill()
	r.wantNoWaiting(r.key("tenant a", `{"not":"there"}`))
	r.wantAll("the new master is used", before)
	r.wantAll("the new master is written to", r.keepMany(5))
	if !strings.Contains(second.do(to, "role"), "master") {
		t.Error("the replica is not the master")
	}
}

// TestRedisCluster: each key goes to its server, also while its slot moves. A server that
// dies opens the breaker of the whole tier, until its replica has taken over.
func TestRedisCluster(t *testing.T) {
	t.Parallel()
	var servers []*server
	var to []*redis.Client
	for range 4 {
		s := startRedis(t, "--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-allow-replica-migration", "no", "--repl-diskless-sync-delay", "0")
		servers, to = append(servers, s), append(to, s.client(redis.Options{}))
	}
	id := func(i int) string { return servers[i].do(to[i], "cluster", "myid") }
	for i, span := range [][2]int{{0, 5460}, {5461, 10922}, {10923, 16383}} {
		servers[i].do(to[i], "cluster", "set-config-epoch", i+1)
		servers[i].do(to[i], "cluster", "addslotsrange", span[0], span[1])
	}
	for i := 1; i < len(servers); i++ {
		servers[i].do(to[i], "cluster", "meet", "127.0.0.1", portOf(t, servers[0].addr))
	}
	eventually(t, "all servers know each other", func() bool {
		for i, s := range servers {
			if !strings.Contains(s.do(to[i], "cluster", "info"), "cluster_known_nodes:4") {
				return false
			}
		}
		return true
	})
	eventually(t, "the fourth follows the third", func() bool {
		return to[3].Do(t.Context(), "cluster", "replicate", id(2)).Err() == nil
	})
	eventually(t, "the cluster works", func() bool {
		for i, s := range servers {
			if !strings.Contains(s.do(to[i], "cluster", "info"), "cluster_state:ok") {
				return false
			}
		}
		return strings.Contains(servers[3].do(to[3], "info", "replication"), "master_link_status:up")
	})
	r := newRig(t, nil, config.SiteCache{Shared: config.SharedRedis, Redis: config.Redis{
		URL: "redis://" + servers[0].addr + "?addr=" + servers[1].addr, Mode: config.RedisCluster,
	}}).run()
	r.wantState("ok")
	keys := r.keepMany(60)
	r.wantAll("answers are kept", keys)
	for i := range 3 {
		if servers[i].do(to[i], "dbsize") == "0" {
			t.Errorf("server %d has none of them", i)
		}
	}

	// A slot of the first server moves to the second, with its keys.
	var moved Key
	slot := int64(-1)
	for _, k := range keys {
		if n, err := to[0].ClusterKeySlot(t.Context(), redisKey(k)).Result(); err == nil && n <= 5460 {
			moved, slot = k, n
			break
		}
	}
	servers[1].do(to[1], "cluster", "setslot", slot, "importing", id(0))
	servers[0].do(to[0], "cluster", "setslot", slot, "migrating", id(1))
	servers[0].do(to[0], "migrate", "127.0.0.1", portOf(t, servers[1].addr), redisKey(moved), 0, 1000)
	if _, ok := r.Shared(t.Context(), moved, "m", life); !ok {
		t.Error("a miss while the slot moves")
	}
	for _, i := range []int{1, 0} {
		servers[i].do(to[i], "cluster", "setslot", slot, "node", id(1))
	}
	r.wantAll("a moved slot is followed", keys)

	eventually(t, "the replica has the third's", func() bool { return servers[3].do(to[3], "dbsize") == servers[2].do(to[2], "dbsize") })
	servers[2].kill()
	slow, most := 0, time.Duration(0)
	eventually(t, "the breaker opens although two of three servers answer", func() bool {
		for _, k := range keys {
			begun := time.Now()
			_, _ = r.Shared(t.Context(), k, "m", life)
			took := time.Since(begun)
			most = max(most, took)
			if took > 500*time.Millisecond { // each lookup ends after 50 ms
				slow++
			}
		}
		return r.shared.Load().reads.isOpen()
	})
	if slow > 5 {
		t.Errorf("%d lookups took more than 60 ms, one %s", slow, most)
	}
	servers[3].do(to[3], "cluster", "failover", "takeover")
	r.wantAll("the replica is used", keys)
	r.wantState("ok")
}

// authority issues certificates for the test's servers.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key = a.issue("ca", nil)
	return a
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) issue(name string, by *authority) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	is := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: by == nil,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	parent, signer := is, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, is, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for file, b := range map[string]*pem.Block{name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(a.file(file), pem.EncodeToMemory(b), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// TestRedisTLS: a server that wants a certificate and a password is used with them. With
// wrong ones or without, it is not used, the reason is reported, and no lookup waits.
func TestRedisTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	ca.issue("server", ca)
	ca.issue("node", ca)
	addr := freeAddr(t)
	s := &server{t: t, addr: addr, dir: t.TempDir(), args: []string{
		"--tls-port", portOf(t, addr), "--tls-cert-file", ca.file("server.pem"), "--tls-key-file", ca.file("server.key"),
		"--tls-ca-cert-file", ca.file("ca.pem"), "--requirepass", "hunter2",
	}}
	s.start()
	at := func(change func(*config.Redis)) config.SiteCache {
		c := config.Redis{
			URL: "rediss://" + addr + "/2", Mode: config.RedisSingle, Password: config.Secret{Env: "R"},
			TLS: config.UpstreamTLS{CAFile: ca.file("ca.pem"), CertFile: ca.file("node.pem"), KeyFile: ca.file("node.key")},
		}
		change(&c)
		return config.SiteCache{Shared: config.SharedRedis, Redis: c}
	}
	other := newAuthority(t)
	for _, c := range []struct {
		name   string
		change func(*config.Redis)
		why    string
	}{
		{"all right", func(*config.Redis) {}, ""},
		{"another authority", func(c *config.Redis) { c.TLS.CAFile = other.file("ca.pem") }, "certificate signed by unknown authority"},
		{"another name", func(c *config.Redis) { c.TLS.ServerName = "redis.example.org" }, "redis.example.org"},
		{"no client certificate", func(c *config.Redis) { c.TLS.CertFile, c.TLS.KeyFile = "", "" }, "certificate required"},
		{"a wrong password", func(c *config.Redis) { c.Password.Env = "WRONG" }, "WRONGPASS"},
		{"no password", func(c *config.Redis) { c.Password = config.Secret{} }, "NOAUTH"},
		{"a password that is not there", func(c *config.Redis) { c.Password.Env = "NOWHERE" }, "NOWHERE"},
		{"without TLS", func(c *config.Redis) { c.URL = "redis://" + addr + "/2" }, "redis: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, nil, at(c.change))
			r.env.Store("R", "hunter2")
			r.env.Store("WRONG", "hunter3")
			if c.why == "" {
				r.run()
				r.wantState("ok")
				r.wantAll("answers are kept", r.keepMany(3))
				return
			}
			r.start()
			eventually(t, "the reason is reported", func() bool {
				return strings.Contains(r.Stats().Shared.Reason, c.why) && strings.Contains(r.logs.String(), c.why)
			})
			if text := r.logs.String() + r.Stats().Shared.Reason; strings.Contains(text, "hunter") {
				t.Errorf("a password is in: %s", text)
			}
			k := r.key("tenant a", "{}")
			begun := time.Now()
			for range 100 {
				if _, ok := r.Shared(t.Context(), k, "m", life); ok {
					t.Error("an answer")
				}
			}
			if took := time.Since(begun); took > time.Second { // 100 lookups that wait take 5 s
				t.Errorf("100 lookups took %s", took)
			}
		})
	}
}
