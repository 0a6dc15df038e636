package jobtable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
)

const (
	// maxListBytes ends a page early, since submissions and results can be large.
	maxListBytes = 16 << 20
	// livePage is how many rows Live reads at once.
	livePage = 256
)

// ErrUnknownCursor means that List was given a cursor whose job is not known.
var ErrUnknownCursor = errors.New("the list's cursor is a job that is not known")

// Get returns the row of a job. It returns false when nothing is known of the job,
// or when its submission has not arrived. A deleted job is returned as Row.Deleted.
func (t *Table) Get(id journal.JobID) (Row, bool, error) {
	s, err := t.current(id)
	if err != nil {
		return Row{}, false, err
	}
	row := s.row(id)
	return row, row.visible(), nil
}

// listed is one entry of the list index.
type listed struct {
	at journal.Clock
	id journal.JobID
}

// page is the state of one call of List.
type page struct {
	prefixes [][]byte // of the list index, one per status
	forward  bool     // towards newer jobs
	from     *listed  // exclusive; nil: from the end
	limit    int

	overlay map[journal.JobID]*state // all changed rows: replace the file's
	changed []listed                 // matching rows of the overlay, in the page's order
}

// List returns rows by the time of their submission, newest first, and whether
// there are more in the direction of the cursor. It leaves out deleted jobs. A page
// of large jobs may be shorter than Limit. The error may wrap ErrUnknownCursor.
func (t *Table) List(f Filter) (rows []Row, more bool, err error) {
	p := page{limit: f.Limit, forward: f.Before != journal.JobID{}}
	if p.limit <= 0 || p.limit > MaxLimit {
		p.limit = MaxLimit
	}
	if p.from, err = t.cursor(f); err != nil {
		return nil, false, err
	}
	tenant := allTenants
	if !f.AllTenants {
		if tenant, err = t.tenantHash(f.Tenant); err != nil {
			return nil, false, err
		}
	}
	for number, status := range statuses {
		if len(f.Status) == 0 || slices.Contains(f.Status, status) {
			p.prefixes = append(p.prefixes, append(tenant[:], byte(number)))
		}
	}
	// Read the overlay first: a row that leaves it meanwhile is then in the file.
	t.addOverlay(&p, f, tenant)
	changed := p.changed
	err = t.read("list", func(tx *bbolt.Tx) error {
		p.changed = changed
		rows, more, err = p.collect(tx)
		return err
	})
	if err != nil {
		return nil, false, err
	}
	if p.forward {
		slices.Reverse(rows)
	}
	return rows, more, nil
}

func (t *Table) cursor(f Filter) (*listed, error) {
	id := f.After
	switch zero := (journal.JobID{}); {
	case f.Before != zero && f.After != zero:
		return nil, errors.New("a list has a cursor to go on after or before, not both")
	case f.Before != zero:
		id = f.Before
	case f.After == zero:
		return nil, nil
	}
	s, err := t.current(id)
	if err != nil {
		return nil, err
	}
	if s.at == 0 {
		return nil, fmt.Errorf("%w: %s", ErrUnknownCursor, id)
	}
	return &listed{s.at, id}, nil
}

// addOverlay adds the overlay's rows to the page.
func (t *Table) addOverlay(p *page, f Filter, tenant [16]byte) {
	p.overlay = map[journal.JobID]*state{}
	t.eachChanged(func(id journal.JobID, s *state) {
		p.overlay[id] = s
		number, ok := s.counted()
		if !ok || len(f.Status) > 0 && !slices.Contains(f.Status, statuses[number]) ||
			!f.AllTenants && (!s.head.known || s.head.tenant != tenant) {
			return
		}
		if l := (listed{s.at, id}); p.from == nil || p.before(p.from, &l) {
			p.changed = append(p.changed, l)
		}
	})
	slices.SortFunc(p.changed, func(a, b listed) int {
		if p.before(&a, &b) {
			return -1
		}
		return 1
	})
}

