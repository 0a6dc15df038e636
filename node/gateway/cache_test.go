package gateway

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/serving"
)

// answers is a pipeline that gives one head.
type answers struct {
	head serving.Head
	err  error
	saw  serving.Request
}

func (a *answers) Serve(_ context.Context, r serving.Request, s serving.Sink) error {
	a.saw = r
	if a.err != nil {
		return a.err
	}
	if err := s.Head(a.head); err != nil {
		return err
	}
	return s.Data([]byte(`{}`))
}

func (b *bench) post(t *testing.T, body string, header ...string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, b.url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	resp.Body = io.NopCloser(strings.NewReader(string(text)))
	return resp
}

func TestCacheHeaders(t *testing.T) {
	head := func(c serving.Cached, attempts int) serving.Head {
		return serving.Head{Status: 200, Length: 2, Attempts: attempts, Cache: c, Header: http.Header{"Content-Type": {"application/json"}}}
	}
	for _, c := range []struct {
		head                     serving.Head
		label, status, age, made string
	}{
		{head(serving.Cached{Status: serving.Miss}, 1), "miss", "", "", "1"},
		{head(serving.Cached{Status: serving.Bypass}, 2), "bypass", "", "", "2"},
		{head(serving.Cached{Status: serving.Coalesced}, 1), "coalesced", "", "", "1"},
		{
			head(serving.Cached{Status: serving.HitLocal, Key: cache.Key{105, 183}, Age: 61500 * time.Millisecond, Left: time.Hour}, 0),
			"hit-local", `dsnode; hit; ttl=3600; key="abcAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"; detail=hit-local`, "61", "0",
		},
		{
			head(serving.Cached{Status: serving.Stale, Key: cache.Key{105, 183}, Age: 2 * time.Hour, Left: -time.Hour}, 0),
			"stale", `dsnode; hit; ttl=-3600; key="abcAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"; detail=stale`, "7200", "0",
		},
	} {
		b := open(t, &answers{head: c.head}, nil)
		resp := b.post(t, `{"model":"m"}`)
		h := resp.Header
		if h.Get("X-Dsnode-Cache") != c.label || h.Get("Cache-Status") != c.status || h.Get("Age") != c.age || h.Get("X-Dsnode-Attempts") != c.made {
			t.Errorf("%s: %v", c.label, h)
		}
	}
}

func TestCacheModes(t *testing.T) {
	up := &answers{head: serving.Head{Status: 200, Length: 2}}
	b := open(t, up, nil)
	for _, c := range []struct {
		body   string
		header []string
		mode   serving.CacheMode
		same   bool // deterministic
		status int
	}{
		{`{"model":"m"}`, nil, "", false, 200},
		{`{"model":"m","temperature":0}`, nil, "", true, 200},
		{`{"model":"m","temperature":0.00e5}`, nil, "", true, 200},
		{`{"model":"m","temperature":-0.0}`, nil, "", true, 200},
		{`{"model":"m","temperature":0.01}`, nil, "", false, 200},
		{`{"model":"m","temperature":1e-9}`, nil, "", false, 200},
		{`{"model":"m","temperature":null}`, nil, "", false, 200},
		{`{"model":"m","temperature":"0"}`, nil, "", false, 200},
		{`{"model":"m","temperature":[0]}`, nil, "", false, 200},
		{`{"model":"m","x":{"temperature":0}}`, nil, "", false, 200},
		{`{"model":"m","temperature":0,"temperature":1}`, nil, "", false, 400},
		{`{"model":"m","temperature":0,"Temperature":1}`, nil, "", false, 400},
		{`{"model":"m"}`, []string{"X-Dsnode-Cache", "store"}, serving.CacheStore, false, 200},
		{`{"model":"m"}`, []string{"X-Dsnode-Cache", "no-store"}, serving.CacheNoStore, false, 200},
		{`{"model":"m"}`, []string{"X-Dsnode-Cache", "refresh"}, serving.CacheRefresh, false, 200},
		{`{"model":"m"}`, []string{"X-Dsnode-Cache", "only"}, serving.CacheOnly, false, 200},
		{`{"model":"m"}`, []string{"X-Dsnode-Cache", "yes"}, "", false, 400},
		{`{"model":"m"}`, []string{"X-Dsnode-Cache", "store", "X-Dsnode-Cache", "no-store"}, "", false, 400},
	} {
		up.saw = serving.Request{}
		resp := b.post(t, c.body, c.header...)
		if resp.StatusCode != c.status || (up.saw.ID != "") != (c.status == 200) {
			t.Errorf("%s %q: status %d", c.body, c.header, resp.StatusCode)
			continue
		}
		if up.saw.ID != "" && (up.saw.Cache != c.mode || up.saw.Deterministic != c.same) {
			t.Errorf("%s %q: %q, deterministic %v", c.body, c.header, up.saw.Cache, up.saw.Deterministic)
		}
	}
}

func TestNotInTheCache(t *testing.T) {
	b := open(t, &answers{err: serving.ErrNotCached}, nil)
	resp := b.post(t, `{"model":"m"}`, "X-Dsnode-Cache", "only")
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusGatewayTimeout || resp.Header.Get("X-Should-Retry") != "false" ||
		resp.Header.Get("X-Dsnode-Cache") != "miss" || !strings.Contains(string(text), `"code":"not_cached"`) {
		t.Errorf("%v: %d %v %s", err, resp.StatusCode, resp.Header, text)
	}
	b = open(t, &answers{err: serving.ErrLagging}, nil)
	if resp := b.post(t, `{"model":"m"}`); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
}

// TestPeersGetTheModelsName, and no header about the cache: they have their own.
func TestPeersGetTheModelsName(t *testing.T) {
	up := &answers{head: serving.Head{Status: 200, Length: 2, Model: "org/模型", Cache: serving.Cached{Status: serving.Bypass}}}
	b := open(t, up, nil)
	url := listen(t, b.Gateway, b.PeerHandler())
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/v1/chat/completions", strings.NewReader(`{"model":"m"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(serving.HeaderHops, "1")
	req.Header.Set(serving.HeaderPrincipal, "{}")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 200 || resp.Header.Get(serving.HeaderModel) != "org%2F%E6%A8%A1%E5%9E%8B" || resp.Header.Get("X-Dsnode-Cache") != "" {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
}

// keeps is a pipeline whose answers come from the cache, and are so long.
type keeps int

func (n keeps) Serve(_ context.Context, _ serving.Request, s serving.Sink) error {
	err := s.Head(serving.Head{
		Status: 200, Length: int64(n), Whole: true, Header: http.Header{"Content-Type": {"application/json"}},
		Cache: serving.Cached{Status: serving.HitLocal, Key: cache.Key{1}},
	})
	if err != nil {
		return err
	}
	return s.Data([]byte(strings.Repeat(" ", int(n))))
}

// TestLengthOfAHit: a hit has a Content-Length, whether net/http or the gateway sets it.
func TestLengthOfAHit(t *testing.T) {
	for _, n := range []int{0, 1, 1024, countedByHTTP - 1, countedByHTTP, countedByHTTP + 1, 100_000} {
		resp := open(t, keeps(n), nil).post(t, `{"model":"m"}`)
		if resp.ContentLength != int64(n) || len(resp.TransferEncoding) != 0 {
			t.Errorf("%d bytes: Content-Length %d, %v", n, resp.ContentLength, resp.TransferEncoding)
		}
	}
}
