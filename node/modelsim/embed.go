package modelsim

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"math"
	"math/rand/v2"
	"net/http"
)

const maxInputs = 2048

// embed answers POST /embeddings with a unit vector for each input, which depends only on
// the input's bytes.
func (c *call) embed() error {
	inputs, ok := splitInput(c.q.Input)
	if !ok {
		c.status = http.StatusBadRequest
		writeError(c.w, c.status, "invalid_request_error", "bad_input", "input must be a string, tokens, or a list of at most 2048 of either")
		return nil
	}
	dims := c.q.Dimensions
	if dims == 0 {
		dims = c.s.opts.Dimensions
	}
	type item struct {
		Object    string `json:"object"`
		Index     int    `json:"index"`
		Embedding any    `json:"embedding"`
	}
	tokens, data := 0, make([]item, 0, len(inputs))
	for i, in := range inputs {
		tokens += countTokens(in)
		var e any = vector(in, dims)
		if c.q.EncodingFormat == "base64" {
			raw, err := binary.Append(nil, binary.LittleEndian, e)
			if err != nil {
				return err
			}
			e = base64.StdEncoding.EncodeToString(raw)
		}
		data = append(data, item{"embedding", i, e})
	}
	if err := c.until(c.due(0)); err != nil {
		return err
	}
	return c.plain(mustJSON(map[string]any{
		"object": "list", "data": data, "model": c.q.Model,
		"usage": map[string]int{"prompt_tokens": tokens, "total_tokens": tokens},
	}))
}

// splitInput returns the raw JSON of each input.
func splitInput(raw json.RawMessage) ([]json.RawMessage, bool) {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return nil, false
	}
	if raw[0] == '"' {
		return []json.RawMessage{raw}, true
	}
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil || len(list) == 0 {
		return nil, false
	}
	if list[0][0] != '"' && list[0][0] != '[' { // one input, as token numbers
		return []json.RawMessage{raw}, true
	}
	return list, len(list) <= maxInputs
}

func vector(input []byte, dims int) []float32 {
	sum := sha256.Sum256(input)
	rng := rand.New(rand.NewPCG(binary.BigEndian.Uint64(sum[:]), binary.BigEndian.Uint64(sum[8:]))) //nolint:gosec // repeatable on purpose
	v, square := make([]float32, dims), 0.0
	for i := range v {
		x := rng.NormFloat64()
		v[i] = float32(x)
		square += x * x
	}
	norm := float32(math.Sqrt(square))
	for i := range v {
		v[i] /= norm
	}
	return v
}
