package config

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"unicode"
)

// ErrSecret is wrapped by every error of ResolveSecret.
var ErrSecret = errors.New("secret cannot be read")

// maxSecretBytes bounds a secret.
const maxSecretBytes = 64 << 10

// check returns why s is not a valid reference, "" if it is one. The message never
// repeats the text: users write the secret itself there by mistake.
func (s Secret) check() (message, hint string) {
	const one = "write {env: NAME} or {file: PATH}"
	switch {
	case s.Env != "" && s.File != "":
		return "has both env and file", one + ", not both"
	case s.IsZero():
		return "has neither env nor file", one
	case s.Env != "" && !validEnvName(s.Env):
		return "env is not the name of an environment variable", "write letters, digits and underscores, such as {env: VLLM_KEY}; do not write the secret itself here"
	case strings.ContainsRune(s.File, 0) || len(s.File) > 4096:
		return "file is not a path", one
	}
	return "", ""
}

func validEnvName(s string) bool {
	for i, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '_'
		if !letter && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return s != "" && len(s) <= 256
}

// ResolveSecret reads the secret that a reference points to, without leading and
// trailing white space. The error wraps ErrSecret and has the reference, never the
// value.
func ResolveSecret(s Secret, lookupEnv func(string) (string, bool), readFile func(string) ([]byte, error)) (string, error) {
	if message, hint := s.check(); message != "" {
		return "", fmt.Errorf("%w: %s; %s", ErrSecret, message, hint)
	}
	var value, from string
	if s.Env != "" {
		from = "the environment variable " + s.Env
		v, ok := lookupEnv(s.Env)
		if !ok {
			return "", fmt.Errorf("%w: %s is not set; set it in the environment of dsnode run", ErrSecret, from)
		}
		value = v
	} else {
		from = "the file " + s.File
		data, err := readFile(s.File)
		if err != nil {
			return "", fmt.Errorf("%w: %w", ErrSecret, newFileError(s.File, err))
		}
		value = string(data)
	}
	value = strings.TrimSpace(value)
	switch {
	case value == "":
		return "", fmt.Errorf("%w: %s is empty; put the secret there", ErrSecret, from)
	case len(value) > maxSecretBytes:
		return "", fmt.Errorf("%w: %s has more than %d bytes; put only the secret there", ErrSecret, from, maxSecretBytes)
	case strings.ContainsFunc(value, unicode.IsControl):
		return "", fmt.Errorf("%w: %s has more than one line or control characters; put only the secret there", ErrSecret, from)
	}
	return value, nil
}

// fileError is a failure to read a file, with a message that has a hint.
type fileError struct {
	message string
	err     error
}

func (e *fileError) Error() string { return e.message }
func (e *fileError) Unwrap() error { return e.err }

func newFileError(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &fileError{"the file " + path + " does not exist; create it or correct the path", err}
	case errors.Is(err, fs.ErrPermission):
		return &fileError{"permission to read the file " + path + " is denied; allow the user that runs dsnode to read it", err}
	}
	reason := err
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		reason = pathErr.Err // the message has the path already
	}
	return &fileError{fmt.Sprintf("the file %s cannot be read: %v", path, reason), err}
}