// eachChanged calls f with a copy of each state in the overlay, with its head read.
func (t *Table) eachChanged(f func(journal.JobID, *state)) {
	for i := range t.stripes {
		s := &t.stripes[i]
		s.mu.Lock()
		changed := make([]rowChange, 0, len(s.entries))
		for id, e := range s.entries {
			t.fillHead(id, &e.state) // stored in the entry, since the commit needs it too
			changed = append(changed, rowChange{id: id, next: e.state})
		}
		s.mu.Unlock()
		for i := range changed {
			f(changed[i].id, &changed[i].next)
		}
	}
}

// before reports whether a comes before b in the page's direction.
func (p *page) before(a, b *listed) bool {
	order := compareKeys(a, b)
	if p.forward {
		order = -order
	}
	return order < 0
}

// walker iterates over the list entries of one status.
type walker struct {
	c      *bbolt.Cursor
	prefix []byte
	at     listed
	ok     bool
}

func (w *walker) set(k []byte) error {
	w.ok = k != nil && bytes.HasPrefix(k, w.prefix)
	if !w.ok {
		return nil
	}
	if len(k) != listPrefix+8+16 {
		return fmt.Errorf("%w: a list entry of %d bytes", ErrDamaged, len(k))
	}
	w.at = listed{journal.Clock(binary.BigEndian.Uint64(k[listPrefix:])), journal.JobID(k[listPrefix+8:])}
	return nil
}

// start moves to the first entry after p.from, in the page's direction.
func (w *walker) start(p *page) error {
	var k []byte
	if p.forward { // forward implies a cursor
		k, _ = w.c.Seek(p.from.key(w.prefix))
		if err := w.set(k); err != nil || !w.ok || w.at != *p.from {
			return err
		}
		return w.next(p)
	}
	limit := append(bytes.Clone(w.prefix), bytes.Repeat([]byte{0xFF}, 8+16)...)
	if p.from != nil {
		limit = p.from.key(w.prefix)
	}
	if k, _ = w.c.Seek(limit); k == nil {
		k, _ = w.c.Last()
		// Seek went beyond the end, so the last entry is before the limit.
	}
	if k != nil && bytes.Compare(k, limit) >= 0 {
		k, _ = w.c.Prev()
	}
	return w.set(k)
}

func (w *walker) next(p *page) error {
	var k []byte
	if p.forward {
		k, _ = w.c.Next()
	} else {
		k, _ = w.c.Prev()
	}
	return w.set(k)
}

func (l *listed) key(prefix []byte) []byte {
	k := append(bytes.Clone(prefix), make([]byte, 0, 8+16)...)
	k = binary.BigEndian.AppendUint64(k, uint64(l.at))
	return append(k, l.id[:]...)
}

// collect merges the file's entries of all statuses with the overlay's.
func (p *page) collect(tx *bbolt.Tx) (rows []Row, more bool, err error) {
	walkers := make([]*walker, 0, len(p.prefixes))
	for _, prefix := range p.prefixes {
		w := &walker{c: bucket(tx, indexList).Cursor(), prefix: prefix}
		if err := w.start(p); err != nil {
			return nil, false, err
		}
		walkers = append(walkers, w)
	}
	table := bucket(tx, tableRows)
	size := 0
	for {
		var best *walker
		for _, w := range walkers {
			if w.ok && (best == nil || p.before(&w.at, &best.at)) {
				best = w
			}
		}
		var s state
		var id journal.JobID
		switch {
		case len(p.changed) > 0 && (best == nil || p.before(&p.changed[0], &best.at) || p.changed[0] == best.at):
			id = p.changed[0].id
			s, p.changed = *p.overlay[id], p.changed[1:]
		case best == nil:
			return rows, false, nil
		default:
			id = best.at.id
			entry, at := best.prefix, best.at.at
			if err := best.next(p); err != nil {
				return nil, false, err
			}
			if p.overlay[id] != nil {
				continue
			}
			if len(rows) < p.limit && size < maxListBytes {
				v := table.Get(id[:])
				if v == nil {
					return nil, false, fmt.Errorf("%w: job %s is in the list index, but has no row", ErrDamaged, id)
				}
				if s, err = parseValue(id, bytes.Clone(v)); err != nil {
					return nil, false, err
				}
				if !s.listedAs(entry, at) {
					return nil, false, fmt.Errorf("%w: job %s is in the list index at the wrong place", ErrDamaged, id)
				}
			}
		}
		if len(rows) == p.limit || size >= maxListBytes {
			return rows, true, nil
		}
		rows = append(rows, s.row(id))
		size += int(s.size())
	}
}

