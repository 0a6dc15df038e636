package config

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestDiffShowsChangesWithContext(t *testing.T) {
	seq := func(n int, change map[int]string) string {
		var b strings.Builder
		for i := 1; i <= n; i++ {
			if s, ok := change[i]; ok {
				b.WriteString(s)
				continue
			}
			fmt.Fprintf(&b, "line %d\n", i)
		}
		return b.String()
	}
	for name, tc := range map[string]struct{ a, b, want string }{
		"same":         {"a\nb\n", "a\nb\n", ""},
		"both empty":   {"", "", ""},
		"from nothing": {"", "a\nb\n", "--- current\n+++ new\n@@ -0,0 +1,2 @@\n+a\n+b\n"},
		"to nothing":   {"a\n", "", "--- current\n+++ new\n@@ -1,1 +0,0 @@\n-a\n"},
		"final line end": {
			"a\nb", "a\nb\n",
			"--- current\n+++ new\n@@ -1,2 +1,2 @@\n a\n-b\n\\ No newline at end of file\n+b\n",
		},
		"one line in the middle": {
			seq(9, nil), seq(9, map[int]string{5: "other\n"}),
			"--- current\n+++ new\n@@ -2,7 +2,7 @@\n line 2\n line 3\n line 4\n-line 5\n+other\n line 6\n line 7\n line 8\n",
		},
		"near changes in one hunk": {
			seq(12, nil), seq(12, map[int]string{3: "", 9: "new\nline 9\n"}),
			"--- current\n+++ new\n@@ -1,11 +1,11 @@\n line 1\n line 2\n-line 3\n line 4\n line 5\n line 6\n line 7\n line 8\n+new\n line 9\n line 10\n line 11\n",
		},
		"far changes in two hunks": {
			seq(20, nil), seq(20, map[int]string{1: "x\n", 20: "y\n"}),
			"--- current\n+++ new\n@@ -1,4 +1,4 @@\n-line 1\n+x\n line 2\n line 3\n line 4\n@@ -17,4 +17,4 @@\n line 17\n line 18\n line 19\n-line 20\n+y\n",
		},
		"repeated lines": {
			"a\n}\nb\n}\n", "a\n}\nc\n}\nb\n}\n",
			"--- current\n+++ new\n@@ -1,4 +1,6 @@\n a\n }\n+c\n+}\n b\n }\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := Diff([]byte(tc.a), []byte(tc.b)); got != tc.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, tc.want)
			}
		})
	}
}

// Applying the diff to a gives b. The texts are made of few different lines, so
// that repetitions, empty hunks and missing line ends all occur.
func TestDiffAppliedToOldTextGivesNewText(t *testing.T) {
	text := rapid.Custom(func(t *rapid.T) string {
		lines := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "", "d: 1", "e", "f", "g", "h"}), 0, 30).Draw(t, "lines")
		s := strings.Join(lines, "\n")
		if rapid.Bool().Draw(t, "newline") && s != "" {
			s += "\n"
		}
		return s
	})
	rapid.Check(t, func(t *rapid.T) {
		a, b := text.Draw(t, "a"), text.Draw(t, "b")
		diff := Diff([]byte(a), []byte(b))
		if (diff == "") != (a == b) {
			t.Fatalf("diff is %q", diff)
		}
		got, err := patch(a, diff)
		if err != nil {
			t.Fatalf("%v\n%s", err, diff)
		}
		if got != b {
			t.Fatalf("applied: %q, want %q\n%s", got, b, diff)
		}
	})
}

// patch applies a unified diff and checks each of its claims about a.
func patch(a, diff string) (string, error) {
	if diff == "" {
		return a, nil
	}
	old := splitLines(a)
	var out []string
	at, left, mark := 0, [2]int{}, byte(0)
	for i, l := range splitLines(diff) {
		switch {
		case i < 2:
			continue
		case strings.HasPrefix(l, "@@ -"):
			if left != [2]int{} {
				return "", fmt.Errorf("hunk before %q is short by %v", l, left)
			}
			f := strings.FieldsFunc(l, func(r rune) bool { return strings.ContainsRune("@ -+,\n", r) })
			var n [4]int
			for k := range n {
				v, err := strconv.Atoi(f[k])
				if err != nil {
					return "", err
				}
				n[k] = v
			}
			start := n[0] - 1
			if n[1] == 0 {
				start = n[0]
			}
			out = append(out, old[at:start]...)
			at, left = start, [2]int{n[1], n[3]}
			wantY := n[2] - 1
			if n[3] == 0 {
				wantY = n[2]
			}
			if len(out) != wantY {
				return "", fmt.Errorf("%q: the new text is at %d", l, len(out))
			}
		case strings.HasPrefix(l, "\\"):
			// It refers to the line before it, whose line end the diff itself added.
			if last := len(out) - 1; mark != '-' {
				out[last] = strings.TrimSuffix(out[last], "\n")
			}
		case l[0] == ' ' || l[0] == '-':
			if at >= len(old) || strings.TrimSuffix(old[at], "\n") != strings.TrimSuffix(l[1:], "\n") {
				return "", fmt.Errorf("old line %d is not %q", at, l)
			}
			at, left[0] = at+1, left[0]-1
			if l[0] == ' ' {
				out = append(out, l[1:])
				left[1]--
			}
		case l[0] == '+':
			out = append(out, l[1:])
			left[1]--
		}
		mark = l[0]
	}
	if left != [2]int{} {
		return "", fmt.Errorf("the last hunk is short by %v", left)
	}
	return strings.Join(append(out, old[at:]...), ""), nil
}

// Large texts with no line in common, or with all lines the same, must not take
// long.
func TestDiffTimeIsBounded(t *testing.T) {
	same := bytes.Repeat([]byte("x\n"), MaxBytes/8)
	var other, reversed bytes.Buffer
	for i := range 40_000 {
		fmt.Fprintf(&other, "%d\n", i)
		fmt.Fprintf(&reversed, "%d\n", 40_000-i)
	}
	for _, pair := range [][2][]byte{{same, same[2:]}, {same, other.Bytes()}, {other.Bytes(), reversed.Bytes()}} {
		start := time.Now()
		if Diff(pair[0], pair[1]) == "" {
			t.Error("no difference found")
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("took %s", d)
		}
	}
}

// splitLines splits after each line end. A last line without a line end stays without
// one.
func splitLines(text string) []string {
	lines := strings.SplitAfter(text, "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}
