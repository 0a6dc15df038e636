package gateway

import (
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/storage/journal"
)

const maxPriority = 9

// scanJob reads a submission once, with the request in it, as strictly as a request:
// the client learns now what is wrong with it, and not when it runs. Body points into
// text.
func scanJob(text []byte) (r jobs.Request, err error) {
	s := openai.NewScanner(text)
	var inner openai.Request
	err = s.Document(func(key []byte, at int) error { return jobMember(&s, &r, &inner, string(key), at) })
	switch {
	case err != nil:
		return r, err
	case r.Endpoint == "":
		return r, &openai.BodyError{Param: "endpoint", Text: "you must provide an endpoint"}
	case inner.Body == nil:
		return r, &openai.BodyError{Param: "body", Text: "you must provide a body, the request itself"}
	case inner.Stream:
		return r, &openai.BodyError{Param: "body.stream", Text: "a job can't stream; leave stream out"}
	}
	r.Model, r.Body = inner.Model, inner.Body
	return r, nil
}

func jobMember(s *openai.Scanner, r *jobs.Request, inner *openai.Request, key string, at int) (err error) {
	switch key {
	case "endpoint":
		r.Endpoint, err = s.OneOf(key, jobs.Endpoints)
	case "body":
		*inner, err = s.Request(key)
	case "durability":
		var text string
		text, err = s.OneOf(key, config.JobDurabilities())
		r.Durability = journal.Durability(text)
	case "min_durability":
		var text string
		text, err = s.OneOf(key, config.JobDurabilities())
		r.MinDurability = journal.Durability(text)
	case "priority":
		r.Priority, err = s.Whole(key, 0, maxPriority)
	case "expires_in":
		r.ExpiresIn, err = expiry(s, key)
	case "callback_url":
		return &openai.BodyError{At: at, Param: key, Text: "callback_url is not supported by this version"}
	default:
		return &openai.BodyError{At: at, Param: key, Text: fmt.Sprintf("unknown member %q", key)}
	}
	return err
}

func expiry(s *openai.Scanner, param string) (time.Duration, error) {
	at := s.At()
	text, err := s.Text(param, 64)
	if err != nil {
		return 0, err
	}
	d, ok := jobs.ParseExpiry(text)
	if !ok || d < time.Second || d > config.MaxJobExpiry {
		return 0, &openai.BodyError{At: at, Param: param, Text: param + ` must be a time from "1s" to "7d", such as "90s", "1h" or "2d"`}
	}
	return d, nil
}
