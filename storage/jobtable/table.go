package jobtable

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Table keeps the rows of all jobs.
type Table struct {
	o  Options
	db *bbolt.DB

	mu      sync.Mutex // guards all below
	rows    map[journal.JobID]Row
	applied map[journal.Stream]uint64
	watch   []func(Row)
}

var (
	bucketRows    = []byte("rows")
	bucketApplied = []byte("applied")
)

// Open opens the table of a directory, or makes one. The error is ErrDamaged,
// ErrNewerFormat, or what the file system said.
func Open(o Options) (*Table, error) {
	t := &Table{o: o.withDefaults(), rows: map[journal.JobID]Row{}, applied: map[journal.Stream]uint64{}}
	db, err := bbolt.Open(filepath.Join(o.Dir, File), 0o600, nil)
	if err != nil {
		return nil, fmt.Errorf("open job table: %w", err)
	}
	t.db = db
	err = db.Update(func(tx *bbolt.Tx) error {
		rows, err := tx.CreateBucketIfNotExists(bucketRows)
		if err != nil {
			return err
		}
		applied, err := tx.CreateBucketIfNotExists(bucketApplied)
		if err != nil {
			return err
		}
		err = rows.ForEach(func(_, v []byte) error {
			records, err := decodeFrames(bytes.Clone(v))
			if err == nil && len(records) > 0 {
				t.rows[records[0].Job] = Row{records}
			}
			return err
		})
		if err != nil {
			return err
		}
		return applied.ForEach(func(k, v []byte) error {
			s := journal.Stream{Origin: string(k[16:]), Incarnation: journal.Incarnation(k[:16])}
			t.applied[s] = binary.BigEndian.Uint64(v)
			return nil
		})
	})
	if err != nil {
		_ = db.Close()
		return nil, fmt.Errorf("open job table: %w", err)
	}
	return t, nil
}

// Close closes the file. Run must have ended.
func (t *Table) Close() error { return t.db.Close() }

// Run commits, sweeps and checks until ctx ends. An error means that the node
// has to stop.
func (t *Table) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

func decodeFrames(b []byte) ([]journal.Record, error) {
	var records []journal.Record
	for len(b) > 0 {
		r, rest, err := journal.NextFrame(b)
		if err != nil {
			return nil, err
		}
		records, b = append(records, r), rest
	}
	return records, nil
}

func appendFrames(dst []byte, records []journal.Record) ([]byte, error) {
	var err error
	for i := range records {
		if dst, err = journal.AppendFrame(dst, &records[i]); err != nil {
			return nil, err
		}
	}
	return dst, nil
}

// Applied is up to where the stream's records are durable in the table's file;
// its journal may be trimmed up to there. 0 for an unknown stream.
func (t *Table) Applied(s journal.Stream) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.applied[s]
}

// AppliedAll is Applied of every stream.
func (t *Table) AppliedAll() map[journal.Stream]uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make(map[journal.Stream]uint64, len(t.applied))
	for s, n := range t.applied {
		all[s] = n
	}
	return all
}

// Apply joins the records of one stream, which must come in their order,
// beginning at or before Applied+1; what was applied before is skipped. They
// are visible when it returns, and durable with the next commit. It may be
// called at once for different streams, keeps nothing of records, and blocks
// while the commits are too far behind.
func (t *Table) Apply(s journal.Stream, records []journal.Record) {
	for i := range records {
		r := records[i]
		r.Payload = bytes.Clone(r.Payload)
		t.join(r.Job, []journal.Record{r})
	}
	if len(records) > 0 {
		_ = t.SetApplied(context.Background(), s, records[len(records)-1].Seq)
	}
}

func (t *Table) join(id journal.JobID, records []journal.Record) {
	t.mu.Lock()
	row := Row{Join(t.rows[id].Records, records)}
	t.rows[id] = row
	err := t.db.Update(func(tx *bbolt.Tx) error {
		b, err := appendFrames(nil, row.Records)
		if err != nil {
			return err
		}
		return tx.Bucket(bucketRows).Put(id[:], b)
	})
	watch := t.watch
	t.mu.Unlock()
	if err != nil {
		t.o.Logger.Error("job table failed", "err", err)
	}
	if row.visible() {
		for _, w := range watch {
			w(row)
		}
	}
}