// listedAs reports whether a row belongs under an entry of the list index.
func (s *state) listedAs(prefix []byte, at journal.Clock) bool {
	number, ok := s.counted()
	tenant := [16]byte(prefix)
	return ok && s.at == at && prefix[16] == byte(number) && (tenant == allTenants || s.head.known && s.head.tenant == tenant)
}

// FindKey returns the jobs whose Submission has this KeyHash, at most MaxLimit.
func (t *Table) FindKey(keyHash string) ([]journal.JobID, error) {
	if keyHash == "" {
		return nil, nil
	}
	sum, err := t.keyHashOf(keyHash)
	if err != nil {
		return nil, err
	}
	var ids []journal.JobID
	changed := map[journal.JobID]bool{}
	t.eachChanged(func(id journal.JobID, s *state) {
		changed[id] = true
		if _, ok := s.counted(); ok && s.head.known && s.head.key == sum {
			ids = append(ids, id)
		}
	})
	overlaid := len(ids)
	err = t.read("find a key", func(tx *bbolt.Tx) error {
		ids = ids[:overlaid]
		c := bucket(tx, indexKeys).Cursor()
		for k, _ := c.Seek(sum[:]); bytes.HasPrefix(k, sum[:]) && len(ids) < MaxLimit; k, _ = c.Next() {
			if len(k) != 16+16 {
				return fmt.Errorf("%w: a key entry of %d bytes", ErrDamaged, len(k))
			}
			if id := journal.JobID(k[16:]); !changed[id] {
				ids = append(ids, id)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(ids, journal.JobID.Compare)
	return ids[:min(len(ids), MaxLimit)], nil
}

// Live calls yield with each row that is not final and was accepted by the stream,
// as it is at that moment, until yield returns false. For jobs submitted meanwhile,
// use Watch.
func (t *Table) Live(s journal.Stream, yield func(Row) bool) error {
	done := map[journal.JobID]bool{}
	var ids []journal.JobID
	t.eachChanged(func(id journal.JobID, st *state) {
		if st.live() {
			ids = append(ids, id)
			done[id] = true
		}
	})
	prefix := streamKey(s)
	from := prefix
	for {
		for _, id := range ids {
			st, err := t.current(id)
			if err != nil {
				return err
			}
			row := st.row(id)
			if st.live() && slices.Contains(row.AcceptedBy(), s) && !yield(row) {
				return nil
			}
		}
		if from == nil {
			return nil
		}
		begin := from
		err := t.read("read live jobs", func(tx *bbolt.Tx) error {
			ids, from = ids[:0], begin
			c := bucket(tx, indexLive).Cursor()
			k, _ := c.Seek(from)
			for ; bytes.HasPrefix(k, prefix) && len(ids) < livePage; k, _ = c.Next() {
				if len(k) != len(prefix)+16 {
					continue // the name of another origin begins with this one's
				}
				if id := journal.JobID(k[len(prefix):]); !done[id] {
					ids = append(ids, id)
				}
			}
			from = nil
			if bytes.HasPrefix(k, prefix) {
				from = bytes.Clone(k)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
}
