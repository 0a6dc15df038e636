package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
)

// Exit codes, as documented in node/API.md.
const (
	exitDone      = 0
	exitFailed    = 1
	exitUsage     = 2
	exitUnhealthy = 3
)

// exitError ends a command with an exit code, an error text and a hint.
type exitError struct {
	code int
	err  error  // nil: stdout explains the code already
	hint string // what to try; empty: nothing
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// failure ends a command with exit code 1, an error text, and a hint what to try.
func failure(hint, format string, args ...any) error {
	return &exitError{code: exitFailed, err: fmt.Errorf(format, args...), hint: hint}
}

// usage ends a command with exit code 2: its arguments are wrong.
func usage(hint, format string, args ...any) error {
	return &exitError{code: exitUsage, err: fmt.Errorf(format, args...), hint: hint}
}

// quietly ends a command with a code and without an error text.
func quietly(code int) error { return &exitError{code: code} }

// report prints the error that a command ended with, and returns the exit code.
func report(w io.Writer, err error) int {
	if err == nil {
		return exitDone
	}
	exit := &exitError{code: exitFailed, err: err, hint: hintFor(err)}
	_ = errors.As(err, &exit) // else as above
	if exit.err == nil {
		return exit.code
	}
	message := err.Error() // of the outermost error, which has the most context
	var problems config.Problems
	if errors.As(err, &problems) && len(problems) > 0 {
		// One line each in the format of compilers, which editors can jump to.
		for _, p := range problems {
			// A write to stderr that fails can't be reported anywhere.
			_, _ = fmt.Fprintln(w, printable(p.String()))
		}
		message = counted(problems)
	}
	say(w, "error", message)
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

// hintFor says what to try after an error of a node or of the connection to it.
func hintFor(err error) string {
	var refused *admin.Error
	switch {
	case errors.As(err, &refused):
		return refused.Hint
	case errors.Is(err, admin.ErrUnreachable):
		return "check that a node runs there; --admin URL asks another node, dsnode dev starts a cluster on this machine"
	case errors.Is(err, admin.ErrUnanswered):
		return "check whether the change was made before you try again"
	case errors.Is(err, admin.ErrNotAdmin):
		return "--admin takes the address of the admin port, not of the api port"
	}
	return ""
}

// say writes one message to stderr. Its second and later lines are indented.
func say(w io.Writer, kind, text string) {
	text = strings.ReplaceAll(printable(strings.TrimRight(text, "\n")), "\n", "\n  ")
	// A write to stderr that fails can't be reported anywhere.
	_, _ = fmt.Fprintf(w, "dsnode: %s: %s\n", kind, text)
}
