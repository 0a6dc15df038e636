package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/storage/journal"
)

// Jobs is what the job routes need of *jobs.Jobs.
type Jobs interface {
	Submit(ctx context.Context, r *jobs.Request) (*jobs.View, error)
	Get(ctx context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error)
	List(ctx context.Context, who jobs.Caller, q jobs.Query) (jobs.Page, error)
	Cancel(ctx context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error)
	Retry(ctx context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error)
	Delete(ctx context.Context, who jobs.Caller, id journal.JobID) error
	// Elsewhere asks other nodes for a job that this node doesn't know.
	Elsewhere(ctx context.Context, who jobs.Caller, method, path string, id journal.JobID) (*jobs.Relayed, error)
}

const (
	defaultPage = 20
	maxKeyBytes = 255 // of an Idempotency-Key
	maxTenant   = 256
	// maxJobBytes bounds a submission: its record must fit into the journal with what else
	// is in it, also when it can't be compressed.
	maxJobBytes = journal.MaxPayload - 64<<10
)

var jobBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 1<<10); return &b }}

// jobs is POST and GET /v1/jobs.
func (x *exchange) jobs(string) {
	x.answerJobs(func(who jobs.Caller) *failure {
		if x.r.Method == http.MethodPost {
			return x.submitJob(who)
		}
		return x.listJobs(who)
	})
}

// job is /v1/jobs/{id} and the paths below it.
func (x *exchange) job(rest string) {
	text, verb, below := strings.Cut(rest, "/")
	method := x.r.Method
	switch {
	case below && verb != "cancel" && verb != "retry":
		x.identify()
		x.refuse(unknownRoute(x.r))
		return
	case below && method != http.MethodPost, !below && method == http.MethodPost:
		x.identify()
		allowed := &route{methods: []string{http.MethodGet, http.MethodHead, http.MethodDelete}}
		if below {
			allowed.methods = post
		}
		x.w.Header()["Allow"] = []string{strings.Join(allowed.methods, ", ")}
		x.refuse(wrongMethod(x.r, allowed))
		return
	}
	x.answerJobs(func(who jobs.Caller) *failure {
		if f := x.noParameters(); f != nil {
			return f
		}
		id, err := journal.ParseJobID(text)
		if err != nil {
			return unknownJob(text)
		}
		err = x.do(verb, who, id)
		if errors.Is(err, jobs.ErrNotFound) && x.from == clients {
			path := "/v1/jobs/" + id.String()
			if below {
				path += "/" + verb
			}
			var there *jobs.Relayed
			if there, err = x.g.o.Jobs.Elsewhere(x.r.Context(), who, method, path, id); err == nil {
				x.relayJob(there)
				return nil
			}
		}
		if errors.Is(err, jobs.ErrNotFound) {
			return unknownJob(text)
		}
		return x.explainJob(err, who)
	})
}

// answerJobs authenticates the caller, enforces limits.in_flight, and sends the error if
// there is one.
func (x *exchange) answerJobs(answer func(who jobs.Caller) *failure) {
	x.identify()
	g := x.g
	if !g.enter() {
		x.refuse(g.shed(shedInFlight))
		return
	}
	defer g.leave()
	defer x.release()
	principal, _, f := x.authenticate()
	if f == nil {
		f = x.enterShare(principal)
	}
	if f == nil {
		f = answer(jobs.Caller{Principal: principal, Operator: x.from == operators, Peer: x.from == peers})
	}
	if f != nil && x.r.Context().Err() == nil {
		x.refuse(f)
	}
}

