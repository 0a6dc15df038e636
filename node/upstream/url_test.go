package upstream

import "testing"

func TestJoin(t *testing.T) {
	for _, c := range []struct{ base, endpoint, want string }{
		{"http://x/v1", "/v1/chat/completions", "http://x/v1/chat/completions"},
		{"http://x/v1/", "/v1/chat/completions", "http://x/v1/chat/completions"},
		{"http://x:80", "/v1/embeddings", "http://x:80/v1/embeddings"},
		{"https://api.deepseek.com", "/v1/chat/completions", "https://api.deepseek.com/v1/chat/completions"},
		{"https://api.deepseek.com/beta", "/v1/completions", "https://api.deepseek.com/beta/completions"},
		{"http://x/api/v1", "/v1/rerank", "http://x/api/v1/rerank"},
		{"http://x/v1", "/tokenize", "http://x/tokenize"},
		{"http://x/api/v1", "/tokenize", "http://x/api/tokenize"},
	} {
		b, err := parseBase(c.base)
		if err != nil {
			t.Fatal(err)
		}
		if got := b.join(c.endpoint).String(); got != c.want {
			t.Errorf("%s + %s = %s", c.base, c.endpoint, got)
		}
	}
	for _, bad := range []string{"", "x/v1", "ftp://x", "http://", "http://[x"} {
		if _, err := parseBase(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
