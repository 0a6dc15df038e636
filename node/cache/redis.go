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

	"github.com/dsnode/dsnode/cluster"
)

const (
	redisPrefix = "dsnode:cache:1:"
	redisConns  = 32
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

func openRedis(conf cluster.Redis, maxValue int, files Files) (*remote, error) {
	quiet.Do(logging.Disable)
	at, err := conf.Addresses()
	if err != nil {
		return nil, fmt.Errorf("redis: %w", err)
	}
	o := &redis.UniversalOptions{
		Addrs: at.Hosts, DB: at.DB, Username: at.User, MasterName: conf.Master, IsClusterMode: conf.Mode == cluster.RedisCluster,
		ContextTimeoutEnabled: true, // off by default: a deadline would mean nothing
		DialTimeout:           commandTime, ReadTimeout: commandTime, WriteTimeout: commandTime, PoolTimeout: commandTime,
		// Another try would double the wait; a miss is cheaper.
		MaxRetries: -1, DialerRetries: 1, MaxRedirects: 2,
		PoolSize: redisConns, MaxActiveConns: redisConns, MaxConcurrentDials: redisConns, PipelinePoolSize: -1,
		ConnMaxIdleTime: time.Minute, DisableIdentity: true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		Dialer:                   (&net.Dialer{Timeout: commandTime, KeepAlive: 15 * time.Second}).DialContext,
	}
	if !conf.Password.IsZero() {
		if o.Password, err = cluster.ResolveSecret(conf.Password, files.LookupEnv, files.ReadFile); err != nil {
			return nil, fmt.Errorf("redis password: %w", err)
		}
	}
	if conf.Secure() {
		if o.TLSConfig, err = redisTLS(conf.TLS, at.Hosts[0], files.ReadFile); err != nil {
			return nil, err
		}
		// A dialer of ours would take the place of the one that speaks TLS.
		o.Dialer = nil
	}
	return &remote{client: redis.NewUniversalClient(o), max: maxValue}, nil
}

func redisTLS(t cluster.UpstreamTLS, address string, readFile func(string) ([]byte, error)) (*tls.Config, error) {
	conf := &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: t.ServerName,
		InsecureSkipVerify: t.InsecureSkipVerify, //nolint:gosec // the operator wrote it
	}
	if conf.ServerName == "" {
		conf.ServerName, _, _ = net.SplitHostPort(address) // checked by Addresses
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

// put writes one after the other, each within its own time. In a cluster they
// belong to different servers.
func (r *remote) put(ctx context.Context, batch []Entry, keep time.Duration) error {
	for _, e := range batch {
		left := keep - time.Since(e.StoredAt)
		if left <= 0 {
			continue
		}
		one, cancel := context.WithTimeout(ctx, commandTime)
		err := r.client.Set(one, name(e.Key), e.value(), left).Err()
		cancel()
		if err != nil {
			return fmt.Errorf("redis: %w", err)
		}
	}
	return nil
}

// sweep has nothing to do: each key has its own time.
func (*remote) sweep(context.Context, time.Time) error { return nil }

func (r *remote) ping(ctx context.Context) error {
	// A server that loads its data, or a replica that was cut off, answers PING.
	_, err := r.get(ctx, Key{})
	return err
}

func (*remote) size() (entries, bytes int64, known bool) { return 0, 0, false }

func (r *remote) close() error { return r.client.Close() }
