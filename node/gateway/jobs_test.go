package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/storage/journal"
)

// jobsFake answers what the test says, and records what it was asked.
type jobsFake struct {
	err       error
	view      jobs.View
	submitted jobs.Request
	who       jobs.Caller
	query     jobs.Query
	id        journal.JobID
	called    string
	there     *jobs.Relayed
}

func (f *jobsFake) Submit(_ context.Context, r *jobs.Request) (*jobs.View, error) {
	f.called, f.submitted = "submit", *r
	return &f.view, f.err
}

func (f *jobsFake) note(call string, who jobs.Caller, id journal.JobID) (*jobs.View, error) {
	f.called, f.who, f.id = call, who, id
	return &f.view, f.err
}

func (f *jobsFake) Get(_ context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error) {
	return f.note("get", who, id)
}

func (f *jobsFake) List(_ context.Context, who jobs.Caller, q jobs.Query) (jobs.Page, error) {
	f.called, f.who, f.query = "list", who, q
	return jobs.Page{Jobs: []*jobs.View{&f.view}, More: true}, f.err
}

func (f *jobsFake) Cancel(_ context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error) {
	return f.note("cancel", who, id)
}

func (f *jobsFake) Retry(_ context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error) {
	return f.note("retry", who, id)
}

func (f *jobsFake) Delete(_ context.Context, who jobs.Caller, id journal.JobID) error {
	_, err := f.note("delete", who, id)
	return err
}

func (f *jobsFake) Elsewhere(_ context.Context, _ jobs.Caller, method, path string, _ journal.JobID) (*jobs.Relayed, error) {
	f.called += " elsewhere " + method + " " + path
	if f.there == nil {
		return nil, jobs.ErrNotFound
	}
	return f.there, nil
}

func openJobs(t *testing.T, f *jobsFake) *bench {
	t.Helper()
	return open(t, nil, func(o *Options) { o.Jobs = f })
}

const (
	goodJob = `{"endpoint":"/v1/chat/completions","body":{"model":"m","messages":[]}}`
	aJob    = "job_0102030405060708090a0b0c0d0e0f10"
)

func TestSubmission(t *testing.T) {
	with := func(member string) string { return strings.TrimSuffix(goodJob, "}") + "," + member + "}" }
	for _, tc := range []struct {
		name, body string
		status     int
		param      string
	}{
		{"plain", goodJob, 202, ""},
		{"everything", with(`"durability":"two-sites","min_durability":"node","priority":9,"expires_in":"7d"`), 202, ""},
		{"members in any order", `{"priority":0,"body":{"messages":[],"model":"m","stream":false},"endpoint":"/v1/embeddings"}`, 202, ""},
		{"unknown member", with(`"webhook":"x"`), 400, "webhook"},
		{"callback_url", with(`"callback_url":"http://x"`), 400, "callback_url"},
		{"member twice", with(`"endpoint":"/v1/embeddings"`), 400, "endpoint"},
		{"model twice", `{"endpoint":"/v1/chat/completions","body":{"model":"m","model":"other"}}`, 400, "body.model"},
		{"Model", `{"endpoint":"/v1/chat/completions","body":{"Model":"m"}}`, 400, "body.model"},
		{"other endpoint", `{"endpoint":"/v1/models","body":{"model":"m"}}`, 400, "endpoint"},
		{"no endpoint", `{"body":{"model":"m"}}`, 400, "endpoint"},
		{"no body", `{"endpoint":"/v1/chat/completions"}`, 400, "body"},
		{"body is text", `{"endpoint":"/v1/chat/completions","body":"{}"}`, 400, "body"},
		{"no model", `{"endpoint":"/v1/chat/completions","body":{}}`, 400, "body.model"},
		{"unknown model", `{"endpoint":"/v1/chat/completions","body":{"model":"x"}}`, 404, "body.model"},
		{"stream", `{"endpoint":"/v1/chat/completions","body":{"model":"m","stream":true}}`, 400, "body.stream"},
		{"bad n", `{"endpoint":"/v1/chat/completions","body":{"model":"m","n":0}}`, 400, "body.n"},
		{"durability", with(`"durability":"three-sites"`), 400, "durability"},
		{"min_durability", with(`"min_durability":1`), 400, "min_durability"},
		{"priority 10", with(`"priority":10`), 400, "priority"},
		{"priority -1", with(`"priority":-1`), 400, "priority"},
		{"priority 1.5", with(`"priority":1.5`), 400, "priority"},
		{"expires_in 8d", with(`"expires_in":"8d"`), 400, "expires_in"},
		{"expires_in 169h", with(`"expires_in":"169h"`), 400, "expires_in"},
		{"expires_in 0s", with(`"expires_in":"0s"`), 400, "expires_in"},
		{"expires_in number", with(`"expires_in":60`), 400, "expires_in"},
		{"trailing", goodJob + "x", 400, ""},
		{"a list", "[]", 400, ""},
		{"nothing", "", 400, ""},
		{"cut", goodJob[:40], 400, ""},
		{"bad UTF-8", strings.Replace(goodJob, "[]", "\"\xff\"", 1), 400, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &jobsFake{}
			b := openJobs(t, f)
			got := do(t, "POST", b.url+"/v1/jobs", tc.body)
			var e struct {
				Error struct {
					Param *string
					Type  string
				}
			}
			_ = json.Unmarshal([]byte(got.body), &e)
			param := ""
			if e.Error.Param != nil {
				param = *e.Error.Param
			}
			if got.status != tc.status || param != tc.param || (got.status == 202) != (f.called == "submit") {
				t.Errorf("%d, param %q, called %q: %s; want %d, param %q", got.status, param, f.called, got.body, tc.status, tc.param)
			}
		})
	}
}

