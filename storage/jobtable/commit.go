package jobtable

import (
	"bytes"
	"cmp"
	"context"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/notify"
)

// commitEvery is how long changes collect in memory. A job that is submitted,
// executed and finished meanwhile is written once, and the journals' own syncs do
// not compete for the disk.
const commitEvery = 500 * time.Millisecond

// yieldRows is the number of rows after which a commit yields the processor. A
// commit has thousands of rows, each takes tens of µs, and hardly any caller waits
// for it, in contrast to everything else that a node does.
const yieldRows = 8

// Run commits the changes of Apply and Merge and sweeps what is due, until ctx ends.
// The last commit makes everything durable that is visible. An error wraps
// ErrFailed and means that the node has to stop.
func (t *Table) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return t.commitLoop(ctx) })
	g.Go(func() error { return t.sweepLoop(ctx) })
	return g.Wait()
}

func (t *Table) commitLoop(ctx context.Context) error {
	t.committing.Store(true)
	defer t.replaced.Send() // after committing is false: nobody waits for another file
	defer t.committing.Store(false)
	for {
		select {
		case <-ctx.Done():
			if err := t.commit(); !errors.Is(err, errNoRoom) {
				return err
			}
			return nil // the journals have everything
		case <-t.failed:
			return t.usable()
		case <-t.urgent:
		case <-t.kick:
			select {
			case <-time.After(commitEvery):
			case <-t.urgent:
			case <-ctx.Done():
			case <-t.failed:
			}
		}
		err := t.commit()
		if errors.Is(err, errNoRoom) {
			notify.Wake(t.kick)
			select {
			case <-time.After(fullWait):
			case <-ctx.Done():
				return nil // the journals have everything
			}
			continue
		}
		if err != nil {
			return err
		}
	}
}

// errNoRoom means that the disk is full. Nothing of the transaction is in use, so the same
// changes can be committed later: bbolt writes the meta page last, in place.
var errNoRoom = errors.New("the disk is full")

// fullWait is the time until a commit to a full disk is tried again.
const fullWait = time.Second

// rowChange is a changed row to be committed.
type rowChange struct {
	id      journal.JobID
	next    state
	version uint64
	inFile  bool // the file already has a row of the job
}

// batch is the content of one transaction, with scratch buffers.
type batch struct {
	applied map[journal.Stream]position
	rows    []rowChange

	counts  [len(statuses)]int64
	seals   map[keyring.KeyID]int64
	digests map[timeSlot]*[256][16]byte

	arena   arena // for values
	scratch []byte
	old     []indexKey
	next    []indexKey
}

// arena allocates values, which bbolt refers to until the commit.
type arena struct{ free []byte }

const arenaChunk = 1 << 20

// space returns an empty slice with a capacity of at least n.
func (a *arena) space(n int) []byte {
	if cap(a.free) < n {
		a.free = make([]byte, 0, max(n, arenaChunk))
	}
	return a.free[:0]
}

// keep reserves n bytes of the slice that space returned last.
func (a *arena) keep(n int) {
	if n <= cap(a.free) { // else it did not fit and was reallocated
		a.free = a.free[n:n:cap(a.free)]
	}
}

func newBatch() *batch {
	return &batch{
		applied: map[journal.Stream]position{},
		seals:   map[keyring.KeyID]int64{},
		digests: map[timeSlot]*[256][16]byte{},
	}
}

// commit writes everything that is visible, to an empty file if the present one is damaged.
// Calls must not overlap.
func (t *Table) commit() error {
	if err := t.usable(); err != nil {
		return err
	}
	if damage := t.found(); damage != nil {
		if err := t.replaceFile(damage); err != nil {
			return t.commitFailed(err)
		}
	}
	b := t.collect()
	if len(b.rows) > 0 || len(b.applied) > 0 {
		start := time.Now()
		var err error
		if t.o.BeforeCommit != nil {
			err = t.o.BeforeCommit()
		}
		if err == nil {
			err = t.write(b)
		}
		if err = asDamaged(err); isDamage(err) && t.committing.Load() {
			if err = t.replaceFile(err); err == nil {
				b = t.collect()
				err = t.write(b)
			}
		}
		if errors.Is(err, syscall.ENOSPC) {
			t.o.Logger.Warn("the job table can't be written: the disk is full; trying again", "err", err)
			return errNoRoom
		}
		if err != nil {
			return t.commitFailed(err)
		}
		t.metrics.commit.Observe(time.Since(start).Seconds())
		t.metrics.rows.Add(float64(len(b.rows)))
	}
	t.retire(b)
	return nil
}

// commitFailed makes the table fail, and the next start not use the file.
func (t *Table) commitFailed(cause error) error {
	// Before anything else, because the node may be killed now.
	if t.mark != nil {
		t.now.State = boltfile.MarkDamaged
		if err := markFormat.Write(t.mark, t.now); err != nil {
			t.o.Logger.Error("can't mark the job table as damaged", "err", err)
		}
	}
	return t.setFailed("commit", cause)
}