// Get gives the row of a job; false when nothing is known of it, or only that
// its submission is on its way. A job that is gone is given as Row.Deleted.
func (t *Table) Get(id journal.JobID) (Row, bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	row, ok := t.rows[id]
	return row, ok && row.visible(), nil
}

// List gives rows by the time of their submission, and whether there are more
// behind them. Deleted ones are left out.
func (t *Table) List(f Filter) (rows []Row, more bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []Row
	for _, row := range t.rows {
		sub, ok := row.Submitted()
		if !ok || len(f.Status) > 0 && !slices.Contains(f.Status, row.Status()) {
			continue
		}
		if !f.AllTenants {
			s, err := t.o.Sealer.OpenSubmission(&sub)
			if err != nil {
				return nil, false, err
			}
			if s.Tenant != f.Tenant {
				continue
			}
		}
		all = append(all, row)
	}
	newest := func(a, b Row) int {
		x, _ := a.Submitted()
		y, _ := b.Submitted()
		if x.Clock != y.Clock {
			return -int(min(1, max(-1, int64(x.Clock)-int64(y.Clock))))
		}
		return y.Job.Compare(x.Job)
	}
	slices.SortFunc(all, newest)
	if limit := f.Limit; limit <= 0 || limit > MaxLimit {
		f.Limit = MaxLimit
	}
	if row, ok := t.rows[f.After]; ok {
		i, _ := slices.BinarySearchFunc(all, row, newest)
		for i < len(all) && newest(all[i], row) <= 0 {
			i++
		}
		all = all[i:]
	}
	if row, ok := t.rows[f.Before]; ok {
		i, _ := slices.BinarySearchFunc(all, row, newest)
		all = all[max(0, i-f.Limit):i]
		return all, i > f.Limit, nil
	}
	n := min(f.Limit, len(all))
	return all[:n], len(all) > n, nil
}

// FindKey gives the jobs whose Submission has this KeyHash, at most MaxLimit.
func (t *Table) FindKey(keyHash string) ([]journal.JobID, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var ids []journal.JobID
	for id, row := range t.rows {
		if sub, ok := row.Submitted(); ok {
			s, err := t.o.Sealer.OpenSubmission(&sub)
			if err != nil {
				return nil, err
			}
			if keyHash != "" && s.KeyHash == keyHash {
				ids = append(ids, id)
			}
		}
	}
	return ids, nil
}

// Live calls yield with each row that is not final and has a home in the
// stream, until it gives false.
func (t *Table) Live(s journal.Stream, yield func(Row) bool) error {
	t.mu.Lock()
	var live []Row
	for _, row := range t.rows {
		if row.visible() && !row.Deleted() && !row.Status().Final() && slices.Contains(row.Homes(), s) {
			live = append(live, row)
		}
	}
	t.mu.Unlock()
	for _, row := range live {
		if !yield(row) {
			break
		}
	}
	return nil
}

// LiveCounts says how many rows that are not final have a home in each stream.
func (t *Table) LiveCounts() map[journal.Stream]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := map[journal.Stream]int64{}
	for _, row := range t.rows {
		if row.visible() && !row.Deleted() && !row.Status().Final() {
			for _, s := range row.Homes() {
				n[s]++
			}
		}
	}
	return n
}

// Counts says how many jobs there are of each status; deleted ones don't count.
func (t *Table) Counts() map[journal.Status]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := map[journal.Status]int64{}
	for _, row := range t.rows {
		if row.visible() && !row.Deleted() {
			n[row.Status()]++
		}
	}
	return n
}

// Watch calls f with the row at every change of a visible job, in order per job
// and outside of all locks, from the goroutine that made the change: f must be
// quick, and must not call Apply or Merge. Register before the first Apply.
func (t *Table) Watch(f func(Row)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.watch = append(slices.Clone(t.watch), f)
}

