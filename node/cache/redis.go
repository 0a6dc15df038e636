package cache

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/dsnode/dsnode/cluster/config"
)

const (
	redisPrefix = "dsnode:cache:1:"
	redisConns  = 32
	// dialTime bounds the making of a connection, which goes on without the
	// command that wanted it: with TLS it may take longer than that one has.
	dialTime = 500 * time.Millisecond
)

// Files reads what the configuration points at.
type Files struct {
	LookupEnv func(string) (string, bool)
	ReadFile  func(string) ([]byte, error)
}

// remote is a Redis or Valkey of the site.
type remote struct {
	client redis.UniversalClient
	max    int // bytes of a value
}

// quiet ends go-redis's own lines on stderr, one for each failed dial: the breaker
// has a line of ours for each outage. Its logger is a global that no option
// replaces, and may be set only while nobody uses it.
var quiet sync.Once

func openRedis(conf config.Redis, maxValue int, files Files) (*remote, error) {
	quiet.Do(logging.Disable)
	at, err := conf.Addresses()
	if err != nil {
		return nil, fmt.Errorf("redis: %w", err)
	}
	o := &redis.UniversalOptions{
		Addrs: at.Hosts, DB: at.DB, Username: at.User, MasterName: conf.Master, IsClusterMode: conf.Mode == config.RedisCluster,
		ContextTimeoutEnabled: true, // off by default: a deadline would mean nothing
		DialTimeout:           dialTime, ReadTimeout: commandTime, WriteTimeout: commandTime, PoolTimeout: commandTime,
		// Another try would double the wait; a miss is cheaper.
		MaxRetries: -1, DialerRetries: 1, MaxRedirects: 2,
		PoolSize: redisConns, MaxActiveConns: redisConns, MaxConcurrentDials: redisConns, PipelinePoolSize: -1,
		ConnMaxIdleTime: time.Minute, DisableIdentity: true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	if o.Password, err = secret("password", conf.Password, files); err != nil {
		return nil, err
	}
	o.SentinelUsername = conf.SentinelUser
	if o.SentinelPassword, err = secret("sentinel_password", conf.SentinelPassword, files); err != nil {
		return nil, err
	}
	// One dialer for servers and sentinels. It heeds the context, which the
	// library's own does not once it speaks TLS.
	plain := &net.Dialer{Timeout: dialTime, KeepAlive: 15 * time.Second}
	o.Dialer = plain.DialContext
	if conf.Secure() {
		c, err := redisTLS(conf.TLS, files.ReadFile)
		if err != nil {
			return nil, err
		}
		// Without server_name each server is known by the host of its address.
		o.Dialer = (&tls.Dialer{NetDialer: plain, Config: c}).DialContext
	}
	if conf.Mode != config.RedisCluster {
		return &remote{client: redis.NewUniversalClient(o), max: maxValue}, nil
	}
	c := o.Cluster()
	c.DisableRoutingPolicies = true // or each server is asked for a list of all commands
	return &remote{client: redis.NewClusterClient(c), max: maxValue}, nil
}

func secret(what string, s config.Secret, files Files) (string, error) {
	if s.IsZero() {
		return "", nil
	}
	text, err := config.ResolveSecret(s, files.LookupEnv, files.ReadFile)
	if err != nil {
		return "", fmt.Errorf("redis %s: %w", what, err)
	}
	return text, nil
}

func redisTLS(t config.UpstreamTLS, readFile func(string) ([]byte, error)) (*tls.Config, error) {
	conf := &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: t.ServerName,
		InsecureSkipVerify: t.InsecureSkipVerify, //nolint:gosec // the operator wrote it
	}
	if t.CAFile != "" {
		pem, err := readFile(t.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read redis ca_file: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("redis ca_file %s holds no certificate in PEM", t.CAFile)
		}
	}
	if t.CertFile != "" {
		cert, err := readFile(t.CertFile)
		if err != nil {
			return nil, fmt.Errorf("read redis cert_file: %w", err)
		}
		key, err := readFile(t.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read redis key_file: %w", err)
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("redis cert_file and key_file: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}

func name(k Key) string { return redisPrefix + k.String() }

// get reads no more than an entry can have, whatever stands there.
func (r *remote) get(ctx context.Context, k Key) ([]byte, error) {
	value, err := r.client.GetRange(ctx, name(k), 0, int64(r.max)).Bytes()
	switch {
	case errors.Is(err, redis.Nil):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("redis: %w", err)
	case len(value) == 0:
		return nil, nil
	}
	return value, nil
}

// put writes one after the other, each within its own time: in a cluster they
// belong to different servers, and one that fails takes none of the others along.
func (r *remote) put(ctx context.Context, batch []Entry, keep time.Duration) error {
	var failed error
	for _, e := range batch {
		left := keep - time.Since(e.StoredAt)
		if left <= 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return errors.Join(failed, err)
		}
		if err := r.putOne(ctx, e, left); err != nil && failed == nil {
			failed = fmt.Errorf("redis: %w", err)
		}
	}
	return failed
}

// putOne looks first whether what is there is newer: what peers kept comes in any
// order. Between the look and the write another may come, which then lasts until
// the answer expires; it is no worse an answer.
func (r *remote) putOne(ctx context.Context, e Entry, keep time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	head, err := r.client.GetRange(ctx, name(e.Key), 0, entryHeader-1).Bytes()
	if err != nil && !errors.Is(err, redis.Nil) {
		return err
	}
	if at, ok := stampOf(head); ok && at.After(e.StoredAt) {
		return nil
	}
	return r.client.Set(ctx, name(e.Key), e.value(), keep).Err()
}

func (r *remote) drop(ctx context.Context, keys []Key) error {
	for _, k := range keys { // of different servers, in a cluster
		if err := r.client.Del(ctx, name(k)).Err(); err != nil {
			return fmt.Errorf("redis: %w", err)
		}
	}
	return nil
}

// sweep has nothing to do: each key has its own time.
func (*remote) sweep(context.Context, time.Time) error { return nil }

// ping looks for an entry: a server that loads its data, or a replica that was cut
// off, answers PING. A cluster is back when each of its masters is: asked for one
// key, it would seem back and gone in turns.
func (r *remote) ping(ctx context.Context) error {
	if c, ok := r.client.(*redis.ClusterClient); ok {
		err := c.ForEachMaster(ctx, func(ctx context.Context, one *redis.Client) error { return one.Ping(ctx).Err() })
		if err != nil {
			return fmt.Errorf("redis: %w", err)
		}
	}
	_, err := r.get(ctx, Key{})
	return err
}

func (*remote) size() (entries, bytes int64, known bool) { return 0, 0, false }

func (r *remote) close() error { return r.client.Close() }