// TestSubmissionIsRead: what reaches jobs is what was sent, the body byte for byte.
func TestSubmissionIsRead(t *testing.T) {
	f := &jobsFake{view: jobs.View{ID: journal.JobID{1, 2, 3}, Status: journal.Queued, Site: "here", Durability: journal.DurableNode, CreatedAt: time.Unix(1_800_000_000, 5)}}
	b := openJobs(t, f)
	inner := `{ "messages":[ ], "model":"other" ,"x":{"y":1}}`
	got := do(t, "POST", b.url+"/jobs", `{"body": `+inner+` ,"endpoint":"/v1/completions","durability":"site","min_durability":"node","priority":3,"expires_in":"90m"}`,
		"Authorization", "Bearer one", "Idempotency-Key", "a b")
	want := jobs.Request{
		Who: f.submitted.Who, Endpoint: "/v1/completions", Model: "other", Body: []byte(inner), Durability: journal.DurableSite,
		MinDurability: journal.DurableNode, Priority: 3, ExpiresIn: 90 * time.Minute, IdempotencyKey: "a b",
	}
	if fmt.Sprint(f.submitted) != fmt.Sprint(want) || f.submitted.Who.KeyID != "k2" || f.submitted.Who.Tenant != "t" {
		t.Errorf("submitted %+v", f.submitted)
	}
	if got.status != 202 || got.header.Get("Location") != "/v1/jobs/job_01020300000000000000000000000000" {
		t.Errorf("%d, Location %q", got.status, got.header.Get("Location"))
	}
	if want := `{"id":"job_01020300000000000000000000000000","object":"job","status":"queued","site":"here","durability":"node","created_at":1800000000}`; got.body != want {
		t.Errorf("the answer is %s", got.body)
	}
	f.called = ""
	for _, tc := range []struct {
		header []string
		status int
	}{
		{[]string{"Authorization", "Bearer one"}, 404}, // the key may not use m
		{[]string{"Authorization", "Bearer wrong"}, 401},
		{[]string{"Idempotency-Key", strings.Repeat("x", 256)}, 400},
		{[]string{"Idempotency-Key", "ä"}, 400},
	} {
		if got := do(t, "POST", b.url+"/v1/jobs", goodJob, tc.header...); got.status != tc.status || f.called != "" {
			t.Errorf("%q: %d, called %q; want %d", tc.header, got.status, f.called, tc.status)
		}
	}
	if got := do(t, "POST", b.url+"/v1/jobs?tenant=x", goodJob); got.status != 400 {
		t.Errorf("a client that names a tenant gets %d", got.status)
	}
}

