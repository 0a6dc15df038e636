package config

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrDuration is wrapped by every error of ParseDuration.
var ErrDuration = errors.New("not a duration")

// ParseDuration reads "800ms", "2s", "1h30m". Its errors explain common mistakes:
// a number without a unit, days, a negative time.
func ParseDuration(s string) (Duration, error) {
	d, err := time.ParseDuration(s)
	switch {
	case err == nil && d < 0:
		return 0, fmt.Errorf("%w: %s is negative", ErrDuration, quoted(s))
	case err == nil:
		return Duration(d), nil
	case s != "" && strings.Trim(s, "0123456789.") == "":
		return 0, fmt.Errorf("%w: %s has no unit; write %ss or %sms", ErrDuration, quoted(s), clipWord(s), clipWord(s))
	case strings.HasSuffix(s, "d") && strings.Trim(s[:len(s)-1], "0123456789") == "":
		return 0, fmt.Errorf("%w: %s: there is no unit for days; write hours, such as 24h", ErrDuration, quoted(s))
	}
	return 0, fmt.Errorf("%w: %s; write a number with a unit, such as 800ms, 2s, 30m or 1h30m", ErrDuration, quoted(s))
}

// String is the shortest form that ParseDuration reads back: "30m", not "30m0s".
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText returns String, for YAML and JSON.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is ParseDuration, for YAML and JSON.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := ParseDuration(string(text))
	if err != nil {
		return err
	}
	*d = v
	return nil
}