func (x *exchange) submitJob(who jobs.Caller) *failure {
	if x.from == peers {
		return unknownRoute(x.r) // a node that is asked takes the job itself
	}
	key, f := x.onBehalf(&who)
	if f != nil {
		return f
	}
	cfg := x.g.config()
	body, f := x.readBody(min(cfg.Limits.BodyBytes, maxJobBytes))
	if f != nil {
		if f.status == http.StatusRequestEntityTooLarge && cfg.Limits.BodyBytes > maxJobBytes {
			f.message = fmt.Sprintf("A job may have %d bytes, less than other requests (%d). Ask for this one without a job.", maxJobBytes, cfg.Limits.BodyBytes)
		}
		return f
	}
	r, err := scanJob(body)
	if err != nil {
		return explain(err, "")
	}
	if r.IdempotencyKey, f = x.idempotencyKey(key); f != nil {
		return f
	}
	if _, known := cfg.Models[r.Model]; !known || !who.Allows(r.Model) {
		f := unknownModel(r.Model)
		f.param = "body.model"
		return f
	}
	r.Who = who.Principal
	v, err := x.g.o.Jobs.Submit(x.r.Context(), &r)
	if err != nil {
		return x.explainJob(err, who)
	}
	x.sendJob(http.StatusAccepted, v)
	return nil
}

// idempotencyKey is the header, or the parameter that an operator gave in its place.
func (x *exchange) idempotencyKey(given string) (string, *failure) {
	keys := x.r.Header["Idempotency-Key"]
	switch {
	case len(keys) == 0 && given == "":
		return "", nil
	case len(keys) == 0 && validKey(given):
		return given, nil
	case len(keys) == 1 && given == "" && validKey(keys[0]):
		return keys[0], nil
	}
	return "", invalid(http.StatusBadRequest, "invalid_idempotency_key", "Idempotency-Key must be one value of 1 to 255 printable characters.")
}

func validKey(key string) bool {
	return key != "" && len(key) <= maxKeyBytes && strings.IndexFunc(key, func(c rune) bool { return c < ' ' || c > '~' }) < 0
}

// onBehalf reads the tenant and the idempotency key that an operator may give for a job.
func (x *exchange) onBehalf(who *jobs.Caller) (key string, f *failure) {
	q, f := x.parameters()
	if f != nil {
		return "", f
	}
	for name := range q {
		if !who.Operator || name != "tenant" && name != "idempotency_key" {
			return "", unknownParameter(name)
		}
	}
	if who.Operator {
		who.Tenant = q.Get("tenant")
	}
	if f := validTenant(who.Tenant); f != nil || agreed.IsLine(who.Tenant) {
		return q.Get("idempotency_key"), f
	}
	return "", badParameter("tenant", "must be one line without control characters")
}

// do does with a job what the verb or else the method says, and sends the result.
func (x *exchange) do(verb string, who jobs.Caller, id journal.JobID) (err error) {
	var v *jobs.View
	ctx, status := x.r.Context(), http.StatusOK
	switch {
	case verb == "cancel":
		v, err = x.g.o.Jobs.Cancel(ctx, who, id)
	case verb == "retry":
		status = http.StatusAccepted
		v, err = x.g.o.Jobs.Retry(ctx, who, id)
	case x.r.Method == http.MethodDelete:
		return x.deleteJob(who, id)
	default:
		v, err = x.g.o.Jobs.Get(ctx, who, id)
	}
	if err == nil {
		x.sendJob(status, v)
	}
	return err
}

func (x *exchange) deleteJob(who jobs.Caller, id journal.JobID) error {
	err := x.g.o.Jobs.Delete(x.r.Context(), who, id)
	if err == nil {
		x.reply(http.StatusOK, struct {
			ID      string `json:"id"`
			Object  string `json:"object"`
			Deleted bool   `json:"deleted"`
		}{id.String(), "job", true})
	}
	return err
}

func (x *exchange) listJobs(who jobs.Caller) *failure {
	q, f := x.listQuery(who)
	if f != nil {
		return f
	}
	page, err := x.g.o.Jobs.List(x.r.Context(), who, q)
	if err != nil {
		return x.explainJob(err, who)
	}
	b := append([]byte(nil), `{"object":"list","data":[`...)
	for i, v := range page.Jobs {
		if i > 0 {
			b = append(b, ',')
		}
		if who.Operator && v.Error != "" {
			// The list is for looking around; who reads a job asks for it by its id.
			v.Error = openai.WithoutWords(v.Error)
		}
		b = v.AppendJSON(b)
	}
	first, last := "null", "null"
	if n := len(page.Jobs); n > 0 {
		first, last = strconv.Quote(page.Jobs[0].ID.String()), strconv.Quote(page.Jobs[n-1].ID.String())
	}
	b = append(b, `],"first_id":`+first+`,"last_id":`+last+`,"has_more":`...)
	b = append(strconv.AppendBool(b, page.More), '}')
	x.sendJSON(http.StatusOK, b)
	return nil
}

