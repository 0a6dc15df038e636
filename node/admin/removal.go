package admin

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
)

// Removals removes nodes that will not come back, and lets them come back.
type Removals interface {
	// PlanRemoval says what would be lost with a node. It changes nothing.
	PlanRemoval(ctx context.Context, name string) (RemovalPlan, error)
	// RemoveNode removes a node. Without AcceptLoss it is ErrOnlyThere unless all that the
	// node is known to hold is on other nodes too; without Force it is ErrNodeAlive if the
	// node is alive.
	RemoveNode(ctx context.Context, r RemovalRequest, author string) error
	// AdmitNode lets a removed node join again with its data.
	AdmitNode(ctx context.Context, name, author string) error
}

// RemovalRequest names a node and how it may be removed.
type RemovalRequest struct {
	Node       string
	AcceptLoss bool
	Force      bool
}

// RemovalPlan is what would be lost with a node, as the asked node knows it. Unknown is nil.
type RemovalPlan struct {
	Node             string    `json:"node"`
	Site             string    `json:"site"`
	State            NodeState `json:"state"`
	LastHeardSeconds *float64  `json:"last_heard_seconds"`
	// RecordsOnlyThere is how many records of jobs the node reported to have on its disk
	// and no other node has, ReportedSecondsAgo how long ago it reported. What it has
	// accepted since then is not known.
	RecordsOnlyThere   *int64   `json:"records_only_there"`
	ReportedSecondsAgo *float64 `json:"reported_seconds_ago"`
	// Loses says in words what is lost with the node; empty: nothing is known to be.
	Loses string `json:"loses"`
}

func (s *Server) deleteNode(ctx context.Context, c call) (any, error) {
	r := RemovalRequest{Node: c.path("name")}
	var err error
	if r.AcceptLoss, err = c.flag("accept_loss"); err != nil {
		return nil, err
	}
	if r.Force, err = c.flag("force"); err != nil {
		return nil, err
	}
	return nil, s.cluster.RemoveNode(ctx, r, c.author)
}

func (s *Server) getRemovalPlan(ctx context.Context, c call) (any, error) {
	return s.cluster.PlanRemoval(ctx, c.path("name"))
}

// PlanRemoval implements Cluster.
func (c *Client) PlanRemoval(ctx context.Context, name string) (RemovalPlan, error) {
	return ask[RemovalPlan](ctx, c, http.MethodGet, "/admin/v1/nodes/"+url.PathEscape(name)+"/removal", nil, nil)
}

// RemoveNode implements Cluster.
func (c *Client) RemoveNode(ctx context.Context, r RemovalRequest, author string) error {
	q := c.by(author)
	for name, set := range map[string]bool{"accept_loss": r.AcceptLoss, "force": r.Force} {
		if set { // older versions refuse a parameter that they don't know
			q.Set(name, strconv.FormatBool(set))
		}
	}
	return c.do(ctx, http.MethodDelete, "/admin/v1/nodes/"+url.PathEscape(r.Node), q)
}

// AdmitNode implements Cluster.
func (c *Client) AdmitNode(ctx context.Context, name, author string) error {
	return c.do(ctx, http.MethodPost, "/admin/v1/nodes/"+url.PathEscape(name)+"/admit", c.by(author))
}
