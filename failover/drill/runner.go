package drill

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/failover"
)

// Agreement is what drills need of the cluster; *cluster.Cluster is one.
type Agreement interface {
	State() *agreed.State
	Changed() <-chan struct{}
	Lease() (left time.Duration, epoch uint64)
	Peers() map[string]cluster.PeerView
	Raft() cluster.RaftView
	Timing() config.Timing
	Propose(ctx context.Context, t agreed.CommandType, data any) (index uint64, err error)
}

// Switcher carries out planned switchovers; *failover.Coordinator is one.
type Switcher interface {
	Precheck(r failover.SwitchoverRequest) []failover.Check
	Switchover(ctx context.Context, r failover.SwitchoverRequest) (failover.SwitchoverResult, error)
}

// Options are a Runner's. All fields are needed.
type Options struct {
	Node, Site  string
	Agreement   Agreement
	Switcher    Switcher
	Quarantined func() bool
	// Health is this node's own health. Unhealthy lists what is not healthy in the
	// cluster.
	Health    func() cluster.Health
	Unhealthy func() []string
	// API is the address of this node's API port.
	API string
	// NewAsker makes the Asker of one drill.
	NewAsker func(model string) (a Asker, done func())
	Boottime func() time.Duration
	Now      func() time.Time
	Logger   *slog.Logger
}

// Runner runs drills, one at a time. Start begins one, Run carries it out.
type Runner struct {
	o      Options
	log    *slog.Logger
	begin  chan *trial
	wake   chan struct{} // there is an unwritten abort
	mu     sync.Mutex    // guards busy, active, unwritten
	busy   bool
	active *trial
	// unwritten is an abort that this node has to write into a record.
	unwritten unwrittenAbort
}

// NewRunner makes a Runner; Run starts it.
func NewRunner(o Options) *Runner {
	return &Runner{o: o, log: o.Logger, begin: make(chan *trial, 1), wake: make(chan struct{}, 1)}
}

// Run carries out what Start begins, and ends the records of drills without a runner,
// until ctx ends.
func (r *Runner) Run(ctx context.Context) error {
	var loop sync.WaitGroup
	defer loop.Wait()
	loop.Go(func() { r.endAbandoned(ctx) })
	for {
		select {
		case <-ctx.Done():
			return nil
		case t := <-r.begin:
			t.run(ctx)
			r.mu.Lock()
			r.busy, r.active = false, nil
			r.mu.Unlock()
		}
	}
}

// Plan gives the prechecks of a drill and describes what it would do. It changes nothing.
// Like Start it fails with ErrWrongPlace on a node that can't run the drill: the checks of
// another node count.
func (r *Runner) Plan(q Request) (checks []failover.Check, rehearses string, err error) {
	if q, err = q.Normal(); err != nil {
		return nil, "", err
	}
	if err := r.place(q); err != nil {
		return nil, "", err
	}
	v := r.view(q)
	return Plan(v, q), Rehearses(v, q), nil
}

// Start checks, has the record agreed on and returns it. Run carries the drill out.
func (r *Runner) Start(ctx context.Context, q Request) (agreed.DrillRecord, error) {
	q, err := q.Normal()
	if err != nil {
		return agreed.DrillRecord{}, err
	}
	v := r.view(q)
	if err := r.place(q); err != nil {
		return agreed.DrillRecord{}, err
	}
	r.mu.Lock()
	if r.busy {
		r.mu.Unlock()
		return agreed.DrillRecord{}, fmt.Errorf("%w: this node is still finishing one", agreed.ErrDrillRunning)
	}
	r.busy = true
	r.mu.Unlock()
	t, err := r.prepare(ctx, v, q)
	r.mu.Lock()
	r.busy, r.active = err == nil, t
	r.mu.Unlock()
	if err != nil {
		return agreed.DrillRecord{}, err
	}
	r.begin <- t
	return t.record, nil
}

// place refuses a drill that would cut off this node's own site.
func (r *Runner) place(q Request) error {
	if q.Kind == Isolation && q.Site == r.o.Site {
		return fmt.Errorf("%w: %s is at %s; ask %s", ErrWrongPlace, r.o.Node, r.o.Site, r.elsewhere())
	}
	return nil
}

// prepare makes the trial and has its record agreed on.
func (r *Runner) prepare(ctx context.Context, v View, q Request) (*trial, error) {
	t := newTrial(r, v, q)
	if q.ProbeModel != "" {
		t.tryModel(ctx)
	}
	if bad := blocking(t.checks, q.Waive); len(bad) > 0 {
		reasons := make([]string, len(bad))
		for i, c := range bad {
			reasons[i] = fmt.Sprintf("%s (%s)", c.Name, c.Detail)
		}
		t.done()
		return nil, fmt.Errorf("the drill %w: %s", failover.ErrPrecheck, strings.Join(reasons, "; "))
	}
	if err := t.agree(ctx); err != nil {
		t.done()
		return nil, err
	}
	return t, nil
}

