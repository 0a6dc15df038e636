package config

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxProblems bounds the problems reported for one file.
const maxProblems = 100

// Problem is one mistake in a configuration file.
type Problem struct {
	File    string `json:"file,omitempty"`
	Line    int    `json:"line,omitempty"` // 1-based, 0 when there is no line to show
	Path    string `json:"path,omitempty"` // upstreams.a-vllm.site
	Message string `json:"message"`        // what is wrong
	Hint    string `json:"hint,omitempty"` // what to write instead
}

// String is one line: "cluster.yaml:7: upstreams.a.site: message; hint".
func (p Problem) String() string {
	var b strings.Builder
	switch {
	case p.File != "" && p.Line > 0:
		fmt.Fprintf(&b, "%s:%d: ", p.File, p.Line)
	case p.File != "":
		fmt.Fprintf(&b, "%s: ", p.File)
	case p.Line > 0:
		fmt.Fprintf(&b, "line %d: ", p.Line)
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Message)
	if p.Hint != "" {
		b.WriteString("; " + p.Hint)
	}
	return b.String()
}

// Problems are all mistakes in a file, in the order of its lines. As an error it
// has one line for each; use errors.As to show them in another form.
type Problems []Problem

func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Path leads to a value in a configuration file. Its elements are strings for
// keys and ints for positions in a list.
type Path []any

// At is a path from the top of the file.
func At(elems ...any) Path { return elems }

// At extends the path. The receiver is not changed.
func (p Path) At(elems ...any) Path {
	return append(slices.Clip(slices.Clone(p)), elems...)
}

// String is the path for messages. Keys that could be misread (a model name with
// a dot or a slash) are quoted, so that no two paths have the same form.
func (p Path) String() string {
	var b strings.Builder
	for i, e := range p {
		switch e := e.(type) {
		case int:
			fmt.Fprintf(&b, "[%d]", e)
		case string:
			if i > 0 {
				b.WriteByte('.')
			}
			if isPlainKey(e) {
				b.WriteString(e)
			} else {
				b.WriteString(strconv.Quote(clipWord(e)))
			}
		}
	}
	return b.String()
}

func isPlainKey(s string) bool {
	for _, r := range s {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_') {
			return false
		}
	}
	return s != "" && len(s) <= maxShown
}

// Source has the line of each key in a decoded file, and collects the file's
// problems. So the checks that follow decoding can report lines too, and all
// problems are reported at once.
type Source struct {
	file     string
	lines    map[string]int  // by Path.String()
	rejected map[string]bool // paths that already have a problem
	problems Problems
	omitted  int // problems beyond maxProblems
}

func newSource(file string) *Source {
	return &Source{file: file, lines: map[string]int{}, rejected: map[string]bool{}}
}

// Has reports whether the file itself has this value, as opposed to a default.
func (s *Source) Has(p Path) bool {
	if s == nil {
		return false
	}
	_, ok := s.lines[p.String()]
	return ok
}

// Line is the line of the value, or else of the nearest value that contains it; 0
// if unknown.
func (s *Source) Line(p Path) int {
	if s == nil {
		return 0
	}
	for ; len(p) > 0; p = p[:len(p)-1] {
		if line, ok := s.lines[p.String()]; ok {
			return line
		}
	}
	return s.lines[""]
}

// Broken reports whether this value, or one that contains it, was rejected
// already. Problems that follow from that are not worth reporting.
func (s *Source) Broken(p Path) bool {
	for ; len(p) > 0; p = p[:len(p)-1] {
		if s.rejected[p.String()] {
			return true
		}
	}
	return s.rejected[""]
}

// Reject adds a problem at a path, unless the value is Broken already.
func (s *Source) Reject(p Path, message, hint string) {
	if s.Broken(p) {
		return
	}
	s.rejected[p.String()] = true
	s.note(s.Line(p), p.String(), message, hint)
}

// full reports whether further problems are only counted. Callers use it to skip
// expensive messages.
func (s *Source) full() bool { return len(s.problems) >= maxProblems }

func (s *Source) note(line int, path, message, hint string) {
	if s.full() {
		s.omitted++
		return
	}
	s.problems = append(s.problems, Problem{File: s.file, Line: line, Path: path, Message: clipText(message, maxMessage), Hint: clipText(hint, maxMessage)})
}

// Err is nil when nothing was rejected, else a Problems.
func (s *Source) Err() error {
	if len(s.problems) == 0 {
		return nil
	}
	ps := slices.Clone(s.problems)
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Path, b.Path))
	})
	if s.omitted > 0 {
		ps = append(ps, Problem{File: s.file, Message: fmt.Sprintf("%d more problems are not shown", s.omitted), Hint: "correct these first"})
	}
	return ps
}

// withoutProblems returns a source for later checks of the same file.
func (s *Source) withoutProblems() *Source {
	if s == nil {
		return newSource("")
	}
	return &Source{file: s.file, lines: s.lines, rejected: map[string]bool{}}
}

const (
	maxShown   = 64   // bytes of quoted text in a message
	maxMessage = 1000 // bytes of a message
)

func clipWord(s string) string { return clipText(s, maxShown) }

func clipText(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// quoted is the file's text in the form for messages.
func quoted(s string) string { return strconv.Quote(clipWord(s)) }
