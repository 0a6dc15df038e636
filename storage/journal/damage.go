package journal

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A damaged stream keeps the part in front of the damage. The rest is renamed, and
// damage.json records how far the stream reached. It is removed when peers have
// resent the missing records, or an operator has accepted the loss.
const (
	damageFile    = "damage.json"
	damageFormat  = 1
	damagedSuffix = ".damaged"
)

type damageNote struct {
	Format  int    `json:"format"`
	From    uint64 `json:"from"`    // the first missing record
	Through uint64 `json:"through"` // the last record known to have existed
}

func readDamage(dir string) (n damageNote, err error) {
	b, err := os.ReadFile(filepath.Join(dir, damageFile))
	if isNotExist(err) {
		return n, nil
	}
	if err != nil {
		return n, err
	}
	if err := json.Unmarshal(b, &n); err != nil {
		return n, fmt.Errorf("%w: %s: %w", ErrDamaged, damageFile, err)
	}
	if n.Format > damageFormat {
		return n, fmt.Errorf("%w: %s has format %d", ErrNewerFormat, damageFile, n.Format)
	}
	return n, nil
}

// truncateAtDamage ends the stream in front of the damage in segment i. g is the
// intact part of the segment, nil if there is none. Every step can be repeated after
// a crash.
func (r *recovery) truncateAtDamage(i int, g *segment, trouble error) error {
	l, s := r.l, r.s
	end := r.files[i] - 1
	if g != nil {
		end = g.last
	} else if len(s.segments) > 0 {
		end = s.last().last
	}
	note := damageNote{Format: damageFormat, From: end + 1, Through: max(s.damaged, r.checkpoint.Durable, end+1)}
	for j := i; j < len(r.files); j++ {
		note.Through = max(note.Through, r.files[j]-1)
		if err := salvage(l.disk, r.path(j), s.id, func(rec *Record) error {
			note.Through = max(note.Through, rec.Seq)
			return nil
		}); err != nil {
			return err
		}
	}
	l.metrics.damaged.Inc()
	l.log.Error("a stream is damaged and was truncated; other nodes must resend the missing records",
		"stream", s.id.String(), "from", note.From, "through", note.Through, "segment", r.path(i), "err", trouble)
	// Before records are removed, peers must stop counting this node as a holder.
	if err := l.renewStore(); err != nil {
		return err
	}
	b, err := json.Marshal(note)
	if err != nil {
		return err
	}
	if err := l.replaceFile(filepath.Join(s.dir, damageFile), b); err != nil {
		return err
	}
	s.damaged, r.note = note.Through, note
	for j := len(r.files) - 1; j > i; j-- {
		if err := l.disk.rename(r.path(j), damagedName(r.path(j))); err != nil {
			return err
		}
		if err := l.disk.syncDir(s.dir); err != nil {
			return err
		}
	}
	if g == nil {
		if err := l.disk.rename(r.path(i), damagedName(r.path(i))); err != nil {
			return err
		}
		return l.disk.syncDir(s.dir)
	}
	if err := r.keepPrefix(g); err != nil {
		return err
	}
	s.segments = append(s.segments, g)
	return nil
}

// noteDeleted records that all files of the stream are gone although it had records.
func (r *recovery) noteDeleted() error {
	l, s := r.l, r.s
	note := damageNote{Format: damageFormat, From: 1, Through: r.checkpoint.Durable}
	l.metrics.damaged.Inc()
	l.log.Error("all files of a stream were deleted; other nodes must resend its records", "stream", s.id.String(), "through", note.Through)
	// Before the stream exists again, peers must stop counting this node as a holder.
	if err := l.renewStore(); err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	for _, dir := range []string{filepath.Dir(s.dir), l.o.Dir} {
		if err := l.disk.syncDir(dir); err != nil {
			return err
		}
	}
	b, err := json.Marshal(note)
	if err != nil {
		return err
	}
	if err := l.replaceFile(filepath.Join(s.dir, damageFile), b); err != nil {
		return err
	}
	s.damaged, r.note = note.Through, note
	return nil
}

// keepPrefix keeps the intact part of a segment under its name, and the whole
// segment under another.
func (r *recovery) keepPrefix(g *segment) error {
	l := r.l
	from, err := l.disk.open(g.path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }() // only read from
	return l.rewriteFile(g.path, func(to file) error {
		if err := copyBytes(to, from, 0, g.size); err != nil {
			return err
		}
		return os.Link(g.path, damagedName(g.path))
	})
}

// damagedName returns an unused name for a damaged segment.
func damagedName(path string) string {
	for i := 0; ; i++ {
		name := fmt.Sprintf("%s.%d%s", path, i, damagedSuffix)
		if _, err := os.Lstat(name); isNotExist(err) {
			return name
		}
	}
}

// salvage calls fn with every record in a file that can be read, also after
// unreadable parts. It stops where the disk returns an error.
func salvage(d disk, path string, id Stream, fn func(*Record) error) error {
	f, err := d.open(path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read from
	size, err := f.size()
	if err != nil {
		return err
	}
	var stop error
	for at := int64(0); ; {
		mark, found, err := nextBatchHeader(f, id, at, size)
		if err != nil || !found {
			return nil
		}
		at, err = walk(f, id, mark, size, func(_ int64, _ []byte, r *Record) error {
			stop = fn(r)
			return stop
		})
		if stop != nil {
			return stop
		}
		if err == nil {
			return nil
		}
		at++
	}
}

// Salvage calls fn with the records after a stream's damage that can still be read,
// in any order, some perhaps twice. Their payloads are valid only during the call.
func (l *Log) Salvage(id Stream, fn func(*Record) error) error {
	s, err := l.find(id)
	if err != nil {
		return err
	}
	names, err := damagedFiles(s.dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := salvage(l.disk, filepath.Join(s.dir, name), id, fn); err != nil {
			return err
		}
	}
	return nil
}

func damagedFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), damagedSuffix) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// AcceptLoss ends a damaged stream where it was truncated: an operator has decided
// that the missing records need not be restored. Then it is a normal stream.
func (l *Log) AcceptLoss(id Stream) error {
	s, err := l.find(id)
	if err != nil {
		return err
	}
	s.write.Lock()
	defer s.write.Unlock()
	if s.gone {
		return fmt.Errorf("%w: %s", ErrNoStream, id)
	}
	e := s.end()
	if e.Damaged == 0 {
		return nil
	}
	l.log.Warn("the loss of records was accepted", "stream", id.String(), "from", e.Durable+1, "through", e.Damaged)
	if err := l.clearDamage(s); err != nil {
		return l.setFailed("accept a loss", err)
	}
	return nil
}

// clearDamage marks a stream as undamaged and removes the renamed files.
func (l *Log) clearDamage(s *stream) error {
	if err := l.disk.remove(filepath.Join(s.dir, damageFile)); err != nil && !isNotExist(err) {
		return err
	}
	if err := l.disk.syncDir(s.dir); err != nil {
		return err
	}
	names, err := damagedFiles(s.dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := l.disk.remove(filepath.Join(s.dir, name)); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.damaged = 0
	s.mu.Unlock()
	l.changed.Send()
	return nil
}
