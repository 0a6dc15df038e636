package jobtable

import (
	"cmp"
	"slices"

	"github.com/dsnode/dsnode/storage/journal"
)

// How many records of a category a row keeps. They are the first of a total order,
// which makes Join associative.
const (
	maxSubmitted = 4
	maxProgress  = 1
	maxFinished  = 3
	maxAsked     = 1

	maxRecords = maxSubmitted + maxProgress + maxFinished + maxAsked
)

// category groups the kinds of records that compete for the same places in a row.
// The numbers are the canonical order.
type category uint8

const (
	submitted category = iota
	progress
	finished
	asked
	deleted
	unknown // a kind from a later version: dropped, since its order is not known
)

func categoryOf(k journal.Kind) category {
	switch k {
	case journal.Submitted:
		return submitted
	case journal.Started, journal.Retrying:
		return progress
	case journal.Finished:
		return finished
	case journal.CancelAsked:
		return asked
	case journal.Deleted:
		return deleted
	}
	return unknown
}

func (c category) keeps() int {
	switch c {
	case submitted:
		return maxSubmitted
	case progress:
		return maxProgress
	case finished:
		return maxFinished
	case asked, deleted:
		return maxAsked
	case unknown:
	}
	return 0
}

// Join merges two sets of one job's records: their union, pruned to the records that
// matter, in canonical order. It is commutative, associative and idempotent. It
// changes neither argument; payloads are shared, not copied. When b adds nothing to a
// canonical a, the result is a itself.
//
// Two records are the same when they are equal in everything but the payload. Then
// a's payload stays: the payloads differ only in the key that sealed them, and this
// node can open the one that it already has.
func Join(a, b []journal.Record) []journal.Record {
	if canonical(a) && addsNothing(a, b) {
		return a
	}
	var space [2 * maxRecords]*journal.Record
	all := space[:0]
	for i := range a {
		all = append(all, &a[i])
	}
	for i := range b {
		all = append(all, &b[i])
	}
	slices.SortStableFunc(all, compare) // stable, so that a's payload comes first
	all = prune(all)
	joined := make([]journal.Record, len(all))
	for i, r := range all {
		joined[i] = *r
	}
	return joined
}

// prune keeps the first of equal records, and the first keeps() records of each
// category. all is sorted; it is overwritten.
func prune(all []*journal.Record) []*journal.Record {
	out := all[:0]
	var last *journal.Record
	kept := 0
	for _, r := range all {
		c := categoryOf(r.Kind)
		switch {
		case last != nil && compare(last, r) == 0:
			continue
		case last == nil || categoryOf(last.Kind) != c:
			kept = 0
		}
		last = r
		if kept++; kept > c.keeps() {
			continue
		}
		if c == deleted {
			out = out[:0] // a deletion replaces everything else
		}
		out = append(out, r)
	}
	return out
}

// canonical reports whether Join(a, nil) equals a.
func canonical(a []journal.Record) bool {
	kept := 0
	for i := range a {
		c := categoryOf(a[i].Kind)
		if i > 0 && compare(&a[i-1], &a[i]) >= 0 {
			return false
		}
		if i == 0 || categoryOf(a[i-1].Kind) != c {
			kept = 0
		}
		if kept++; kept > c.keeps() || c == deleted && len(a) > 1 {
			return false
		}
	}
	return true
}

// addsNothing reports whether each record of b is in a or would be pruned. a is
// canonical.
func addsNothing(a, b []journal.Record) bool {
	for i := range b {
		if !dominated(a, &b[i]) {
			return false
		}
	}
	return true
}

func dominated(a []journal.Record, r *journal.Record) bool {
	c := categoryOf(r.Kind)
	if c == unknown {
		return true
	}
	before, held := 0, 0
	for i := range a {
		switch of := categoryOf(a[i].Kind); {
		case of == deleted && c != deleted:
			return true
		case of == c:
			held++
			switch order := compare(&a[i], r); {
			case order == 0:
				return true
			case order < 0:
				before++
			}
		}
	}
	return held == c.keeps() && before == held
}

// compare defines the canonical order of a row's records; 0 means the same record.
func compare(a, b *journal.Record) int {
	c := categoryOf(a.Kind)
	if order := cmp.Compare(c, categoryOf(b.Kind)); order != 0 {
		return order
	}
	switch c {
	case progress, finished: // the greatest first
		if order := cmp.Or(
			b.Token.Compare(a.Token),
			cmp.Compare(b.Attempt, a.Attempt),
			cmp.Compare(b.Rank, a.Rank),
			cmp.Compare(b.Kind, a.Kind), // Retrying ends the attempt that Started began
			cmp.Compare(b.Clock, a.Clock),
			b.Stream.Compare(a.Stream),
			cmp.Compare(b.Seq, a.Seq),
		); order != 0 {
			return order
		}
	case submitted, asked, deleted, unknown: // the earliest first
		if order := cmp.Or(
			cmp.Compare(a.Clock, b.Clock),
			a.Stream.Compare(b.Stream),
			cmp.Compare(a.Seq, b.Seq),
		); order != 0 {
			return order
		}
	}
	// Two records with the same place in the same stream never differ otherwise. If
	// they did, every node would still have to order them the same way.
	return cmp.Or(
		a.Job.Compare(b.Job),
		slices.Compare(a.Digest[:], b.Digest[:]),
		cmp.Compare(a.Kind, b.Kind),
		a.Token.Compare(b.Token),
		cmp.Compare(a.Attempt, b.Attempt),
		cmp.Compare(a.Rank, b.Rank),
	)
}
