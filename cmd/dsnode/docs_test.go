package main

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// readmes say the same in two languages.
var readmes = []string{"README.md", "README.zh-CN.md"}

func readDoc(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// codeBlocks are the fenced blocks that name a language, each as its lines
// without comments. The picture names none: its labels are translated.
func codeBlocks(text string) (blocks [][]string) {
	open, language := false, ""
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if fence, found := strings.CutPrefix(line, "```"); found {
			if open = !open; open {
				if language = fence; language != "" {
					blocks = append(blocks, []string{language})
				}
			}
			continue
		}
		if !open || language == "" {
			continue
		}
		if language != "text" {
			line = strings.TrimRight(regexp.MustCompile(`(^|\s+)#\s.*`).ReplaceAllString(line, ""), " ")
		}
		if line != "" {
			last := len(blocks) - 1
			blocks[last] = append(blocks[last], line)
		}
	}
	return blocks
}

// commands are the command lines of dsnode that a page has, as arguments: those
// of its shell blocks, and the spans of code that begin with dsnode.
func commands(text string) (shell, spans [][]string) {
	begin := regexp.MustCompile(`(?:^|[|(;]\s*)(?:go run \./cmd/dsnode|(?:\./)?dsnode)\s+([^|)]*)`)
	for _, block := range codeBlocks(text) {
		if block[0] != "sh" {
			continue
		}
		for _, line := range block[1:] {
			for _, m := range begin.FindAllStringSubmatch(line, -1) {
				shell = append(shell, strings.Fields(m[1]))
			}
		}
	}
	text = strings.ReplaceAll(text, `\|`, "|") // as tables escape it
	for _, m := range regexp.MustCompile("`(?:\\./)?dsnode ([^`]+)`").FindAllStringSubmatch(text, -1) {
		spans = append(spans, expand(strings.Fields(m[1]))...)
	}
	return shell, spans
}

// expand makes "node drain|resume NODE" the two commands that it stands for.
func expand(words []string) (all [][]string) {
	all = [][]string{nil}
	for _, word := range words {
		var next [][]string
		for _, choice := range strings.Split(word, "|") {
			for _, before := range all {
				next = append(next, append(slices.Clone(before), choice))
			}
		}
		all = next
	}
	return all
}

// findCommand finds the command that args call. Words in capitals stand for
// what the reader puts there.
func findCommand(args []string) (*cobra.Command, []string, error) {
	root := newRootCommand(&environment{stdout: io.Discard, stderr: io.Discard})
	cmd, rest, err := root.Find(args)
	if err != nil {
		return nil, nil, err
	}
	if cmd.HasSubCommands() && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
		return nil, nil, errors.New("no such command")
	}
	return cmd, rest, nil
}

func TestBothREADMEsHaveTheSameCodeBlocks(t *testing.T) {
	english, chinese := codeBlocks(readDoc(t, readmes[0])), codeBlocks(readDoc(t, readmes[1]))
	if len(english) < 10 {
		t.Fatalf("only %d blocks of code in %s", len(english), readmes[0])
	}
	for i := range max(len(english), len(chinese)) {
		var a, b []string
		if i < len(english) {
			a = english[i]
		}
		if i < len(chinese) {
			b = chinese[i]
		}
		if !slices.Equal(a, b) {
			t.Errorf("block %d differs\n%s:\n%s\n%s:\n%s", i+1, readmes[0], strings.Join(a, "\n"), readmes[1], strings.Join(b, "\n"))
		}
	}
}

// TestDocumentedCommandsExist also parses the flags and counts the arguments of
// the command lines that a reader copies.
func TestDocumentedCommandsExist(t *testing.T) {
	for _, page := range append([]string{"node/API.md", "CHANGELOG.md", "deploy/node.yaml", "deploy/cluster.yaml"}, readmes...) {
		shell, spans := commands(readDoc(t, page))
		if len(shell)+len(spans) == 0 {
			t.Errorf("%s names no command", page)
		}
		for _, args := range spans {
			if _, _, err := findCommand(args); err != nil {
				t.Errorf("%s: dsnode %s: %v", page, strings.Join(args, " "), err)
			}
		}
		for _, args := range shell {
			cmd, rest, err := findCommand(args)
			if err == nil {
				err = cmd.ParseFlags(rest)
			}
			if err == nil {
				err = cmd.ValidateArgs(cmd.Flags().Args())
			}
			if err != nil {
				t.Errorf("%s: dsnode %s: %v", page, strings.Join(args, " "), err)
			}
		}
	}
}

func TestCommandsOfAPageAreFound(t *testing.T) {
	shell, spans := commands("`dsnode node drain\\|resume NODE`\n```sh\necho '{}' | ./dsnode job submit --wait -\ngo run ./cmd/dsnode dev     # three sites\n```\n")
	if len(shell) != 2 || strings.Join(shell[0], " ") != "job submit --wait -" || strings.Join(shell[1], " ") != "dev" {
		t.Errorf("command lines: %q", shell)
	}
	if len(spans) != 2 || strings.Join(spans[1], " ") != "node resume NODE" {
		t.Errorf("spans of code: %q", spans)
	}
	for _, wrong := range [][]string{{"nodes"}, {"node", "remov"}, {"failover", "shanghai-b"}} {
		if cmd, _, err := findCommand(wrong); err == nil {
			t.Errorf("%q is the command %s", wrong, cmd.CommandPath())
		}
	}
}

func TestLinksOfREADMEsLeadToFiles(t *testing.T) {
	for _, page := range readmes {
		links := regexp.MustCompile(`\]\(([^)#]+)\)`).FindAllStringSubmatch(readDoc(t, page), -1)
		if len(links) < 5 {
			t.Errorf("only %d links in %s", len(links), page)
		}
		for _, link := range links {
			if _, err := fs.Stat(os.DirFS("../.."), link[1]); err != nil {
				t.Errorf("%s: %v", page, err)
			}
		}
	}
}

// TestTracesNameFunctions keeps the traces for those who read the code true: each
// step names a function and the file that declares it.
func TestTracesNameFunctions(t *testing.T) {
	step := regexp.MustCompile("(?m)^\\d+\\. `([\\w.]+)`\\s*[(（]`([\\w./-]+\\.go)`[)）]")
	var first []string
	for i, page := range readmes {
		var names []string
		for _, m := range step.FindAllStringSubmatch(readDoc(t, page), -1) {
			names = append(names, m[1])
			if !declares(t, filepath.Join("..", "..", m[2]), m[1]) {
				t.Errorf("%s: %s declares no %s", page, m[2], m[1])
			}
		}
		if len(names) < 10 {
			t.Errorf("only %d steps in the traces of %s", len(names), page)
		}
		if i == 0 {
			first = names
		} else if !slices.Equal(names, first) {
			t.Errorf("the traces differ\n%s: %q\n%s: %q", readmes[0], first, page, names)
		}
	}
}

// declares reports whether a file declares a function, or Type.Method.
func declares(t *testing.T, path, name string) bool {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Error(err)
		return false
	}
	return slices.ContainsFunc(file.Decls, func(d ast.Decl) bool {
		f, ok := d.(*ast.FuncDecl)
		if !ok {
			return false
		}
		full := f.Name.Name
		if f.Recv != nil {
			of := f.Recv.List[0].Type
			if pointer, ok := of.(*ast.StarExpr); ok {
				of = pointer.X
			}
			if ident, ok := of.(*ast.Ident); ok {
				full = ident.Name + "." + full
			}
		}
		return full == name
	})
}
