package config

import (
	"slices"
	"strings"
)

// didYouMean is `did you mean "x"?` for the known word that is nearest to a wrong
// one, or "" if none is near.
func didYouMean(wrong string, known []string) string {
	if best := nearestWord(wrong, known); best != "" {
		return "did you mean " + quoted(best) + "?"
	}
	return ""
}

// nearestWord is the known word with the least edit distance, if that is at most
// a third of the longer word's length; otherwise "". Of equally near words it is
// the first in sort order.
func nearestWord(wrong string, known []string) string {
	if len(wrong) > maxShown {
		return ""
	}
	best, least := "", 0
	for _, k := range slices.Sorted(slices.Values(known)) {
		if len(k) > 2*maxShown {
			continue
		}
		d := editDistance(strings.ToLower(wrong), strings.ToLower(k))
		if d > max(len(wrong), len(k))/3 {
			continue
		}
		if best == "" || d < least {
			best, least = k, d
		}
	}
	return best
}

// editDistance counts insertions, deletions, replacements and swaps of
// neighbours between two short words, in bytes.
func editDistance(a, b string) int {
	before, prev, cur := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
		before, prev, cur = prev, cur, before
	}
	return prev[len(b)]
}

// wordChoices lists words: "one of a, b, c". Long lists are truncated.
func wordChoices(known []string) string {
	const most = 12
	if len(known) > most {
		return "one of " + strings.Join(known[:most], ", ") + " …"
	}
	return "one of " + strings.Join(known, ", ")
}

// suggest is a hint with the nearest known word, else with all known words, else
// none.
func (s *Source) suggest(wrong string, known []string, none string) string {
	if s.full() {
		return ""
	}
	if hint := didYouMean(wrong, known); hint != "" {
		return hint
	}
	if len(known) == 0 {
		return none
	}
	return "write " + wordChoices(known)
}
