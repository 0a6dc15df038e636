package modelsim

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// query has the fields of a request that the simulator uses.
type query struct {
	common
	Messages      json.RawMessage `json:"messages"`
	Prompt        json.RawMessage `json:"prompt"`
	Input         json.RawMessage `json:"input"`
	N             int             `json:"n"`
	MaxTokens     *int            `json:"max_tokens"`
	MaxCompletion *int            `json:"max_completion_tokens"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	Tools []struct {
		Function struct {
			Name string `json:"name"`
		} `json:"function"`
	} `json:"tools"`
	ToolChoice     json.RawMessage `json:"tool_choice"`
	Dimensions     int             `json:"dimensions"`
	EncodingFormat string          `json:"encoding_format"`

	body []byte
	name string // Model without its "@" settings
	pace pace
}

// common has the fields that are read of every request.
type common struct {
	Model  string `json:"model"`
	Stream bool   `json:"stream"`
}

// pace is the speed and the length of an answer.
type pace struct {
	first  time.Duration
	rate   float64 // tokens per second, 0: all at once
	tokens int
}

func (s *Server) parse(r *http.Request, body []byte, known bool) (*query, error) {
	q := &query{body: body}
	var into any = &q.common
	if known {
		into = q
	}
	if err := json.Unmarshal(body, into); err != nil {
		return q, err
	}
	q.pace = pace{s.opts.FirstToken, s.opts.Rate, s.opts.Tokens}
	name, settings, _ := strings.Cut(q.Model, "@")
	q.name = name
	for kv := range strings.SplitSeq(settings, ",") {
		k, v, _ := strings.Cut(kv, "=")
		if err := q.pace.set(k, v); err != nil {
			return q, err
		}
	}
	for header, k := range map[string]string{"X-Sim-First-Token": "first", "X-Sim-Rate": "rate", "X-Sim-Tokens": "tokens"} {
		if v := r.Header.Get(header); v != "" {
			if err := q.pace.set(k, v); err != nil {
				return q, err
			}
		}
	}
	if q.N == 0 {
		q.N = 1
	}
	if q.N < 0 || q.N > maxChoices {
		return q, fmt.Errorf("n must be between 1 and %d, got %d", maxChoices, q.N)
	}
	if q.Dimensions < 0 || q.Dimensions > maxDimension {
		return q, fmt.Errorf("dimensions must be at most %d, got %d", maxDimension, q.Dimensions)
	}
	if l := q.limit(); l != nil && *l < 1 {
		return q, fmt.Errorf("max_tokens must be positive, got %d", *l)
	}
	return q, nil
}

func (p *pace) set(k, v string) (err error) {
	switch k {
	case "":
	case "first":
		p.first, err = time.ParseDuration(v)
	case "rate":
		p.rate, err = strconv.ParseFloat(v, 64)
	case "tokens":
		p.tokens, err = strconv.Atoi(v)
	default:
		err = errors.New("known are first, rate and tokens")
	}
	if err == nil && (p.first < 0 || p.rate < 0 || p.tokens < 1 || p.tokens > maxTokens) {
		err = errors.New("out of range")
	}
	if err != nil {
		return fmt.Errorf("setting %s=%s: %w", k, v, err)
	}
	return nil
}

func (q *query) limit() *int {
	if q.MaxCompletion != nil {
		return q.MaxCompletion
	}
	return q.MaxTokens
}

// field is a field of a chat delta.
type field string

const (
	content   field = "content"
	reasoning field = "reasoning_content"
	arguments field = "arguments" // of the tool call
)

// token is one word of an answer.
type token struct {
	field field
	text  string
}

// answer is one choice of a response.
type answer struct {
	tokens []token
	tool   string // name of the called function; empty: the answer is text
	finish string
}

func (a *answer) text(f field) string {
	var b strings.Builder
	for _, t := range a.tokens {
		if t.field == f {
			b.WriteString(t.text)
		}
	}
	return b.String()
}

type usage struct {
	Prompt     int `json:"prompt_tokens"`
	Completion int `json:"completion_tokens"`
	Total      int `json:"total_tokens"`
	// DeepSeek's fields. The simulator has no KV cache, so all tokens are misses.
	Hit     int             `json:"prompt_cache_hit_tokens"`
	Miss    int             `json:"prompt_cache_miss_tokens"`
	Details *completionInfo `json:"completion_tokens_details,omitempty"`
}

type completionInfo struct {
	Reasoning int `json:"reasoning_tokens"`
}

// The two Chinese words make sure that tests don't take a token for a byte.
var vocabulary = strings.Fields(`the a site city node answer primary remote lease epoch journal
record quorum voter leader copy stream token model prompt cache retry budget drill switch
window signal harbour river bridge garden winter morning quiet bright steady early 上海 北京`)

// compose writes choice number i of the answer to question.
func (q *query) compose(question []byte, i int) *answer {
	sum := sha256.Sum256(question)
	rng := rand.New(rand.NewPCG(binary.BigEndian.Uint64(sum[:]), uint64(i))) //nolint:gosec // repeatable on purpose
	label := "sim-" + hex.EncodeToString(sum[:4])
	if i > 0 {
		label += "." + strconv.Itoa(i)
	}
	n, a := q.pace.tokens, &answer{finish: "stop"}
	if l := q.limit(); l != nil && *l < n {
		n, a.finish = *l, "length"
	}
	if a.tool = q.toolCalled(); a.tool != "" {
		a.finish = "tool_calls"
		for _, part := range []string{`{"sim":`, `"` + label + `"`, `}`} {
			a.tokens = append(a.tokens, token{arguments, part})
		}
		return a
	}
	thought := 0
	if strings.Contains(q.name, "reasoner") {
		thought = min(q.pace.tokens/4+1, n)
	}
	for k := range n {
		f, word := content, vocabulary[rng.IntN(len(vocabulary))]
		if k < thought {
			f = reasoning
		}
		switch k {
		case thought:
			word = label + ":"
		case 0:
		default:
			word = " " + word
		}
		a.tokens = append(a.tokens, token{f, word})
	}
	return a
}

// toolCalled is the function that tool_choice requires; empty: none.
func (q *query) toolCalled() string {
	if len(q.Tools) == 0 || len(q.ToolChoice) == 0 {
		return ""
	}
	var named struct {
		Function struct {
			Name string `json:"name"`
		} `json:"function"`
	}
	if bytes.Equal(q.ToolChoice, []byte(`"required"`)) {
		return q.Tools[0].Function.Name
	}
	if json.Unmarshal(q.ToolChoice, &named) == nil {
		return named.Function.Name
	}
	return ""
}

// countTokens estimates four bytes per token, and at least one token.
func countTokens(b []byte) int { return max(1, len(b)/4) }

func measure(question []byte, answers []*answer) usage {
	u := usage{Prompt: countTokens(question)}
	thought := 0
	for _, a := range answers {
		u.Completion += len(a.tokens)
		for _, t := range a.tokens {
			if t.field == reasoning {
				thought++
			}
		}
	}
	u.Total, u.Miss = u.Prompt+u.Completion, u.Prompt
	if thought > 0 {
		u.Details = &completionInfo{thought}
	}
	return u
}