func (x *exchange) listQuery(who jobs.Caller) (q jobs.Query, f *failure) {
	values, f := x.parameters()
	if f != nil {
		return q, f
	}
	q.Limit = defaultPage
	for name := range values {
		text := values.Get(name)
		var err error
		switch {
		case name == "limit":
			q.Limit, err = strconv.Atoi(text)
			if err != nil || q.Limit < 1 || q.Limit > jobs.MaxPage {
				return q, badParameter(name, "must be a number from 1 to "+strconv.Itoa(jobs.MaxPage))
			}
		case name == "status":
			for one := range strings.SplitSeq(text, ",") {
				s := journal.Status(one)
				if !s.Final() && s != journal.Queued && s != journal.Running {
					return q, badParameter(name, "must be one of queued, running, succeeded, failed, cancelled, expired, or several with commas between")
				}
				q.Status = append(q.Status, s)
			}
		case name == "after":
			q.After, err = journal.ParseJobID(text)
		case name == "before":
			q.Before, err = journal.ParseJobID(text)
		case name == "tenant" && who.Operator:
			if q.Tenant, f = text, validTenant(text); f != nil {
				return q, f
			}
		default:
			return q, unknownParameter(name)
		}
		if err != nil {
			return q, badParameter(name, "must be the id of a job")
		}
	}
	if values.Has("after") && values.Has("before") {
		return q, badParameter("before", "can't be given together with after")
	}
	return q, nil
}

func validTenant(name string) *failure {
	if len(name) > maxTenant || !utf8.ValidString(name) {
		return badParameter("tenant", "must be a tenant's name")
	}
	return nil
}

// parameters reads the query, and refuses a parameter that is given twice.
func (x *exchange) parameters() (url.Values, *failure) {
	if x.r.URL.RawQuery == "" {
		return nil, nil
	}
	q, err := url.ParseQuery(x.r.URL.RawQuery)
	if err != nil {
		return nil, badParameter("", "the query can't be read")
	}
	for name, values := range q {
		if len(values) > 1 {
			return nil, badParameter(name, "is given twice")
		}
	}
	return q, nil
}

func (x *exchange) noParameters() *failure {
	q, f := x.parameters()
	for name := range q {
		return unknownParameter(name)
	}
	return f
}

func (x *exchange) sendJob(status int, v *jobs.View) {
	buf := jobBuffers.Get().(*[]byte) //nolint:errcheck // the pool holds nothing else
	b := v.AppendJSON((*buf)[:0])
	if status == http.StatusAccepted {
		x.w.Header()["Location"] = []string{"/v1/jobs/" + v.ID.String()}
	}
	x.sendJSON(status, b)
	if cap(b) <= 64<<10 {
		*buf = b
		jobBuffers.Put(buf)
	}
}

func (x *exchange) sendJSON(status int, b []byte) {
	h := x.w.Header()
	h["Content-Type"] = jsonType
	h["Content-Length"] = []string{strconv.Itoa(len(b))}
	h["Cache-Control"] = noStore
	x.w.WriteHeader(status)
	if x.r.Method != http.MethodHead {
		_, _ = x.w.Write(b) //nolint:gosec // JSON, and said to be; a client that has gone can't be told
	}
}

// relayJob passes another node's answer on.
func (x *exchange) relayJob(there *jobs.Relayed) {
	for _, k := range [...]string{"Location", "Retry-After", "X-Should-Retry", "X-Dsnode-Node", "X-Dsnode-Site"} {
		if v, ok := there.Header[k]; ok {
			x.w.Header()[k] = v
		}
	}
	x.sendJSON(there.Status, there.Body)
}
