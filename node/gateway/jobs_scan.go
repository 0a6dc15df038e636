package gateway

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/storage/journal"
)

const maxPriority = 9

// scanJob reads a submission once, the request in it included, as strictly as
// scan: what is wrong with the request is said now and not when it runs. Body
// points into text.
func scanJob(text []byte) (r jobs.Request, err error) {
	if !utf8.Valid(text) {
		return r, badUTF8(text)
	}
	s := scanner{b: text}
	s.space()
	if s.i == len(text) || text[s.i] != '{' {
		return r, &badBody{at: s.i, text: "the body must be a JSON object"}
	}
	inner := scanned{}
	err = s.object(func(key []byte, at int) error {
		s.space()
		return s.jobMember(&r, &inner, string(key), at)
	})
	if err != nil {
		return r, err
	}
	s.space()
	switch {
	case s.i != len(text):
		return r, &badBody{at: s.i, text: "there is more after the JSON object"}
	case r.Endpoint == "":
		return r, &badBody{at: 0, param: "endpoint", text: "you must provide an endpoint"}
	case r.Body == nil:
		return r, &badBody{at: 0, param: "body", text: "you must provide a body, the request itself"}
	case inner.stream:
		return r, &badBody{at: 0, param: "body.stream", text: "a job can't stream; leave stream out"}
	}
	r.Model = string(inner.model)
	return r, nil
}

func (s *scanner) jobMember(r *jobs.Request, inner *scanned, key string, at int) (err error) {
	switch key {
	case "endpoint":
		r.Endpoint, err = s.choice(key, jobs.Endpoints)
	case "body":
		from := s.i
		if s.i == len(s.b) || s.b[s.i] != '{' {
			return &badBody{s.i, key, "body must be an object, the request itself"}
		}
		if err := s.request(inner, true); err != nil {
			return inBody(err)
		}
		r.Body = s.b[from:s.i:s.i]
	case "durability":
		var text string
		text, err = s.choice(key, config.JobDurabilities())
		r.Durability = journal.Durability(text)
	case "min_durability":
		var text string
		text, err = s.choice(key, config.JobDurabilities())
		r.MinDurability = journal.Durability(text)
	case "priority":
		r.Priority, err = s.whole(key, 0, maxPriority)
	case "expires_in":
		r.ExpiresIn, err = s.expiry(key)
	case "callback_url":
		return &badBody{at, key, "callback_url is not supported by this version"}
	default:
		return &badBody{at, key, fmt.Sprintf("unknown member %q", key)}
	}
	return err
}

// inBody says that it is the inner request that an error is about.
func inBody(err error) error {
	bad, ok := err.(*badBody) //nolint:errorlint // the scanner makes nothing else, and wraps nothing
	if !ok {
		return err
	}
	param := "body"
	if bad.param != "" {
		param += "." + bad.param
	}
	return &badBody{bad.at, param, bad.text}
}

func (s *scanner) choice(param string, of []string) (string, error) {
	at := s.i
	text, err := s.text(param, 64)
	if err != nil {
		return "", err
	}
	if i := slices.Index(of, string(text)); i >= 0 {
		return of[i], nil
	}
	return "", &badBody{at, param, param + " must be one of " + strings.Join(of, ", ")}
}

func (s *scanner) expiry(param string) (time.Duration, error) {
	at := s.i
	text, err := s.text(param, 64)
	if err != nil {
		return 0, err
	}
	d, ok := jobs.ParseExpiry(string(text))
	if !ok || d < time.Second || d > config.MaxJobExpiry {
		return 0, &badBody{at, param, param + ` must be a time from "1s" to "7d", such as "90s", "1h" or "2d"`}
	}
	return d, nil
}
