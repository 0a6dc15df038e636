package openai

import "testing"

func TestEndpointAt(t *testing.T) {
	for i := range Endpoints {
		if e := &Endpoints[i]; EndpointAt(e.Path) != e || (e.Completes && !e.Generates) || (e.Completes && e.Embeds) {
			t.Errorf("%+v", e)
		}
	}
	for _, path := range []string{"", "/chat/completions", "/v1/models"} {
		if e := EndpointAt(path); e != nil {
			t.Errorf("%s: %+v", path, e)
		}
	}
}
