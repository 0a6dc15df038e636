package config

import "fmt"

// MaxNameLength is the longest name of a cluster, site or node in bytes: that of
// a DNS label.
const MaxNameLength = 63

// ValidName reports whether s can be the name of a cluster, a site, a node or
// an upstream: lower-case letters, digits and inner dashes, at most MaxNameLength
// of them, so that it is valid in a label, a file name and a certificate.
func ValidName(s string) bool {
	if s == "" || len(s) > MaxNameLength || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// NameHint describes the names that ValidName accepts.
const NameHint = "write up to 63 lower-case letters, digits and dashes, no dash first or last"

// CheckIdentityPart returns an error if name can't be the name of what (a
// cluster, a site or a node) in a certificate. It allows only names that every
// parser of URIs, host names and paths reads in the same way: no characters that
// need escaping, and neither "." nor "..".
func CheckIdentityPart(what, name string) error {
	if name == "" {
		return fmt.Errorf("the name of the %s is empty", what)
	}
	if len(name) > MaxNameLength {
		return fmt.Errorf("the name of the %s has %d characters, at most %d are allowed", what, len(name), MaxNameLength)
	}
	for i, c := range []byte(name) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		inner := i > 0 && i < len(name)-1 && (c == '-' || c == '.' || c == '_')
		if !letter && !inner {
			return fmt.Errorf("the name %q of the %s may hold letters, digits and, inside, '-', '.' and '_'", name, what)
		}
	}
	return nil
}
