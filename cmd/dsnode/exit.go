package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
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
	exit := &exitError{code: exitFailed, err: err, hint: hintFor(err)}
	_ = errors.As(err, &exit) // else as above
	if exit.err == nil {
		return exit.code
	}
	words := err.Error() // the outermost error carries the most context
	var problems config.Problems
	if errors.As(err, &problems) && len(problems) > 0 {
		// One line each, as compilers write them, so that editors can follow.
		for _, p := range problems {
			// Nothing is left to try when stderr itself is gone.
			_, _ = fmt.Fprintln(w, printable(p.String()))
		}
		words = counted(problems)
	}
	say(w, "error", words)
	if exit.hint != "" {
		say(w, "hint", exit.hint)
	}
	return exit.code
}

func counted(problems config.Problems) string {
	file := problems[0].File
	if file == "" {
		file = "the configuration"
	}
	if len(problems) == 1 {
		return file + " has a problem"
	}
	return fmt.Sprintf("%s has %d problems", file, len(problems))
}

// hintFor says what to try after an error that a node or the way to it gave.
func hintFor(err error) string {
	var refused *admin.Error
	switch {
	case errors.As(err, &refused):
		return refused.Hint
	case errors.Is(err, admin.ErrUnreachable):
		return "is a node running there? --admin URL asks another, dsnode dev starts a cluster on this machine"
	case errors.Is(err, admin.ErrUnanswered):
		return "look whether it happened before you try again"
	case errors.Is(err, admin.ErrNotAdmin):
		return "give the node's admin port, not its api port, with --admin"
	}
	return ""
}

// say writes one message, its later lines indented below the first.
func say(w io.Writer, kind, text string) {
	text = strings.ReplaceAll(printable(strings.TrimRight(text, "\n")), "\n", "\n  ")
	// Nothing is left to try when stderr itself is gone.
	_, _ = fmt.Fprintf(w, "dsnode: %s: %s\n", kind, text)
}