// Rows gives durable rows behind the id after in the order of ids, as frames
// for Merge: about maxBytes, at least one row. last is the id to go on with;
// more is false when there is nothing behind it. Take AppliedAll before the
// first page: the rows hold at least that much.
func (t *Table) Rows(after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error) {
	last = after
	err = t.db.View(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketRows).Cursor()
		k, v := c.Seek(after[:])
		if bytes.Equal(k, after[:]) {
			k, v = c.Next()
		}
		for ; k != nil; k, v = c.Next() {
			if len(frames) > 0 && len(frames)+len(v) > maxBytes {
				more = true
				return nil
			}
			frames, last = append(frames, v...), journal.JobID(k)
		}
		return nil
	})
	return frames, last, more, err
}

// Merge joins rows of another node, as Rows and Bucket gave them. They are
// durable when it returns.
func (t *Table) Merge(_ context.Context, frames []byte) error {
	records, err := decodeFrames(bytes.Clone(frames))
	if err != nil {
		return err
	}
	for _, r := range records {
		t.join(r.Job, []journal.Record{r})
	}
	return nil
}

// SetApplied notes that all of a stream up to seq came in with merged rows. It
// is durable when it returns, and never goes down.
func (t *Table) SetApplied(_ context.Context, s journal.Stream, seq uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	seq = max(seq, t.applied[s])
	t.applied[s] = seq
	return t.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketApplied).Put(append(s.Incarnation[:], s.Origin...), binary.BigEndian.AppendUint64(nil, seq))
	})
}

// Digests are those of the 256 buckets of jobs, by the first byte of the
// SHA-256 of their ids: over ids, the identities of their records and Digest
// fields. Tables that hold the same have the same, however it is sealed.
func (t *Table) Digests() [256][16]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all [256][16]byte
	for id, row := range t.rows {
		h := sha256.New()
		for i := range row.Records {
			r := row.Records[i]
			r.Payload = nil
			b, _ := journal.AppendFrame(nil, &r)
			_, _ = h.Write(b)
		}
		d := &all[bucketOf(id)]
		for i, x := range h.Sum(nil)[:16] {
			d[i] ^= x
		}
	}
	return all
}

func bucketOf(id journal.JobID) byte {
	sum := sha256.Sum256(id[:])
	return sum[0]
}

// Bucket gives a page of the rows of bucket n of Digests, as Rows does.
func (t *Table) Bucket(n byte, after journal.JobID, maxBytes int) (frames []byte, last journal.JobID, more bool, err error) {
	last = after
	err = t.db.View(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketRows).Cursor()
		k, v := c.Seek(after[:])
		if bytes.Equal(k, after[:]) {
			k, v = c.Next()
		}
		for ; k != nil; k, v = c.Next() {
			if bucketOf(journal.JobID(k)) != n {
				continue
			}
			if len(frames) > 0 && len(frames)+len(v) > maxBytes {
				more = true
				return nil
			}
			frames, last = append(frames, v...), journal.JobID(k)
		}
		return nil
	})
	return frames, last, more, err
}

// Carries says how many payloads are sealed with each key.
func (t *Table) Carries(context.Context) (map[keyring.KeyID]int64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := map[keyring.KeyID]int64{}
	for _, row := range t.rows {
		for i := range row.Records {
			if len(row.Records[i].Payload) == 0 {
				continue
			}
			id, err := keyring.SealedWith(row.Records[i].Payload)
			if err != nil {
				return nil, err
			}
			n[id]++
		}
	}
	return n, nil
}

// Reseal seals all payloads that carry the key from with the current one, in
// small batches, and returns when none is left: Carries shows the progress. It
// may be ended by ctx and begun again at any time.
func (t *Table) Reseal(_ context.Context, from keyring.KeyID) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, row := range t.rows {
		records := slices.Clone(row.Records)
		for i := range records {
			r := &records[i]
			if len(r.Payload) == 0 {
				continue
			}
			if key, err := keyring.SealedWith(r.Payload); err != nil || key != from {
				continue
			}
			if _, err := t.o.Sealer.Reseal(r); err != nil {
				return err
			}
		}
		b, err := appendFrames(nil, records)
		if err == nil {
			err = t.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketRows).Put(id[:], b) })
		}
		if err != nil {
			return err
		}
		t.rows[id] = Row{records}
	}
	return nil
}
