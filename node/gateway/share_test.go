package gateway

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/serving"
)

// tenants takes each token as the name of a tenant.
type tenants struct{}

func (tenants) Authenticate(token string, _ bool) (serving.Principal, error) {
	if token == "" {
		return serving.Principal{}, nil
	}
	return serving.Principal{KeyID: "key of " + token, Tenant: token}, nil
}

// waiting answers requests when leave is closed, and sends to enter for each that waits.
func waiting() (server serving.Server, enter, leave chan struct{}) {
	enter, leave = make(chan struct{}, 16), make(chan struct{})
	return serverFunc(func(_ context.Context, _ serving.Request, s serving.Sink) error {
		enter <- struct{}{}
		<-leave
		return errors.Join(s.Head(serving.Head{Status: 200, Length: -1}), s.Data([]byte("{}")))
	}), enter, leave
}

// One tenant can't take all requests in progress: others are served meanwhile.
func TestATenantsShareOfTheRequests(t *testing.T) {
	for _, anonymous := range []bool{false, true} {
		server, enter, leave := waiting()
		b := open(t, server, func(o *Options) {
			cfg := testConfig()
			cfg.Limits.InFlight, cfg.Access.Anonymous = 4, anonymous
			o.Config, o.Auth = func() *config.Config { return cfg }, tenants{}
		})
		var done sync.WaitGroup
		served := func(token string) {
			done.Go(func() {
				if g := do(t, "POST", b.url+"/v1/completions", chat, "Authorization", "Bearer "+token); g.status != 200 {
					t.Error(token, g)
				}
			})
			<-enter
		}
		large := "large"
		if anonymous {
			large = "" // the clients without a key are like one tenant
		}
		served(large)
		served(large)
		got := do(t, "POST", b.url+"/v1/completions", chat, "Authorization", "Bearer "+large)
		got.wantError(t, 429, "tenant_share", "requests in progress: 2, which is 50 % (limits.tenant_share)")
		if !anonymous && !strings.Contains(got.body, `tenant \"large\"`) && !strings.Contains(got.body, `Tenant \"large\"`) {
			t.Errorf("the refusal does not name the tenant: %s", got.body)
		}
		if got.header.Get("Retry-After") != "1" {
			t.Errorf("Retry-After %q", got.header.Get("Retry-After"))
		}
		peer := listen(t, b.Gateway, b.PeerHandler())
		who := `{"key_id":"k","tenant":"large"}`
		if anonymous {
			who = "{}"
		}
		// A node that is refused so asks another one.
		do(t, "POST", peer+"/v1/completions", chat, serving.HeaderHops, "1", serving.HeaderPrincipal, who).wantError(t, 503, "overloaded", "")
		served("small")
		if n := b.value(t, "dsnode_requests_shed_total", "reason", "tenant_share"); n != 2 {
			t.Errorf("shed %v", n)
		}
		close(leave)
		done.Wait()
		if g := do(t, "POST", b.url+"/v1/completions", chat, "Authorization", "Bearer "+large); g.status != 200 {
			t.Errorf("after its requests have ended: %v", g)
		}
	}
}

// Without keys nobody has to share.
func TestClientsWithoutAKeyHaveNoShare(t *testing.T) {
	server, enter, leave := waiting()
	b := open(t, server, func(o *Options) {
		cfg := testConfig()
		cfg.Limits.InFlight = 2
		o.Config, o.Auth = func() *config.Config { return cfg }, tenants{}
	})
	var done sync.WaitGroup
	for range 2 {
		done.Go(func() {
			if g := do(t, "POST", b.url+"/v1/completions", chat); g.status != 200 {
				t.Error(g)
			}
		})
		<-enter
	}
	close(leave)
	done.Wait()
}

// One tenant can't take all memory for bodies.
func TestATenantsShareOfTheMemory(t *testing.T) {
	server, enter, leave := waiting()
	const large = 300 << 10
	b := open(t, server, func(o *Options) {
		cfg := testConfig()
		cfg.Limits.BodyBytes = 400 << 10 // so a share is at least 800 KiB
		o.Config, o.Auth, o.BodyMemory = func() *config.Config { return cfg }, tenants{}, 2<<20
	})
	body := strings.Replace(chat, "hi", strings.Repeat("x", large), 1)
	var done sync.WaitGroup
	served := func(token string) {
		done.Go(func() {
			if g := do(t, "POST", b.url+"/v1/completions", body, "Authorization", "Bearer "+token); g.status != 200 {
				t.Error(token, g)
			}
		})
		<-enter
	}
	for range 3 {
		served("large")
	}
	do(t, "POST", b.url+"/v1/completions", body, "Authorization", "Bearer large").wantError(t, 429, "tenant_share", "memory for bodies")
	served("small")
	close(leave)
	done.Wait()
	if g := do(t, "POST", b.url+"/v1/completions", body, "Authorization", "Bearer large"); g.status != 200 {
		t.Errorf("after its requests have ended: %v", g)
	}
}
