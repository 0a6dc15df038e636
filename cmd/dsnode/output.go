package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"golang.org/x/term"
)

const (
	outputTable = "table"
	outputJSON  = "json"
	outputYAML  = "yaml"
)

func checkOutput(output string, formats []string) error {
	if slices.Contains(formats, output) {
		return nil
	}
	return usage("write -o "+strings.NewReplacer(", ", ", -o ", " or ", " or -o ").Replace(orList(formats)), "there is no output %q", output)
}

// orList joins words as a sentence does: a, b or c.
func orList(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// show writes value as JSON or YAML, or calls table for the output for people.
func show(w io.Writer, output string, value any, table func(io.Writer) error) error {
	var text []byte
	var err error
	switch output {
	case outputJSON:
		text, err = json.MarshalIndent(value, "", "  ")
		text = append(text, '\n')
	case outputYAML:
		text, err = yamlOf(value)
	default:
		return table(w)
	}
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	return emit(w, "%s", text)
}

// yamlOf encodes value as YAML with the names and the order of its JSON form. JSON
// is valid YAML in flow style, so it is parsed as YAML and changed to block style.
func yamlOf(value any) ([]byte, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	var node yaml.Node
	if err := yaml.Load(text, &node); err != nil {
		return nil, err
	}
	blockStyle(&node)
	return yaml.Dump(&node, yaml.WithIndent(2), yaml.WithLineWidth(-1))
}

func blockStyle(n *yaml.Node) {
	empty := len(n.Content) == 0
	switch n.Kind {
	case yaml.MappingNode, yaml.SequenceNode:
		if !empty { // {} and [] have no other form
			n.Style = 0
		}
	case yaml.ScalarNode:
		n.Style = 0
		if strings.Contains(n.Value, "\n") {
			n.Style = yaml.LiteralStyle
		}
	}
	for _, child := range n.Content {
		blockStyle(child)
	}
}

// palette colours text when stdout is a terminal and NO_COLOR is not set.
type palette struct{ on bool }

func (e *environment) palette() palette {
	return palette{on: e.stdoutIsTerminal() && e.getenv("NO_COLOR") == "" && e.getenv("TERM") != "dumb"}
}

func (e *environment) stdoutIsTerminal() bool {
	f, ok := e.stdout.(*os.File)
	return ok && term.IsTerminal(int(f.Fd())) //nolint:gosec // a file descriptor fits
}

const (
	red    = "31"
	green  = "32"
	yellow = "33"
	bold   = "1"
	faint  = "2"
)

func (p palette) paint(colour, text string) string {
	if !p.on || colour == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// cell is one cell of a table, with its colour.
type cell struct{ text, colour string }

func plain(text string) cell { return cell{text: text} }

// grid is a table with aligned columns. Unlike text/tabwriter it does not count
// colour codes as text.
type grid struct {
	heads []string
	rows  [][]cell
}

// add appends a row. Its text may come from a peer, so control characters are
// replaced: they could control the terminal or break the table.
func (g *grid) add(cells ...cell) {
	for i := range cells {
		cells[i].text = strings.ReplaceAll(printable(cells[i].text), "\n", " ")
	}
	g.rows = append(g.rows, cells)
}

func (g *grid) write(w io.Writer, p palette) error {
	widths := make([]int, len(g.heads))
	head := make([]cell, len(g.heads))
	for i, h := range g.heads {
		head[i] = cell{h, faint}
	}
	rows := append([][]cell{head}, g.rows...)
	for _, row := range rows {
		for i, c := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	var out strings.Builder
	for _, row := range rows {
		line := ""
		for i, c := range row {
			line += p.paint(c.colour, c.text) + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2)
		}
		out.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return emit(w, "%s", out.String())
}

// printable replaces control characters in text from a peer or a file, so that it
// can't control the terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0 || r == utf8.RuneError {
			return '?'
		}
		return r
	}, text)
}
