package config

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// diffContext is how many unchanged lines are shown around a change.
const diffContext = 3

// Diff returns the change from a to b as a unified diff, "" when both are the
// same. It is a patience diff, anchored on lines that occur once in each text: it
// takes n log n time for any input, but isn't always the shortest diff.
func Diff(a, b []byte) string {
	if bytes.Equal(a, b) {
		return ""
	}
	x, y := diffLines(a), diffLines(b)
	var out strings.Builder
	out.WriteString("--- current\n+++ new\n")
	for _, h := range diffHunks(diffRuns(x, y)) {
		h.write(&out, x, y)
	}
	return out.String()
}

// diffLines splits after each line end. A last line without a line end stays
// without one.
func diffLines(text []byte) []string {
	lines := strings.SplitAfter(string(text), "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// diffRun says that x[X:X+N] and y[Y:Y+N] are the same lines.
type diffRun struct{ X, Y, N int }

// diffRuns returns the common runs in ascending order, followed by an empty one
// at the ends of the texts.
func diffRuns(x, y []string) []diffRun {
	var ms []diffRun
	doneX := commonPrefix(x, y)
	doneY := doneX
	if doneX > 0 {
		ms = append(ms, diffRun{0, 0, doneX})
	}
	for _, anchor := range append(diffAnchors(x, y), [2]int{len(x), len(y)}) {
		i, j := anchor[0], anchor[1]
		if i < doneX || j < doneY {
			continue // an earlier run includes it
		}
		for i > doneX && j > doneY && x[i-1] == y[j-1] {
			i, j = i-1, j-1
		}
		n := commonPrefix(x[i:], y[j:])
		if n > 0 {
			ms = append(ms, diffRun{i, j, n})
		}
		doneX, doneY = i+n, j+n
	}
	return append(ms, diffRun{len(x), len(y), 0})
}

func commonPrefix(x, y []string) int {
	n := 0
	for n < len(x) && n < len(y) && x[n] == y[n] {
		n++
	}
	return n
}

// diffAnchors returns the positions in x and y of lines that occur once in each:
// the longest sequence of them that ascends in both (by patience sorting).
func diffAnchors(x, y []string) [][2]int {
	type seen struct{ inX, inY, atX, atY int }
	lines := map[string]seen{}
	for i, l := range x {
		s := lines[l]
		s.inX, s.atX = s.inX+1, i
		lines[l] = s
	}
	for j, l := range y {
		s := lines[l]
		s.inY, s.atY = s.inY+1, j
		lines[l] = s
	}
	var pairs [][2]int // by position in x
	for i, l := range x {
		if s := lines[l]; s.inX == 1 && s.inY == 1 {
			pairs = append(pairs, [2]int{i, s.atY})
		}
	}
	// piles[k] is the pair with the lowest position in y that ends an ascending
	// sequence of k+1 pairs.
	var piles []int
	before := make([]int, len(pairs))
	for p, pair := range pairs {
		k, _ := slices.BinarySearchFunc(piles, pair[1], func(q, y int) int { return pairs[q][1] - y })
		before[p] = -1
		if k > 0 {
			before[p] = piles[k-1]
		}
		if k == len(piles) {
			piles = append(piles, p)
		} else {
			piles[k] = p
		}
	}
	if len(piles) == 0 {
		return nil
	}
	row := make([][2]int, len(piles))
	for k, p := len(piles)-1, piles[len(piles)-1]; k >= 0; k, p = k-1, before[p] {
		row[k] = pairs[p]
	}
	return row
}

// diffHunk is a section of both texts with its changes: x[X0:X1] becomes
// y[Y0:Y1], and the runs are the parts of it that are unchanged.
type diffHunk struct {
	X0, X1, Y0, Y1 int
	runs           []diffRun
}

// diffHunks groups changes that are near each other.
func diffHunks(ms []diffRun) []diffHunk {
	var hs []diffHunk
	doneX, doneY := 0, 0 // end of the run before the change
	var run diffRun      // that run
	for _, m := range ms {
		if m.X > doneX || m.Y > doneY { // there is a change before m
			lead := min(diffContext, run.N)
			start := diffRun{doneX - lead, doneY - lead, lead}
			if n := len(hs); n > 0 && hs[n-1].X1 >= start.X {
				// The previous hunk's tail overlaps this lead: extend that hunk.
				h := &hs[n-1]
				h.runs[len(h.runs)-1] = run
				h.X1, h.Y1 = m.X, m.Y
			} else {
				hs = append(hs, diffHunk{X0: start.X, Y0: start.Y, X1: m.X, Y1: m.Y, runs: []diffRun{start}})
			}
			h := &hs[len(hs)-1]
			tail := min(diffContext, m.N)
			h.runs = append(h.runs, diffRun{m.X, m.Y, tail})
			h.X1, h.Y1 = m.X+tail, m.Y+tail
		}
		run, doneX, doneY = m, m.X+m.N, m.Y+m.N
	}
	return hs
}

func (h diffHunk) write(out *strings.Builder, x, y []string) {
	fmt.Fprintf(out, "@@ -%s +%s @@\n", hunkRange(h.X0, h.X1), hunkRange(h.Y0, h.Y1))
	line := func(mark byte, text string) {
		out.WriteByte(mark)
		out.WriteString(text)
		if !strings.HasSuffix(text, "\n") {
			out.WriteString("\n\\ No newline at end of file\n")
		}
	}
	i, j := h.X0, h.Y0
	for _, r := range h.runs {
		for ; i < r.X; i++ {
			line('-', x[i])
		}
		for ; j < r.Y; j++ {
			line('+', y[j])
		}
		for ; i < r.X+r.N; i, j = i+1, j+1 {
			line(' ', x[i])
		}
	}
}

// hunkRange is "first line,count"; an empty range has the line before it.
func hunkRange(from, to int) string {
	if to == from {
		return fmt.Sprintf("%d,0", from)
	}
	return fmt.Sprintf("%d,%d", from+1, to-from)
}
