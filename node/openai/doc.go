// Package openai is OpenAI's wire format: the endpoints (endpoint.go), what a
// request says (request.go), what an answer says (answer.go), server-sent events
// (events.go), changes to a document (splice.go) and the error object (error.go).
// All JSON is read by one scanner (scanner.go).
//
// It is a leaf: it knows neither servers nor configuration, and reads nothing but
// the bytes that it is given.
package openai
