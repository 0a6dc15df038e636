package cluster

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/config"
)

// A node that restarts applies the ticks in its own log again. They are as old as they were
// before: a restart must not make the copy of the agreed state look new.
func TestAgreedAgeAfterARestart(t *testing.T) {
	c := &Cluster{fsm: newFSM(slog.New(slog.DiscardHandler), nil, func(err error) { t.Error(err) })}
	c.fsm.logged = 5
	apply := func(index uint64, at time.Time) {
		t.Helper()
		cmd, err := agreed.NewCommand(agreed.CmdTick, at, nil)
		if err != nil {
			t.Fatal(err)
		}
		data, err := cmd.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if refused := c.fsm.Apply(&raft.Log{Index: index, Type: raft.LogCommand, Data: data}); refused != nil {
			t.Fatal(refused)
		}
	}
	if age, known := c.AgreedAge(); known {
		t.Errorf("without a tick: %s", age)
	}
	apply(5, time.Now().Add(-time.Hour))
	if age, known := c.AgreedAge(); !known || age < time.Hour || age > 2*time.Hour || c.fsm.ticked.Load() != 0 {
		t.Errorf("the newest tick of its log is an hour old: age %s, known %v", age, known)
	}
	// From a leader: its wall clock doesn't matter.
	apply(6, time.Now().Add(-time.Hour))
	if age, known := c.AgreedAge(); !known || age > time.Minute {
		t.Errorf("a tick of a leader: age %s, known %v", age, known)
	}
}

// A cluster may be founded with a key that older versions don't know. None may join before
// the cluster's feature level has risen.
func TestOlderVersionCanNotReadTheConfiguration(t *testing.T) {
	for text, want := range map[string]error{
		"":                            nil,
		"access: {anonymous: true}\n": nil,
		"access: {stale_for: 0s}\n":   ErrFeatureLevel,
		"access: {stale_for: 10m}\n":  ErrFeatureLevel,
	} {
		cfg, err := config.Parse("cluster.yaml", []byte("version: 1\nsites: {a: {city: x, priority: 1}}\n"+text))
		if err != nil {
			t.Fatal(err)
		}
		c := &Cluster{fsm: newFSM(slog.New(slog.DiscardHandler), nil, func(err error) { t.Error(err) })}
		c.fsm.state.Store(&agreed.State{ClusterID: "c", FeatureLevel: 1, Parsed: cfg, Nodes: map[string]agreed.Node{}})
		if err := c.checkJoin(t.Context(), agreed.Node{Name: "a-2", Site: "a", Feature: 1}, &clusterpb.JoinRequest{Fresh: true}); !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("%q: a node of level 1 joins: %v, want %v", text, err, want)
		}
		if err := c.checkJoin(t.Context(), agreed.Node{Name: "a-2", Site: "a", Feature: 2}, &clusterpb.JoinRequest{Fresh: true}); err != nil {
			t.Errorf("%q: a node of level 2 joins: %v", text, err)
		}
	}
}
