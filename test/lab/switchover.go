//go:build linux

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	"github.com/dsnode/dsnode/node/admin"
)

// Refused is an error object from a node's admin port.
type Refused struct {
	Status  int    `json:"-"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (r *Refused) Error() string {
	return fmt.Sprintf("answered %d %s: %s", r.Status, r.Code, r.Message)
}

// Switchover asks this node to move the primary, and waits for the outcome. The error
// is a *Refused when the node answered with one; after any other error the outcome is
// unknown.
func (n *Node) Switchover(ctx context.Context, to string) (admin.FailoverResult, error) {
	return n.SwitchoverAs(ctx, admin.FailoverRequest{To: to})
}

// SwitchoverAs is Switchover with all that can be asked for.
func (n *Node) SwitchoverAs(ctx context.Context, r admin.FailoverRequest) (admin.FailoverResult, error) {
	var result admin.FailoverResult
	answer, err := n.post(ctx, "/admin/v1/failover?author=lab", r)
	if err != nil {
		return result, fmt.Errorf("switch over to %s: %w", r.To, err)
	}
	if err := json.Unmarshal(answer, &result); err != nil {
		return result, fmt.Errorf("switch over to %s: %w", r.To, err)
	}
	return result, nil
}

// SwitchoverPlan asks this node which checks of a switchover hold.
func (n *Node) SwitchoverPlan(ctx context.Context, to string) (admin.FailoverPlan, error) {
	var plan admin.FailoverPlan
	answer, err := n.get(ctx, n.AdminURL()+"/admin/v1/failover/plan?to="+to)
	if err != nil {
		return plan, fmt.Errorf("plan a switchover to %s: %w", to, err)
	}
	if err := json.Unmarshal(answer, &plan); err != nil {
		return plan, fmt.Errorf("plan a switchover to %s: %w", to, err)
	}
	return plan, nil
}

// post sends JSON to the admin port from within the node's site.
func (n *Node) post(ctx context.Context, path string, body any) ([]byte, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, n.AdminURL()+path, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := n.Site.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return answer, nil
	}
	var e struct{ Error Refused }
	if err := json.Unmarshal(answer, &e); err != nil || e.Error.Code == "" {
		return nil, fmt.Errorf("answered %s: %s", resp.Status, answer)
	}
	e.Error.Status = resp.StatusCode
	return nil, &e.Error
}
