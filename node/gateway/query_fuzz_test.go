package gateway

import (
	"net/http/httptest"
	"net/url"
	"testing"
	"unicode/utf8"

	"github.com/dsnode/dsnode/node/jobs"
)

// Whatever stands in the query of a list of jobs, the answer is a query within its bounds
// or a refusal with valid text, and an operator's parameter is never taken from a client.
func FuzzListQuery(f *testing.F) {
	for _, q := range []string{
		"limit=10&status=queued,running", "after=job_0123456789abcdef0123456789abcdef", "before=x", "tenant=acme", "limit=-1", "limit=1&limit=2",
		"status=%ff", "after=&before=", "%", "a;b", "limit=99999999999999999999", "tenant=%00",
	} {
		f.Add(q, true)
		f.Add(q, false)
	}
	f.Fuzz(func(t *testing.T, raw string, operator bool) {
		r := httptest.NewRequest("GET", "/v1/jobs", nil)
		r.URL = &url.URL{Path: "/v1/jobs", RawQuery: raw}
		x := &exchange{r: r}
		q, failed := x.listQuery(jobs.Caller{Operator: operator})
		switch {
		case failed != nil:
			if failed.status != 400 || !utf8.ValidString(failed.message) || len(failed.message) > 2200 || !utf8.Valid(failed.json()) {
				t.Fatalf("refused with %+v", failed)
			}
		case q.Limit < 1 || q.Limit > jobs.MaxPage || !operator && q.Tenant != "" || len(q.Tenant) > maxTenant:
			t.Fatalf("accepted %+v", q)
		}
	})
}

// Whatever a client gives as its id or as an idempotency key, only printable ASCII of a
// bounded length is taken: both go into headers, and the id into logs.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"", "req_1", "a b", "x\r\nSet-Cookie: y", "é", "\"", "\x7f"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, key := saneID(s), validKey(s)
		if !id && !key {
			return
		}
		for i := range len(s) {
			if c := s[i]; c < ' ' || c > '~' || id && (c == ' ' || c == '"' || c == '\\') {
				t.Fatalf("took %q (id %v, key %v)", s, id, key)
			}
		}
		if id && len(s) > 128 || len(s) > maxKeyBytes {
			t.Fatalf("took %d bytes", len(s))
		}
	})
}
