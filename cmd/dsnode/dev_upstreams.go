package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// devUpstream is a model server of a dev cluster, with its models.
type devUpstream struct {
	name, site, url string
	kind            config.UpstreamKind
	keyEnv          string   // variable that holds its API key, empty for none
	models          []string // as the server names them
}

// The simulated models. The second sends reasoning_content before its answer.
var simulatedModels = []string{"deepseek-chat", "deepseek-reasoner"}

// devDefaultModel is a model that every dev cluster has.
const devDefaultModel = "deepseek-chat"

const (
	discoverWithin = 10 * time.Second
	// Of a server with more models the first ones are offered.
	maxDiscovered = 200
	maxModelList  = 4 << 20
)

func simulatedUpstreams(basePort int) []devUpstream {
	var all []devUpstream
	for s, site := range devSites {
		all = append(all, devUpstream{
			name: site.name + "-sim", site: site.name, kind: config.KindOpenAI,
			url: "http://" + loopback(devSimPort(basePort, s)) + "/v1", models: simulatedModels,
		})
	}
	return all
}

// discoverUpstreams parses the values of --upstream and asks each server for its
// models. A server without a site becomes one upstream in each site.
func discoverUpstreams(ctx context.Context, env *environment, values []string) ([]devUpstream, error) {
	var all []devUpstream
	for i, value := range values {
		u, err := parseUpstream(value)
		if err != nil {
			return nil, err
		}
		if u.models, err = listModels(ctx, env, u); err != nil {
			return nil, failure("start the server first; the URL is the base URL of its clients, ending in /v1",
				"can't list the models of %s: %v", u.url, err)
		}
		sites := []string{u.site}
		if u.site == "" {
			sites = sites[:0]
			for _, s := range devSites {
				sites = append(sites, s.name)
			}
		}
		for _, site := range sites {
			u.name, u.site = fmt.Sprintf("%s-%s-%d", site, u.kind, i+1), site
			all = append(all, u)
		}
	}
	return all, nil
}

// parseUpstream reads [SITE=]URL[,kind=KIND][,key-env=NAME].
func parseUpstream(value string) (devUpstream, error) {
	const hint = "write [SITE=]URL[,kind=vllm|sglang|llamacpp|ollama|deepseek|openai][,key-env=NAME]"
	parts := strings.Split(value, ",")
	u := devUpstream{kind: config.KindOpenAI, url: parts[0]}
	if site, rest, found := strings.Cut(parts[0], "="); found && !strings.Contains(site, "://") {
		u.site, u.url = site, rest
		if !slices.ContainsFunc(devSites, func(s devSite) bool { return s.name == site }) {
			return u, usage("the sites are shanghai-a, shanghai-b and beijing", "--upstream %s: there is no site %q", value, site)
		}
	}
	if !strings.HasPrefix(u.url, "http://") && !strings.HasPrefix(u.url, "https://") {
		return u, usage(hint, "--upstream %s: the URL must begin with http:// or https://", value)
	}
	u.url = strings.TrimRight(u.url, "/")
	kinds := []config.UpstreamKind{
		config.KindVLLM, config.KindSGLang, config.KindLlamaCPP, config.KindOllama, config.KindDeepSeek, config.KindOpenAI,
	}
	for _, option := range parts[1:] {
		name, text, _ := strings.Cut(option, "=")
		switch {
		case name == "kind" && slices.Contains(kinds, config.UpstreamKind(text)):
			u.kind = config.UpstreamKind(text)
		case name == "kind":
			return u, usage(hint, "--upstream %s: there is no kind %q", value, text)
		case name == "key-env" && text != "":
			u.keyEnv = text
		default:
			return u, usage(hint, "--upstream %s: unknown option %q", value, option)
		}
	}
	return u, nil
}

// listModels asks GET URL/models.
func listModels(ctx context.Context, env *environment, u devUpstream) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, discoverWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.url+"/models", nil)
	if err != nil {
		return nil, err
	}
	if u.keyEnv != "" {
		key := env.getenv(u.keyEnv)
		if key == "" {
			return nil, fmt.Errorf("the environment variable %s is empty", u.keyEnv)
		}
		req.Header.Set("Authorization", "Bearer "+key)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }() // only read from
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s/models answered %s", u.url, resp.Status)
	}
	var list struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxModelList)).Decode(&list); err != nil {
		return nil, fmt.Errorf("GET %s/models did not return a list of models: %w", u.url, err)
	}
	var models []string
	for _, m := range list.Data {
		if m.ID != "" && !slices.Contains(models, m.ID) && len(models) < maxDiscovered {
			models = append(models, m.ID)
		}
	}
	if len(models) == 0 {
		return nil, fmt.Errorf("GET %s/models lists no models", u.url)
	}
	return models, nil
}

// devClusterYAML writes a cluster.yaml for the three sites. Names of models are quoted
// as JSON strings, which are valid YAML.
func devClusterYAML(upstreams []devUpstream) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Written by dsnode dev. Change it with: dsnode config get > f; edit f; dsnode config apply f")
	line("version: 1")
	line("sites:")
	for i, s := range devSites {
		line("  %s: {city: %s, priority: %d}", s.name, s.city, i+1)
	}
	line("upstreams:")
	for _, u := range upstreams {
		key := ""
		if u.keyEnv != "" {
			key = fmt.Sprintf(", api_key: {env: %s}", quoted(u.keyEnv))
		}
		line("  %s: {site: %s, kind: %s, url: %s%s}", u.name, u.site, u.kind, quoted(u.url), key)
	}
	line("models:")
	for _, m := range offered(upstreams) {
		line("  %s:", quoted(m.name))
		line("    serve:")
		for _, u := range upstreams {
			if !slices.Contains(u.models, m.upstream) {
				continue
			}
			alias := ""
			if m.name != m.upstream {
				alias = ", model: " + quoted(m.upstream)
			}
			line("      - {upstream: %s%s}", u.name, alias)
		}
	}
	return b.String()
}

// devModel is a model's name for clients and its name at the servers.
type devModel struct{ name, upstream string }

// offered lists every model once, and the first also as deepseek-chat unless a server
// has a model of that name.
func offered(upstreams []devUpstream) []devModel {
	var all []devModel
	for _, u := range upstreams {
		for _, m := range u.models {
			if !slices.Contains(all, devModel{m, m}) {
				all = append(all, devModel{m, m})
			}
		}
	}
	if len(all) > 0 && !slices.Contains(all, devModel{devDefaultModel, devDefaultModel}) {
		all = slices.Insert(all, 0, devModel{devDefaultModel, all[0].upstream})
	}
	return all
}

func quoted(s string) string {
	text, err := json.Marshal(s)
	if err != nil {
		return `""` // a string always encodes
	}
	return string(text)
}
