package admin

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/failover/drill"
)

// fakeCluster is a Cluster in memory. fail makes every call fail, as on a node without
// quorum.
type fakeCluster struct {
	mu        sync.Mutex // guards all below
	name      string
	status    Status
	versions  []ConfigVersion // the last is the current one
	keys      []APIKeyInfo
	nodes     []string
	draining  bool
	drained   bool // the upstream
	drainedBy string
	fail      error
	keyring   Keyring
	drills    []Drill
	notes     []string // the changes
	// hold, if not nil, blocks Status until it is closed or the context ends.
	hold chan struct{}
}

var _ Cluster = (*fakeCluster)(nil)

func (f *fakeCluster) refuse(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

func (f *fakeCluster) Status(ctx context.Context) (Status, error) {
	if f.hold != nil {
		select {
		case <-f.hold:
		case <-ctx.Done():
			return Status{}, fmt.Errorf("status: %w", ctx.Err())
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status, f.fail
}

func (f *fakeCluster) Upstreams(context.Context) ([]UpstreamInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return []UpstreamInfo{{
		Name: "a-vllm", Site: "shanghai-a", Kind: "vllm", URL: "http://vllm:8000/v1",
		Models: []string{"deepseek-chat"}, State: UpstreamHealthy, Drained: f.drained, MaxConcurrency: 256,
	}}, f.fail
}

func (f *fakeCluster) DrainUpstream(_ context.Context, name, by string) error {
	return f.drainUpstream(name, by, true)
}

func (f *fakeCluster) ResumeUpstream(_ context.Context, name, by string) error {
	return f.drainUpstream(name, by, false)
}

func (f *fakeCluster) drainUpstream(name, by string, on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if name != "a-vllm" {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownUpstream, name)
	}
	f.drained, f.drainedBy = on, by
	return f.fail
}

func (f *fakeCluster) Bootstrap(_ context.Context, text []byte, author string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	if len(f.versions) > 0 {
		if f.versions[0].Text == string(text) {
			return nil
		}
		return fmt.Errorf("bootstrap: %w", agreed.ErrAlreadyFounded)
	}
	f.put(text, author)
	return nil
}

func (f *fakeCluster) put(text []byte, author string) ConfigVersion {
	v := ConfigVersion{
		Version: uint64(len(f.versions) + 1), Hash: "00ff", Author: author,
		Time: time.Date(2026, 11, 22, 10, 0, len(f.versions), 0, time.UTC), Text: string(text),
	}
	f.versions = append(f.versions, v)
	return v
}

func (f *fakeCluster) Config(context.Context) (ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.fail != nil:
		return ConfigVersion{}, f.fail
	case len(f.versions) == 0:
		return ConfigVersion{}, cluster.ErrNotMember
	}
	return f.versions[len(f.versions)-1], nil
}

func (f *fakeCluster) ConfigHistory(context.Context) ([]ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil || len(f.versions) == 0 {
		return nil, f.fail
	}
	return slices.Clone(f.versions[:len(f.versions)-1]), nil
}

func (f *fakeCluster) ApplyConfig(_ context.Context, text []byte, expect *uint64, author string) (ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return ConfigVersion{}, f.fail
	}
	if now := uint64(len(f.versions)); expect != nil && *expect != now {
		return ConfigVersion{}, fmt.Errorf("apply: %w: it is version %d now", agreed.ErrVersionConflict, now)
	}
	if _, err := config.Parse("cluster.yaml", text); err != nil {
		return ConfigVersion{}, fmt.Errorf("apply: %w", err)
	}
	return f.put(text, author), nil
}

func (f *fakeCluster) RollbackConfig(_ context.Context, to uint64, expect *uint64, author string) (ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := uint64(len(f.versions))
	switch {
	case f.fail != nil:
		return ConfigVersion{}, f.fail
	case expect != nil && *expect != now:
		return ConfigVersion{}, agreed.ErrVersionConflict
	case to < 1 || to > now:
		return ConfigVersion{}, fmt.Errorf("%w: %d", ErrUnknownVersion, to)
	}
	return f.put([]byte(f.versions[to-1].Text), author), nil
}