func TestJobRefusals(t *testing.T) {
	for _, tc := range []struct {
		err    error
		status int
		code   string
		retry  string
	}{
		{&jobs.DurabilityError{Wanted: journal.DurableSite, Has: journal.DurableNode, After: 2 * time.Second}, 503, "durability_timeout", "1"},
		{fmt.Errorf("%w: no", jobs.ErrImpossible), 400, "durability_impossible", ""},
		{jobs.ErrKeyReused, 422, "idempotency_key_reused", ""},
		{jobs.ErrBusy, 503, "too_many_jobs", "5"},
		{jobs.ErrNotReady, 503, "jobs_not_ready", "1"},
		{fmt.Errorf("%w since noon", jobs.ErrNoStream), 503, "jobs_not_ready", "5"},
		{jobs.ErrPartial, 503, "jobs_unavailable", "5"},
		{fmt.Errorf("%w: %w", jobs.ErrUnavailable, journal.ErrFull), 503, "jobs_unavailable", "5"},
		{journal.ErrTooLarge, 413, "request_too_large", ""},
		{journal.ErrDamaged, 500, "internal_error", ""},
	} {
		f := &jobsFake{err: tc.err}
		b := openJobs(t, f)
		got := do(t, "POST", b.url+"/v1/jobs", goodJob)
		if got.status != tc.status || !strings.Contains(got.body, `"code":"`+tc.code+`"`) || got.header.Get("Retry-After") != tc.retry {
			t.Errorf("%v: %d, Retry-After %q, %s", tc.err, got.status, got.header.Get("Retry-After"), got.body)
		}
	}
}

// TestLargeJob: a job that the journal can't take is refused before its body is read, and
// the error says that this is the bound of jobs.
func TestLargeJob(t *testing.T) {
	b := openJobs(t, &jobsFake{})
	c, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_, _ = fmt.Fprintf(c, "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", 29<<20)
	answer, _ := io.ReadAll(c)
	if !strings.HasPrefix(string(answer), "HTTP/1.1 413") || !strings.Contains(string(answer), "A job may have 25100288 bytes, less than other requests (33554432).") {
		t.Errorf("%s", answer)
	}
}

func TestJobRoutes(t *testing.T) {
	final := jobs.View{
		ID: journal.JobID{9}, Status: journal.Succeeded, Site: "here", Durability: journal.DurableTwoSites, CreatedAt: time.Unix(1, 0),
		Endpoint: "/v1/chat/completions", Model: `a"b`, Attempts: 2, ExecutedBy: "there", Epoch: 4, Result: []byte(`{"a":1}`), Tenant: "secret",
		FinishedAt: time.Unix(3, 0),
	}
	for _, tc := range []struct {
		method, path string
		err          error
		status       int
		called       string
	}{
		{"GET", "/v1/jobs/" + aJob, nil, 200, "get"},
		{"HEAD", "/jobs/" + aJob, nil, 200, "get"},
		{"POST", "/v1/jobs/" + aJob + "/cancel", nil, 200, "cancel"},
		{"POST", "/v1/jobs/" + aJob + "/retry", nil, 202, "retry"},
		{"DELETE", "/v1/jobs/" + aJob, nil, 200, "delete"},
		{"GET", "/v1/jobs/" + aJob, jobs.ErrNotFound, 404, "get elsewhere GET /v1/jobs/" + aJob},
		{"POST", "/v1/jobs/" + aJob + "/cancel", jobs.ErrNotFound, 404, "cancel elsewhere POST /v1/jobs/" + aJob + "/cancel"},
		{"DELETE", "/v1/jobs/" + aJob, jobs.ErrNotFinal, 409, "delete"},
		{"POST", "/v1/jobs/" + aJob + "/retry", jobs.ErrNotRetryable, 409, "retry"},
		{"GET", "/v1/jobs/nothing", nil, 404, ""},
		{"GET", "/v1/jobs/" + aJob + "?x=1", nil, 400, ""},
		{"POST", "/v1/jobs/" + aJob, nil, 405, ""},
		{"GET", "/v1/jobs/" + aJob + "/cancel", nil, 405, ""},
		{"POST", "/v1/jobs/" + aJob + "/run", nil, 404, ""},
		{"PUT", "/v1/jobs", nil, 405, ""},
		{"GET", "/v1/jobs?limit=5&status=queued,running&after=" + aJob, nil, 200, "list"},
		{"GET", "/v1/jobs?limit=101", nil, 400, ""},
		{"GET", "/v1/jobs?limit=0", nil, 400, ""},
		{"GET", "/v1/jobs?limit=1&limit=2", nil, 400, ""},
		{"GET", "/v1/jobs?status=done", nil, 400, ""},
		{"GET", "/v1/jobs?after=x", nil, 400, ""},
		{"GET", "/v1/jobs?after=" + aJob + "&before=" + aJob, nil, 400, ""},
		{"GET", "/v1/jobs?tenant=x", nil, 400, ""},
		{"GET", "/v1/jobs?after=" + aJob, jobs.ErrBadCursor, 400, "list"},
	} {
		t.Run(tc.method+" "+tc.path, func(t *testing.T) {
			f := &jobsFake{err: tc.err, view: final}
			b := openJobs(t, f)
			got := do(t, tc.method, b.url+tc.path, "", "Authorization", "Bearer all")
			if got.status != tc.status || f.called != tc.called || strings.Contains(got.body, "secret") {
				t.Errorf("%d, called %q: %s; want %d, %q", got.status, f.called, got.body, tc.status, tc.called)
			}
			if f.called != "" && (f.who.Tenant != "t" || f.who.Operator) {
				t.Errorf("asked as %+v", f.who)
			}
			if tc.status < 300 && tc.method != "HEAD" && !json.Valid([]byte(got.body)) {
				t.Errorf("no JSON: %s", got.body)
			}
		})
	}
	b := open(t, nil, nil)
	if got := do(t, "GET", b.url+"/v1/jobs", ""); got.status != 404 {
		t.Errorf("without jobs their route gives %d", got.status)
	}
}

