package openai

// Endpoint is a path that takes a POST with a model in its body.
type Endpoint struct {
	// Path is the canonical one. Servers keep some beside /v1.
	Path string
	// Completes: an answer has choices, and a stream of it ends with a
	// finish_reason for each choice and [DONE].
	Completes bool
	// Generates: a plain answer takes as long as all of its tokens.
	Generates bool
	// Embeds: an answer has data, one vector for each input.
	Embeds bool
	// Cacheable: an answer may be kept and given again.
	Cacheable bool
	// Job: a request may be submitted as a job.
	Job bool
}

// Endpoints is the whole table. Of those without marks nothing is known but
// that they take a model: they pass through, and fail over before content.
var Endpoints = []Endpoint{
	{Path: "/v1/chat/completions", Completes: true, Generates: true, Cacheable: true, Job: true},
	{Path: "/v1/completions", Completes: true, Generates: true, Cacheable: true, Job: true},
	{Path: "/v1/embeddings", Embeds: true, Cacheable: true, Job: true},
	{Path: "/v1/responses", Generates: true},
	{Path: "/v1/messages", Generates: true},
	{Path: "/v1/messages/count_tokens"},
	{Path: "/v1/rerank"},
	{Path: "/v1/score"},
	{Path: "/v1/classify"},
	{Path: "/v1/pooling"},
	{Path: "/v1/moderations"},
	{Path: "/v1/images/generations"},
	{Path: "/v1/audio/speech"},
	{Path: "/tokenize"},
	{Path: "/detokenize"},
}

var byPath = func() map[string]*Endpoint {
	m := make(map[string]*Endpoint, len(Endpoints))
	for i := range Endpoints {
		m[Endpoints[i].Path] = &Endpoints[i]
	}
	return m
}()

// EndpointAt finds an endpoint by its canonical path, nil for none.
func EndpointAt(path string) *Endpoint { return byPath[path] }
