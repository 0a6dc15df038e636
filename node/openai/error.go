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