func (f *fakeCluster) CreateAPIKey(_ context.Context, r APIKeyRequest) (APIKeyCreated, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return APIKeyCreated{}, f.fail
	}
	if r.Tenant == "" {
		return APIKeyCreated{}, fmt.Errorf("%w: a key needs a tenant", ErrInvalidRequest)
	}
	k := APIKeyInfo{ID: fmt.Sprintf("k%d", len(f.keys)+1), Tenant: r.Tenant, Note: r.Note, Models: r.Models, ExpiresAt: r.ExpiresAt}
	f.keys = append(f.keys, k)
	return APIKeyCreated{APIKeyInfo: k, Secret: "dsk-" + k.ID + "-secret"}, nil
}

func (f *fakeCluster) APIKeys(context.Context) ([]APIKeyInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.keys), f.fail
}

func (f *fakeCluster) RevokeAPIKey(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	for i := range f.keys {
		if f.keys[i].ID == id {
			at := time.Date(2026, 11, 22, 11, 0, 0, 0, time.UTC)
			f.keys[i].RevokedAt = &at
			return nil
		}
	}
	return fmt.Errorf("revoke %s: %w", id, agreed.ErrUnknownKey)
}

func (f *fakeCluster) PlanRemoval(_ context.Context, name string) (RemovalPlan, error) {
	records := int64(10)
	return RemovalPlan{Node: name, State: NodeDead, RecordsOnlyThere: &records, Loses: "10 records"}, f.note("plan the removal of %s", name)
}

func (f *fakeCluster) AdmitNode(_ context.Context, name, by string) error {
	if name == "never" {
		return fmt.Errorf("admit: %w: %s", agreed.ErrNotRemoved, name)
	}
	return f.note("admit %s by %s", name, by)
}

func (f *fakeCluster) RemoveNode(_ context.Context, r RemovalRequest, by string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	name := r.Node
	i := slices.Index(f.nodes, name)
	switch {
	case f.fail != nil:
		return f.fail
	case name == "alone-1" && !r.AcceptLoss:
		return fmt.Errorf("remove %s: %w", name, ErrOnlyThere)
	case name == "alone-1":
		f.notes = append(f.notes, fmt.Sprintf("remove %s force=%t by %s", name, r.Force, by))
		return nil
	case name == f.name:
		return fmt.Errorf("remove %s: %w", name, ErrNodeAlive)
	case i < 0:
		return fmt.Errorf("remove %s: %w", name, agreed.ErrUnknownNode)
	}
	f.nodes = slices.Delete(f.nodes, i, i+1)
	return nil
}

func (f *fakeCluster) DrainNode(_ context.Context, name string) error { return f.drain(name, true) }

func (f *fakeCluster) ResumeNode(_ context.Context, name string) error { return f.drain(name, false) }

func (f *fakeCluster) drain(name string, on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if name != f.name {
		return fmt.Errorf("%w: this is %s", ErrWrongNode, f.name)
	}
	f.draining = on
	return f.fail
}

func (f *fakeCluster) note(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail == nil {
		f.notes = append(f.notes, fmt.Sprintf(format, args...))
	}
	return f.fail
}

func (f *fakeCluster) noted() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.notes)
}

func (f *fakeCluster) PlanFailover(_ context.Context, r FailoverRequest, by string) (FailoverPlan, error) {
	err := f.note("plan %s loss=%t waive=%v by %s", r.To, r.AcceptLoss, r.Waive, by)
	return FailoverPlan{To: r.To, OK: true, Checks: []Check{{Name: "quorum", OK: true}}}, err
}

