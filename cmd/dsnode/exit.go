package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// Exit codes, as promised in node/API.md.
const (
	exitDone      = 0
	exitFailed    = 1
	exitUsage     = 2
	exitUnhealthy = 3
)

// exitError is how a command ends badly: with which code, and in which words.
type exitError struct {
	code int
	err  error  // nil: everything was said on stdout already
	hint string // what to try, empty when there is nothing to say
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// failure ends a command with exit code 1, one sentence, and what to try next.
func failure(hint, format string, args ...any) error {
	return &exitError{code: exitFailed, err: fmt.Errorf(format, args...), hint: hint}
}

// usage ends a command with exit code 2: it was called wrongly.
func usage(hint, format string, args ...any) error {
	return &exitError{code: exitUsage, err: fmt.Errorf(format, args...), hint: hint}
}

// quietly ends a command with a code that stdout explains already.
func quietly(code int) error { return &exitError{code: code} }

// report writes a command's end for a person and gives the exit code.
func report(w io.Writer, err error) int {
	if err == nil {
		return exitDone
	}
	var exit *exitError
	if !errors.As(err, &exit) {
		exit = &exitError{code: exitFailed, err: err}
	}
	if exit.err == nil {
		return exit.code
	}
	// The outermost error carries the most context; the hint may stand deeper.
	say(w, "error", err.Error())
	if exit.hint != "" {
		say(w, "hint", exit.hint)
	}
	return exit.code
}

// say writes one message, its later lines indented below the first.
func say(w io.Writer, kind, text string) {
	text = strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n  ")
	// Nothing is left to try when stderr itself is gone.
	_, _ = fmt.Fprintf(w, "dsnode: %s: %s\n", kind, text)
}