// collect takes the changes. It reads positions first: rows read after them include
// at least those records.
func (t *Table) collect() *batch {
	b := newBatch()
	t.mu.Lock()
	t.begun++
	for s, p := range t.streams {
		if p.seen > p.durable && !t.rebuilding {
			b.applied[s] = *p
		}
	}
	t.mu.Unlock()
	for i := range t.stripes {
		s := &t.stripes[i]
		s.mu.Lock()
		for id, e := range s.entries {
			b.rows = append(b.rows, rowChange{id: id, next: e.state, version: e.version, inFile: e.inFile})
		}
		s.mu.Unlock()
	}
	slices.SortFunc(b.rows, func(x, y rowChange) int { return x.id.Compare(y.id) })
	return b
}

// retire removes the entries that the file now has, and wakes waiters.
func (t *Table) retire(b *batch) {
	t.retired.Add(1)
	for i := range b.rows {
		c := &b.rows[i]
		s := t.stripe(c.id)
		s.mu.Lock()
		switch e := s.entries[c.id]; {
		case e == nil:
		case e.version == c.version:
			t.pending.Add(-e.bytes)
			delete(s.entries, c.id)
		default:
			e.inFile = !c.next.empty()
		}
		s.mu.Unlock()
	}
	t.metrics.pending.Set(float64(t.pending.Load()))
	t.mu.Lock()
	for s, p := range b.applied {
		t.streams[s].durable = p.seen
	}
	t.done = t.begun
	t.mu.Unlock()
	t.space.Send()
	t.finished.Send()
}

func (t *Table) write(b *batch) (err error) {
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	tx, err := t.db.Begin(true)
	if err != nil {
		return err
	}
	// Needed when damage makes bbolt panic, or the file could not be closed. After a
	// commit it does nothing; otherwise the table has failed and its error adds nothing.
	defer func() { _ = tx.Rollback() }()
	t.now.Txid = uint64(tx.ID())
	if err := t.fill(tx, b); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	return markFormat.Write(t.mark, t.now)
}

func (t *Table) fill(tx *bbolt.Tx, b *batch) error {
	var buckets [tables]*bbolt.Bucket
	for n := range buckets {
		buckets[n] = bucket(tx, n)
	}
	// Rows and list entries are mostly appended, and pages that are split in half would
	// stay half empty. Leave some free space for rows that grow later.
	buckets[tableRows].FillPercent = 0.9
	buckets[indexList].FillPercent = 0.8
	buckets[indexDue].FillPercent = 0.9
	for i := range b.rows {
		if i%yieldRows == yieldRows-1 {
			runtime.Gosched()
		}
		if err := t.putRow(&buckets, b, &b.rows[i]); err != nil {
			return err
		}
	}
	if err := putCounts(buckets[tableMeta], b); err != nil {
		return err
	}
	if err := putSeals(buckets[tableSeals], b); err != nil {
		return err
	}
	if err := putDigests(buckets[tableDigests], b, t.digestsCut()); err != nil {
		return err
	}
	for s, p := range b.applied {
		if err := buckets[tableStreams].Put(streamKey(s), binary.BigEndian.AppendUint64(nil, p.seen)); err != nil {
			return err
		}
	}
	return putSum(tx)
}

