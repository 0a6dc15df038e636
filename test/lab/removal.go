//go:build linux

package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// PlanRemoval asks this node what would be lost with another one.
func (n *Node) PlanRemoval(ctx context.Context, name string) (admin.RemovalPlan, error) {
	var p admin.RemovalPlan
	text, err := n.get(ctx, n.AdminURL()+"/admin/v1/nodes/"+name+"/removal")
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return p, fmt.Errorf("%s's plan to remove %s: %w", n.Name, name, err)
	}
	return p, nil
}

// RemoveNode removes another node through this one.
func (n *Node) RemoveNode(ctx context.Context, r admin.RemovalRequest) error {
	url := n.AdminURL() + "/admin/v1/nodes/" + r.Node + "?author=lab"
	if r.AcceptLoss {
		url += "&accept_loss=true"
	}
	if r.Force {
		url += "&force=true"
	}
	return n.call(ctx, http.MethodDelete, url)
}

// AdmitNode lets a removed node join again with its data, through this node.
func (n *Node) AdmitNode(ctx context.Context, name string) error {
	return n.call(ctx, http.MethodPost, n.AdminURL()+"/admin/v1/nodes/"+name+"/admit?author=lab")
}

func (n *Node) call(ctx context.Context, method, url string) error {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return err
	}
	_, err = n.ask(req)
	return err
}

// WaitEnded waits until the process has ended by itself, and returns its exit code.
func (n *Node) WaitEnded(within time.Duration) int {
	n.lab.t.Helper()
	n.mu.Lock()
	cmd, done := n.cmd, n.done
	n.mu.Unlock()
	select {
	case <-done:
	case <-time.After(within):
		n.lab.t.Fatalf("%s has not ended within %s", n.Name, within)
	}
	return cmd.ProcessState.ExitCode()
}