// Abort ends a drill, whichever node runs it. An isolated site does not learn of it and
// heals by its timer.
func (r *Runner) Abort(ctx context.Context, id, by string) error {
	s := r.o.Agreement.State()
	i := slices.IndexFunc(s.Drills, func(d agreed.DrillRecord) bool { return d.ID == id })
	if i < 0 {
		return fmt.Errorf("%w: %s", ErrUnknown, id)
	}
	d := s.Drills[i]
	if d.Verdict != "" {
		return fmt.Errorf("%w: %s", agreed.ErrDrillEnded, id)
	}
	return r.end(ctx, id, "aborted by "+by)
}

// Live is the report so far of a drill that runs on this node.
func (r *Runner) Live(id string) (Report, bool) {
	r.mu.Lock()
	t := r.active
	r.mu.Unlock()
	if t == nil || t.record.ID != id {
		return Report{}, false
	}
	return t.soFar(), true
}

// view gathers what Plan looks at.
func (r *Runner) view(q Request) View {
	s := r.o.Agreement.State()
	left, _ := r.o.Agreement.Lease()
	now := r.o.Now()
	v := View{
		Site: r.o.Site, Primary: s.Primary.Site, Lease: left, Quarantined: r.o.Quarantined(), Held: s.Hold != nil,
		Unhealthy:      r.o.Unhealthy(),
		SwitchoverOpen: s.Switchover != nil && now.Before(s.Switchover.Deadline),
		Unacknowledged: s.LastFailover != nil && !s.LastFailover.Acknowledged,
	}
	for _, d := range s.Drills {
		if d.Running(now) {
			v.Running = d.ID
		}
	}
	if q.Kind == Switchover {
		v.Handoff = r.o.Switcher.Precheck(failover.SwitchoverRequest{To: q.Site, By: q.By, Kind: agreed.FailoverDrill, Waive: q.Waive})
	}
	if s.Parsed == nil {
		return v
	}
	voter := map[string]bool{}
	for _, server := range r.o.Agreement.Raft().Servers {
		voter[server.Name] = server.Voter
	}
	peers := r.o.Agreement.Peers()
	for name := range s.Parsed.Sites {
		site := SiteView{Name: name}
		for _, n := range s.Nodes {
			if n.Site != name {
				continue
			}
			site.Nodes++
			if voter[n.Name] {
				site.Voters++
			}
			ready, upstreams := r.able(n.Name, peers[n.Name])
			if ready {
				site.Ready++
			}
			site.UpstreamsHealthy = max(site.UpstreamsHealthy, upstreams)
		}
		v.Sites = append(v.Sites, site)
	}
	slices.SortFunc(v.Sites, func(a, b SiteView) int { return strings.Compare(a.Name, b.Name) })
	return v
}

// able reports whether a node is heard, holds a lease and is in service, and how many of
// its upstreams are healthy.
func (r *Runner) able(name string, p cluster.PeerView) (ready bool, upstreams int) {
	if name == r.o.Node {
		left, _ := r.o.Agreement.Lease()
		h := r.o.Health()
		return left > 0 && !h.Draining, h.UpstreamsHealthy
	}
	if !p.HeardWithin(r.o.Agreement.Timing().Patience) {
		return false, 0
	}
	return p.LeaseLeft+p.Ago > 0 && !p.Draining && !p.Cold, p.UpstreamsHealthy
}

// elsewhere names a node of another site that is heard, with its admin address.
func (r *Runner) elsewhere() string {
	best := ""
	for name, p := range r.o.Agreement.Peers() {
		if p.Site != r.o.Site && p.HeardWithin(r.o.Agreement.Timing().Patience) && (best == "" || name < best) {
			best = name
		}
	}
	if best == "" {
		return "a node of another site (none is heard here)"
	}
	return fmt.Sprintf("%s at its admin address %s", best, r.o.Agreement.Peers()[best].Info.Admin)
}

// targets are the API ports of all nodes, within bounds.
func (r *Runner) targets() []Target {
	peers := r.o.Agreement.Peers()
	var all []Target
	for name, n := range r.o.Agreement.State().Nodes {
		api := n.API
		if p, known := peers[name]; known && p.Info.API != "" {
			api = p.Info.API
		}
		if name == r.o.Node {
			api = r.o.API
		}
		if api != "" {
			all = append(all, Target{Site: n.Site, Node: name, API: api})
		}
	}
	return chosen(all)
}

var errStopped = errors.New("the node that ran the drill is stopping")

func newID() string { return "drill-" + strings.ToLower(rand.Text()[:10]) }