// TestJobElsewhere: the node that has the job answers, and nodes don't ask each other in circles.
func TestJobElsewhere(t *testing.T) {
	f := &jobsFake{err: jobs.ErrNotFound, there: &jobs.Relayed{Node: "n2", Status: 200, Header: http.Header{"X-Dsnode-Node": {"n2"}}, Body: []byte(`{"id":"x"}`)}}
	b := openJobs(t, f)
	got := do(t, "GET", b.url+"/v1/jobs/"+aJob, "")
	if got.status != 200 || got.body != `{"id":"x"}` || got.header.Get("X-Dsnode-Node") != "n2" {
		t.Errorf("%d %s by %s", got.status, got.body, got.header.Get("X-Dsnode-Node"))
	}
	handler := listen(t, b.Gateway, b.PeerHandler())
	asPeer := []string{"X-Dsnode-Hops", "1", "X-Dsnode-Principal", `{"tenant":"t9"}`}
	if got := do(t, "GET", handler+"/v1/jobs/"+aJob, "", asPeer...); got.status != 404 || strings.Contains(f.called, "elsewhere") && f.who.Tenant != "t9" {
		t.Errorf("a peer gets %d, called %q as %+v", got.status, f.called, f.who)
	}
	if got := do(t, "POST", handler+"/v1/jobs", goodJob, asPeer...); got.status != 404 {
		t.Errorf("a peer that submits gets %d", got.status)
	}
	if got := do(t, "GET", handler+"/v1/models", "", asPeer...); got.status != 404 {
		t.Errorf("a peer that lists models gets %d", got.status)
	}
}

func TestOperatorHandler(t *testing.T) {
	f := &jobsFake{view: jobs.View{Tenant: "t9", ShowTenant: true}}
	b := openJobs(t, f)
	handler := listen(t, b.Gateway, b.OperatorHandler())
	if got := do(t, "GET", handler+"/v1/jobs?tenant=t9", ""); got.status != 200 || !f.who.Operator || f.query.Tenant != "t9" || !strings.Contains(got.body, `"tenant":"t9"`) {
		t.Errorf("%d %s, asked as %+v for %+v", got.status, got.body, f.who, f.query)
	}
	do(t, "POST", handler+"/v1/jobs?tenant=t9%1b%5b2J", goodJob).wantError(t, 400, "invalid_parameter", "control characters")
	if got := do(t, "POST", handler+"/v1/jobs?tenant=t9&idempotency_key=k", goodJob); got.status != 202 || f.submitted.Who.Tenant != "t9" || f.submitted.IdempotencyKey != "k" {
		t.Errorf("%d, submitted %+v", got.status, f.submitted)
	}
	if got := do(t, "POST", handler+"/v1/chat/completions", `{"model":"m"}`); got.status != 404 {
		t.Errorf("a completion there gives %d", got.status)
	}
}

func FuzzScanJob(f *testing.F) {
	for _, seed := range []string{goodJob, "", "{}", `{"body":{"model":"m"},"endpoint":"/v1/embeddings","priority":9,"expires_in":"1d"}`, `{"body":{"model":"m","stream":true}}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := scanJob(text)
		if err != nil {
			return
		}
		var loose struct {
			Endpoint string
			Body     struct{ Model string }
		}
		if err := json.Unmarshal(text, &loose); err != nil {
			t.Fatalf("taken, but encoding/json says %v", err)
		}
		if loose.Endpoint != r.Endpoint || loose.Body.Model != r.Model || r.Priority < 0 || r.Priority > 9 {
			t.Fatalf("read %+v, encoding/json %+v", r, loose)
		}
		if _, err := openai.Parse(openai.EndpointAt(r.Endpoint), r.Body); err != nil {
			t.Fatalf("the body was taken, and is refused alone: %v", err)
		}
	})
}