func (f *fakeCluster) Failover(_ context.Context, r FailoverRequest, by string) (FailoverResult, error) {
	if err := f.note("move to %s loss=%t waive=%v by %s", r.To, r.AcceptLoss, r.Waive, by); err != nil {
		return FailoverResult{}, err
	}
	return FailoverResult{ID: "sw-1", From: "shanghai-a", To: r.To, Epoch: 2, IdleSeconds: 0.1}, nil
}

func (f *fakeCluster) AckFailover(_ context.Context, by string) error { return f.note("ack by %s", by) }

func (f *fakeCluster) HoldFailover(_ context.Context, reason, by string) error {
	return f.note("hold %q by %s", reason, by)
}

func (f *fakeCluster) ResumeFailover(_ context.Context, by string) error {
	return f.note("resume by %s", by)
}

func (f *fakeCluster) ReleaseQuarantine(context.Context) error { return f.note("release") }

func (f *fakeCluster) PlanDrill(_ context.Context, r DrillRequest, by string) (DrillPlan, error) {
	err := f.note("plan drill %+v by %s", r, by)
	return DrillPlan{Kind: r.Kind, Site: r.Site, OK: true}, err
}

func (f *fakeCluster) StartDrill(_ context.Context, r DrillRequest, by string) (Drill, error) {
	if r.Site == f.status.Observer.Site {
		return Drill{}, fmt.Errorf("%w: this is %s", ErrWrongNode, r.Site)
	}
	if err := f.note("drill %+v by %s", r, by); err != nil {
		return Drill{}, err
	}
	d := Drill{ID: "drill-1", Kind: r.Kind, Site: r.Site, By: by}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drills = append(f.drills, d)
	return d, nil
}

func (f *fakeCluster) Drills(context.Context) ([]Drill, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.drills), f.fail
}

func (f *fakeCluster) Drill(_ context.Context, id string) (Drill, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range f.drills {
		if d.ID == id {
			return d, nil
		}
	}
	return Drill{}, fmt.Errorf("%w: %s", drill.ErrUnknown, id)
}

func (f *fakeCluster) AbortDrill(ctx context.Context, id, by string) error {
	if _, err := f.Drill(ctx, id); err != nil {
		return err
	}
	return f.note("abort %s by %s", id, by)
}

func ptr[T any](v T) *T { return &v }

// newFake is a node of a healthy bootstrapped cluster.
func newFake(name string) *fakeCluster {
	f := &fakeCluster{name: name, nodes: []string{name, "gone-1"}, status: healthyStatus()}
	f.status.Observer.Node = name
	f.put([]byte(goodConfig), "founder")
	return f
}

const goodConfig = `version: 1
sites:
  shanghai-a: {city: shanghai, priority: 1}
upstreams:
  a-vllm: {site: shanghai-a, kind: vllm, url: "http://vllm:8000/v1"}
models:
  deepseek-chat: {serve: [{upstream: a-vllm}]}
`

// serve starts an admin port for tests over real connections.
func serve(t *testing.T, f Cluster, token string) *httptest.Server {
	t.Helper()
	reg := prometheus.NewRegistry()
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "dsnode_epoch", Help: "Test."})
	g.Set(7)
	reg.MustRegister(g)
	health := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/live") {
			w.WriteHeader(http.StatusOK)
			return
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	s := httptest.NewServer(New(Options{Cluster: f, Gatherer: reg, Health: health, Token: token, Timeout: 5 * time.Second}))
	t.Cleanup(s.Close)
	return s
}

// dial makes a client for the servers, in order.
func dial(t *testing.T, o ClientOptions, urls ...string) *Client {
	t.Helper()
	c, err := NewClient(urls, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func (f *fakeCluster) CheckJobs(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fail
}

func (f *fakeCluster) JobStreams(context.Context) (JobStreams, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return JobStreams{Ownership: 9, Data: []agreed.JobStream{{
		Origin: "a-1", Incarnation: "0123456789abcdef0123456789abcdef", Site: "a", Owner: "b-1", Before: "a-1",
		Token: agreed.FenceToken{Generation: 1, Index: 9}, Reason: "site_gone",
	}}}, f.fail
}
