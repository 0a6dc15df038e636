//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// rabbit is a RabbitMQ with one quorum queue.
type rabbit struct {
	conn    *amqp.Connection
	channel *amqp.Channel
}

const (
	rabbitQueue  = "jobs"
	rabbitServer = "/usr/lib/rabbitmq/bin/rabbitmq-server" // Debian's, without its wrapper that changes the user
)

// startRabbit starts a broker with all its files in the sandbox. It also starts Erlang's
// port mapper daemon, which listens on loopback and keeps running.
func (s *sandbox) startRabbit(ctx context.Context) (*rabbit, error) {
	if _, err := os.Stat(rabbitServer); err != nil {
		return nil, fmt.Errorf("RabbitMQ is not installed (Debian: apt-get install rabbitmq-server): %w", err)
	}
	dir := filepath.Join(s.dir, "rabbit")
	if err := os.MkdirAll(filepath.Join(dir, "home"), 0o700); err != nil {
		return nil, fmt.Errorf("configure RabbitMQ: %w", err)
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	dist, err := freePort()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "env"), nil, 0o600); err != nil {
		return nil, fmt.Errorf("configure RabbitMQ: %w", err)
	}
	cmd := exec.Command(rabbitServer)
	cmd.Env = append(os.Environ(), "HOME="+filepath.Join(dir, "home"),
		"RABBITMQ_MNESIA_BASE="+filepath.Join(dir, "m"), "RABBITMQ_LOG_BASE="+filepath.Join(dir, "l"),
		"RABBITMQ_NODENAME=dsnode-bench@localhost", "RABBITMQ_NODE_IP_ADDRESS=127.0.0.1", "ERL_EPMD_ADDRESS=127.0.0.1",
		fmt.Sprintf("RABBITMQ_NODE_PORT=%d", port), fmt.Sprintf("RABBITMQ_DIST_PORT=%d", dist),
		"RABBITMQ_PID_FILE="+filepath.Join(dir, "pid"), "RABBITMQ_ENABLED_PLUGINS_FILE="+filepath.Join(dir, "plugins"),
		"RABBITMQ_CONF_ENV_FILE="+filepath.Join(dir, "env"))
	p, err := s.start("rabbit", cmd)
	if err != nil {
		return nil, err
	}
	r := &rabbit{}
	if err := p.until(ctx, func() error {
		r.conn, err = amqp.Dial(fmt.Sprintf("amqp://guest:guest@127.0.0.1:%d/", port))
		return err
	}); err != nil {
		return nil, fmt.Errorf("reach RabbitMQ: %w", err)
	}
	if r.channel, err = r.conn.Channel(); err != nil {
		return nil, fmt.Errorf("open a channel: %w", err)
	}
	if _, err := r.channel.QueueDeclare(rabbitQueue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		return nil, fmt.Errorf("declare a quorum queue: %w", err)
	}
	if err := r.channel.Confirm(false); err != nil {
		return nil, fmt.Errorf("ask for confirms: %w", err)
	}
	return r, nil
}

// publish keeps n persistent messages unconfirmed on one channel, which is the fastest
// way to publish to RabbitMQ.
func (r *rabbit) publish(ctx context.Context, n int, d time.Duration) (jobsRun, error) {
	body := make([]byte, jobBytes)
	var all tally
	var pending sync.WaitGroup
	free := make(chan struct{}, n)
	begun := time.Now()
	for time.Since(begun) < d {
		free <- struct{}{}
		sent := time.Now()
		confirm, err := r.channel.PublishWithDeferredConfirmWithContext(ctx, "", rabbitQueue, false, false,
			amqp.Publishing{DeliveryMode: amqp.Persistent, Body: body})
		if err != nil {
			return jobsRun{}, fmt.Errorf("publish: %w", err)
		}
		wait := func() {
			defer pending.Done()
			if confirm.Wait() {
				all.add([]time.Duration{time.Since(sent)}, 0)
			} else {
				all.fail(errWrong)
			}
			<-free
		}
		pending.Add(1)
		if n == 1 {
			wait()
		} else {
			go wait()
		}
	}
	pending.Wait()
	res := all.result(time.Since(begun))
	if _, err := r.channel.QueuePurge(rabbitQueue, false); err != nil {
		return jobsRun{}, fmt.Errorf("empty the queue: %w", err)
	}
	return jobsRun{System: "rabbitmq", PerSecond: float64(res.Done) / res.Seconds, P50: res.P50, P99: res.P99, Failed: res.Failed}, nil
}
