package openai

import (
	"encoding/json"
	"strings"
)

// The types of errors.
const (
	InvalidRequest = "invalid_request_error"
	RateLimit      = "rate_limit_error"
	ServerError    = "server_error"
	Overloaded     = "overloaded_error"
	TimeoutError   = "timeout_error"
)

// Error is OpenAI's error object.
type Error struct {
	Message string
	Type    string
	Code    string
	Param   string // empty: null
}

// Object is the error alone, as JSON.
func (e *Error) Object() []byte {
	shape := struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    string  `json:"code"`
	}{Message: e.Message, Type: e.Type, Code: e.Code}
	if e.Param != "" {
		shape.Param = &e.Param
	}
	b, err := json.Marshal(shape)
	if err != nil { // strings always marshal
		panic(err)
	}
	return b
}

// Body is the error as an answer's body.
func (e *Error) Body() []byte {
	return append(append([]byte(`{"error":`), e.Object()...), '}')
}

// ErrorObject finds the error object in a body that has OpenAI's shape. A server
// may send an error in some other shape, or a page.
func ErrorObject(body []byte) (object []byte, ok bool) {
	var shape struct {
		Error json.RawMessage `json:"error"`
	}
	err := json.Unmarshal(body, &shape)
	return shape.Error, err == nil && len(shape.Error) > 0 && shape.Error[0] == '{'
}

// knownCodes are codes that OpenAI's API and the servers that copy it use.
var knownCodes = map[string]bool{
	"context_length_exceeded": true, "content_filter": true, "insufficient_quota": true, "internal_error": true, "invalid_api_key": true,
	"invalid_request_error": true, "invalid_value": true, "missing_required_parameter": true, "model_not_found": true, "overloaded": true,
	"rate_limit_exceeded": true, "server_error": true, "string_above_max_length": true, "unknown_parameter": true, "unsupported_parameter": true,
	"unsupported_value": true,
	// Those of our own gateway, which asks other nodes.
	"auth_stale": true, "auth_unavailable": true, "hop_limit": true, "no_upstream": true, "node_removed": true, "not_cached": true,
	"upstream_failed": true, "upstream_refused": true, "upstream_timeout": true, "upstream_truncated": true,
}

// KnownCode is the code of a server's error if it is a status or a well-known code, and
// "other" if it is another one: a server could write anything there.
func KnownCode(code string) string {
	switch {
	case code == "", code == "null":
		return ""
	case len(code) == 3 && strings.Trim(code, "0123456789") == "", knownCodes[code]:
		return code
	}
	return "other"
}

// WithoutWords is an error object that keeps the code alone, if that is a known one.
func WithoutWords(object string) string {
	_, code := ErrorKind([]byte(object))
	e := Error{Message: "The job itself has the message.", Type: ServerError, Code: KnownCode(code)}
	return string(e.Object())
}

// ErrorKind reads the type and the code of a server's error, a number or a string
// there. A bare string is an error too; it has neither.
func ErrorKind(object []byte) (kind, code string) {
	var e struct {
		Type string          `json:"type"`
		Code json.RawMessage `json:"code"`
	}
	_ = json.Unmarshal(object, &e)
	return e.Type, strings.Trim(string(e.Code), `"`)
}
