package node

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/test/async"
)

// A node that is removed while it lives shows at its ports that it is out, and its Run
// returns the reason, also when it is started again. Admitted again, it is ready with its
// data, and its old job table counts as incomplete until it has the rows of the others.
func TestRemovedNodeStopsServing(t *testing.T) {
	c := newKeyCluster(t)
	none, key := keyring.OperatorKey{}, keyring.GenerateOperatorKey()
	a, _ := c.boot("a-1", key, none)
	c.seed = a.Addresses().RPC
	async.Await(t, "the first node bootstraps the cluster", func() bool {
		return a.operator.Bootstrap(t.Context(), []byte(keyClusterConfig), "me") == nil
	})
	b, ended := c.boot("b-1", key, none)
	c.boot("c-1", key, none)
	all := func() bool {
		for _, n := range c.nodes {
			s := n.cluster.State()
			if len(s.Nodes) != 3 || s.FeatureLevel < 2 || !n.keys.Ring.Ready() || !n.cluster.Raft().Quorum || n.jobs.table.Partial() {
				return false
			}
			if _, err := n.jobs.service.Counts(); err != nil {
				return false
			}
		}
		return true
	}
	async.Await(t, "three nodes are ready", all)
	if err := a.operator.RemoveNode(t.Context(), admin.RemovalRequest{Node: "b-1", AcceptLoss: true}, "me"); !errors.Is(err, admin.ErrNodeAlive) {
		t.Fatalf("removing a node that is alive: %v, want ErrNodeAlive", err)
	}
	if err := b.operator.RemoveNode(t.Context(), admin.RemovalRequest{Node: "b-1", AcceptLoss: true, Force: true}, "me"); !errors.Is(err, admin.ErrNodeAlive) {
		t.Fatalf("a node that removes itself: %v, want ErrNodeAlive", err)
	}
	api := "http://" + b.Addresses().API
	wantEnd := func(ended <-chan error) {
		t.Helper()
		select {
		case err := <-ended:
			if !errors.Is(err, ErrRemoved) {
				t.Fatalf("Run returned %v, want ErrRemoved", err)
			}
			t.Log(err)
		case <-time.After(time.Minute):
			t.Fatal("the removed node still runs")
		}
		delete(c.nodes, "b-1")
	}
	if err := a.operator.RemoveNode(t.Context(), admin.RemovalRequest{Node: "b-1", AcceptLoss: true, Force: true}, "me"); err != nil {
		t.Fatal(err)
	}
	async.Await(t, "it is not ready", func() bool {
		answer, err := http.Get(api + "/healthz/quorum")
		if err != nil {
			return true // its port is closed
		}
		_ = answer.Body.Close()
		return answer.StatusCode == http.StatusServiceUnavailable
	})
	if b.fence.Acting() {
		t.Error("the removed node acts as primary")
	}
	wantEnd(ended)
	_, ended = c.boot("b-1", key, none)
	wantEnd(ended)
	if err := a.operator.AdmitNode(t.Context(), "b-1", "me"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(c.dir, "data-b-1", jobsDir, "jobs.partial")); err != nil {
		t.Errorf("the old job table counts as complete: %v", err)
	}
	c.boot("b-1", key, none)
	async.Await(t, "it is a member again, with a complete table", all)
	http.DefaultClient.CloseIdleConnections()
	for name := range c.nodes {
		c.stop(name)
	}
}
