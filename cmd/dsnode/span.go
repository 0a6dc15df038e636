package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// span is a flag for a long duration, which may be given in days: 90d, 12h, 30m.
type span time.Duration

const day = 24 * time.Hour

// String formats the span as Set reads it.
func (s *span) String() string {
	switch d := time.Duration(*s); {
	case d == 0:
		return ""
	case d%day == 0:
		return fmt.Sprintf("%dd", d/day)
	default:
		return d.String()
	}
}

// Type is the flag's type in --help.
func (s *span) Type() string { return "time" }

// Set parses a duration that is greater than zero and at most a hundred years.
func (s *span) Set(text string) error {
	var d time.Duration
	if days, found := strings.CutSuffix(text, "d"); found {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return fmt.Errorf("%q is not a number of days; for example 90d", text)
		}
		d = time.Duration(n) * day
	} else {
		var err error
		if d, err = time.ParseDuration(text); err != nil {
			return fmt.Errorf("%q is not a duration; for example 90d or 12h", text)
		}
	}
	if d <= 0 || d > 100*365*day {
		return fmt.Errorf("%q must be greater than zero and at most 36500d", text)
	}
	*s = span(d)
	return nil
}