// putRow writes one row, and the index entries, counts and digests that change
// with it.
func (t *Table) putRow(buckets *[tables]*bbolt.Bucket, b *batch, c *rowChange) error {
	var old state
	if c.inFile {
		var err error
		if old, err = parseValue(c.id, buckets[tableRows].Get(c.id[:])); err != nil {
			return err
		}
	}
	next := &c.next
	t.fillHead(c.id, next)
	if next.empty() {
		if err := buckets[tableRows].Delete(c.id[:]); err != nil {
			return err
		}
	} else {
		value, err := appendValue(b.arena.space(int(next.size())), next)
		if err != nil {
			return err
		}
		b.arena.keep(len(value))
		if err := buckets[tableRows].Put(c.id[:], value); err != nil {
			return err
		}
	}
	b.account(c.id, &old, -1)
	b.account(c.id, next, 1)
	b.old = old.appendIndexKeys(b.old[:0], c.id)
	b.next = next.appendIndexKeys(b.next[:0], c.id)
	for _, k := range b.old {
		if !containsKey(b.next, k) {
			if err := buckets[k.index].Delete(k.key); err != nil {
				return err
			}
		}
	}
	for _, k := range b.next {
		if !containsKey(b.old, k) {
			if err := buckets[k.index].Put(k.key, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

func containsKey(keys []indexKey, k indexKey) bool {
	return slices.ContainsFunc(keys, func(o indexKey) bool { return o.index == k.index && bytes.Equal(o.key, k.key) })
}

// account adds n times the row to the counts, seals and digests.
func (b *batch) account(id journal.JobID, s *state, n int64) {
	if status, ok := s.counted(); ok {
		b.counts[status] += n
	}
	for i := range s.records {
		if len(s.records[i].Payload) == 0 {
			continue
		}
		b.seals[sealOf(&s.records[i])] += n
	}
	if slot, ok := s.slot(); ok {
		d := b.digests[slot]
		if d == nil {
			d = new([256][16]byte)
			b.digests[slot] = d
		}
		var sum [16]byte
		sum, b.scratch = s.contribution(b.scratch)
		of := &d[bucketOf(id)]
		subtle.XORBytes(of[:], of[:], sum[:])
	}
}

// sealOf returns the key that sealed a payload, zero if it is unknown.
func sealOf(r *journal.Record) keyring.KeyID {
	id, err := keyring.SealedWith(r.Payload)
	if err != nil {
		return keyring.KeyID{}
	}
	return id
}

func putCounts(meta *bbolt.Bucket, b *batch) error {
	value := make([]byte, 8*len(statuses))
	copy(value, meta.Get(keyCounts))
	for i, n := range b.counts {
		at := value[8*i:]
		binary.BigEndian.PutUint64(at, uint64(int64(binary.BigEndian.Uint64(at))+n))
	}
	return meta.Put(keyCounts, value)
}

func putSeals(seals *bbolt.Bucket, b *batch) error {
	for id, n := range b.seals {
		if n == 0 {
			continue
		}
		if v := seals.Get(id[:]); len(v) == 8 {
			n += int64(binary.BigEndian.Uint64(v))
		}
		var err error
		if n == 0 {
			err = seals.Delete(id[:])
		} else {
			err = seals.Put(id[:], binary.BigEndian.AppendUint64(nil, uint64(n)))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// putDigests also removes the slots that are no longer compared. It keeps two before
// the cut for peers whose clock is behind.
func putDigests(digests *bbolt.Bucket, b *batch, cut timeSlot) error {
	for slot, change := range b.digests {
		key := slot.key()
		sums := make([]byte, 256*16)
		if v := digests.Get(key); v != nil && copy(sums, v) != len(sums) {
			return fmt.Errorf("%w: digests of %d bytes", ErrDamaged, len(v))
		}
		for i := range change {
			subtle.XORBytes(sums[16*i:16*i+16], sums[16*i:16*i+16], change[i][:])
		}
		if err := digests.Put(key, sums); err != nil {
			return err
		}
	}
	c := digests.Cursor()
	for k, _ := c.Seek((liveSlot + 1).key()); k != nil && bytes.Compare(k, (max(cut, 3)-2).key()) < 0; k, _ = c.Seek((liveSlot + 1).key()) {
		if err := c.Delete(); err != nil {
			return err
		}
	}
	return nil
}

func (s timeSlot) key() []byte { return binary.BigEndian.AppendUint64(nil, uint64(s)) }

// tenantPurpose is that of the MAC that hides tenants in the file.
const tenantPurpose = "job table tenant v1"

// tenantSum is a tenant's name and its MAC.
type tenantSum struct {
	name string
	sum  [16]byte
}

// tenantHash returns the MAC that stands for a tenant in the file.
func (t *Table) tenantHash(name string) (sum [16]byte, err error) {
	if r := t.recent.Load(); r != nil && r.name == name {
		return r.sum, nil
	}
	mac := t.tenant.Load()
	if mac == nil {
		if mac, err = t.o.Ring.MAC(tenantPurpose); err != nil {
			return sum, err
		}
		t.tenant.Store(mac)
	}
	full := mac.Sum([]byte(name))
	copy(sum[:], full[:])
	if sum == allTenants {
		sum[0] = 1 // happens for one of 2^128 tenants
	}
	t.recent.Store(&tenantSum{name, sum})
	return sum, nil
}

// keyHashOf returns the MAC that stands for a KeyHash in the file. A KeyHash is
// itself an HMAC.
func (t *Table) keyHashOf(keyHash string) (sum [16]byte, err error) {
	mac := t.tenant.Load()
	if mac == nil {
		if _, err := t.tenantHash(""); err != nil {
			return sum, err
		}
		mac = t.tenant.Load()
	}
	full := mac.Sum([]byte("key"), []byte(keyHash))
	copy(sum[:], full[:])
	return sum, nil
}

// fillHead opens the submission to read what the indexes need, unless that is
// already known. If the submission can't be opened because its key is missing, the
// sweeper tries again later.
func (t *Table) fillHead(id journal.JobID, s *state) {
	subs := s.submissions()
	if s.head.known || len(subs) == 0 {
		return
	}
	h := head{known: true}
	for i := range subs {
		sub, err := t.o.Sealer.Head(&subs[i])
		if err == nil {
			h.expires = max(h.expires, sub.ExpiresAt.UnixMilli())
		}
		if err == nil && i == 0 {
			h.tenant, err = t.tenantHash(sub.Tenant)
			if err == nil && sub.KeyHash != "" {
				h.key, err = t.keyHashOf(sub.KeyHash)
			}
		}
		if err != nil {
			t.metrics.unreadable.Inc()
			t.o.Logger.Error("can't open a job's submission; the job is in no list of its tenant", "job", id, "err", err)
			return
		}
	}
	s.head = h
}

// compareKeys orders list entries, newest first.
func compareKeys(a, b *listed) int {
	return cmp.Or(cmp.Compare(b.at, a.at), b.id.Compare(a.id))
}
