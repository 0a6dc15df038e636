package cache

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/cluster/config"
)

const (
	redisPrefix = "dsnode:cache:1:"
	redisConns  = 32
	// dialTime bounds the dialling of a connection. With TLS it may take longer than a
	// command has, so it continues after the command has failed.
	dialTime = 500 * time.Millisecond
)

// Files reads the files and environment variables that the configuration names.
type Files struct {
	LookupEnv func(string) (string, bool)
	ReadFile  func(string) ([]byte, error)
}

// redisStore is a shared tier in the site's Redis or Valkey.
type redisStore struct {
	client redis.UniversalClient
	max    int // bytes of a value
}

// silenceClient disables go-redis's own logging to stderr, which has a line for each
// failed dial; the breaker logs each outage once. The library's logger is global, and
// may be set only while no client is in use.
var silenceClient sync.Once

func openRedis(conf config.Redis, maxValue int, files Files) (*redisStore, error) {
	silenceClient.Do(logging.Disable)
	at, err := conf.Addresses()
	if err != nil {
		return nil, fmt.Errorf("redis: %w", err)
	}
	o := &redis.UniversalOptions{
		Addrs: at.Hosts, DB: at.DB, Username: at.User, MasterName: conf.Master, IsClusterMode: conf.Mode == config.RedisCluster,
		ContextTimeoutEnabled: true, // off by default: a deadline would mean nothing
		DialTimeout:           dialTime, ReadTimeout: commandTime, WriteTimeout: commandTime, PoolTimeout: commandTime,
		// A miss costs less than a retry, which doubles the wait.
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
	// One dialer for servers and sentinels. The library's own dialer ignores the
	// context during a TLS handshake.
	plain := &net.Dialer{Timeout: dialTime, KeepAlive: 15 * time.Second}
	o.Dialer = plain.DialContext
	if conf.Secure() {
		material, err := conf.TLS.Read(files.ReadFile)
		if err != nil {
			return nil, fmt.Errorf("redis: %w", err)
		}
		c, err := conf.TLS.Client(material)
		if err != nil {
			return nil, fmt.Errorf("redis: %w", err)
		}
		// Without server_name the certificate is checked against each address's host.
		o.Dialer = (&tls.Dialer{NetDialer: plain, Config: c}).DialContext
	}
	if conf.Mode != config.RedisCluster {
		return &redisStore{client: redis.NewUniversalClient(o), max: maxValue}, nil
	}
	c := o.Cluster()
	c.DisableRoutingPolicies = true // else the client asks each server for a list of all commands
	return &redisStore{client: redis.NewClusterClient(c), max: maxValue}, nil
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

// redisError keeps the code of a server's error, such as NOAUTH. The rest may repeat the
// command with the password in it.
func redisError(err error) error {
	var said redis.Error
	if !errors.As(err, &said) {
		return fmt.Errorf("redis: %w", cause.Of(err))
	}
	code, _, _ := strings.Cut(said.Error(), " ")
	if len(code) > 20 || strings.Trim(code, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
		code = "an error without a code"
	}
	return fmt.Errorf("redis: %w", cause.Words("the server answered "+code))
}

func redisKey(k Key) string { return redisPrefix + k.String() }

// get reads no more bytes than an entry can have, however large the value is.
func (r *redisStore) get(ctx context.Context, k Key) ([]byte, error) {
	value, err := r.client.GetRange(ctx, redisKey(k), 0, int64(r.max)).Bytes()
	switch {
	case errors.Is(err, redis.Nil):
		return nil, nil
	case err != nil:
		return nil, redisError(err)
	case len(value) == 0:
		return nil, nil
	}
	return value, nil
}

// put writes the entries one after the other, each with its own deadline. In a cluster
// they belong to different servers, and one server that fails must not stop the others'
// writes.
func (r *redisStore) put(ctx context.Context, batch []Entry, keep time.Duration) error {
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
			failed = redisError(err)
		}
	}
	return failed
}

// putOne writes an entry unless the one that is there is newer: peers' entries come in
// any order. Another write may happen between the check and this write, and then the older
// of the two answers may stay. It is valid too.
func (r *redisStore) putOne(ctx context.Context, e Entry, keep time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	head, err := r.client.GetRange(ctx, redisKey(e.Key), 0, entryHeader-1).Bytes()
	if err != nil && !errors.Is(err, redis.Nil) {
		return err
	}
	if at, ok := stampOf(head); ok && at.After(e.StoredAt) {
		return nil
	}
	return r.client.Set(ctx, redisKey(e.Key), e.value(), keep).Err()
}

func (r *redisStore) drop(ctx context.Context, keys []Key) error {
	for _, k := range keys { // in a cluster they belong to different servers
		if err := r.client.Del(ctx, redisKey(k)).Err(); err != nil {
			return redisError(err)
		}
	}
	return nil
}

// sweep does nothing: Redis expires each key.
func (*redisStore) sweep(context.Context, time.Time) error { return nil }

// ping looks a key up, since a server that is loading its data, or a replica that lost
// its master, answers PING. All masters of a cluster must answer: if one of them is down,
// single keys would work or fail depending on their slot.
func (r *redisStore) ping(ctx context.Context) error {
	if c, ok := r.client.(*redis.ClusterClient); ok {
		err := c.ForEachMaster(ctx, func(ctx context.Context, one *redis.Client) error { return one.Ping(ctx).Err() })
		if err != nil {
			return redisError(err)
		}
	}
	_, err := r.get(ctx, Key{})
	return err
}

func (*redisStore) size() (entries, bytes int64, known bool) { return 0, 0, false }

func (r *redisStore) close() error { return r.client.Close() }
