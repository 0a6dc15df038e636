package jobtable

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// How long what is left of a job is kept.
const (
	// maxExpiry is the longest expires_in of a job, for rows whose own can't be read.
	maxExpiry = 7 * 24 * time.Hour
	// idGrace is how long an id outlives the job's expiry: a late copy that
	// comes after it is expired anyway.
	idGrace = 24 * time.Hour
	// orphanFor is how long a row waits for its submission.
	orphanFor = 24 * time.Hour
)

// Classes of the due index: what the sweeper has to do when.
const (
	dueHead   = 'h' // read the submission again: it could not be opened
	dueFinal  = 'f' // ended at
	dueOrphan = 'o' // first seen at
	dueGone   = 't' // forget the id at
)

// everybody is in the list index where a tenant's hash stands, for lists over
// all tenants.
var everybody [16]byte

// statuses in the order of their numbers in the file. Never reorder.
var statuses = [...]journal.Status{
	journal.Queued, journal.Running, journal.Succeeded, journal.Failed, journal.Cancelled, journal.Expired,
}

func statusNumber(s journal.Status) int { return slices.Index(statuses[:], s) }

// counted gives the number of the status that the job counts under; false for
// one that is not shown or gone.
func (s *state) counted() (int, bool) {
	if s.until > 0 || len(s.submissions()) == 0 {
		return 0, false
	}
	return statusNumber(Row{s.records}.Status()), true
}

func (s *state) live() bool {
	n, ok := s.counted()
	return ok && !statuses[n].Final()
}

// goneAt is when the id of a job may be forgotten that is, or was, submitted.
func (s *state) goneAt() int64 {
	end := s.at.Time().Add(maxExpiry)
	if s.head.known {
		end = time.UnixMilli(s.head.expires)
	}
	return end.Add(idGrace).UnixMilli()
}

// due is what the sweeper has to do with the row and since or until when; false
// when nothing.
func (s *state) due() (class byte, at int64, ok bool) {
	if s.until > 0 {
		return dueGone, s.until, true
	}
	r := Row{s.records}
	if rec, ok := r.first(deleted); ok {
		return dueGone, rec.Clock.Time().Add(maxExpiry + idGrace).UnixMilli(), true
	}
	if len(s.submissions()) == 0 {
		return dueOrphan, s.noted, len(s.records) > 0
	}
	if rec, ok := r.first(finished); ok {
		return dueFinal, rec.Clock.Time().UnixMilli(), true
	}
	return 0, 0, false
}

// Slot is a span of time by which digests are kept apart, so that tables can be
// compared while each forgets jobs at its own moment.
type Slot uint64

const (
	slotLength = time.Hour
	liveSlot   = Slot(0) // jobs that are not final
)

func slotOf(t time.Time) Slot { return Slot(max(0, t.UnixMilli())/slotLength.Milliseconds()) + 1 }

// slot says where the row counts; false when nowhere: it has no submission, or
// is forgotten.
func (s *state) slot() (Slot, bool) {
	if s.until > 0 || len(s.records) == 0 {
		return 0, false
	}
	r := Row{s.records}
	if rec, ok := r.first(deleted); ok {
		return slotOf(rec.Clock.Time()), true
	}
	if rec, ok := r.first(finished); ok && r.visible() {
		return slotOf(rec.Clock.Time()), true
	}
	return liveSlot, r.visible()
}

// contribution is the row's part of its bucket's digest. It leaves the payloads
// out: Digest stands for what they say.
func (s *state) contribution(scratch []byte) (sum [16]byte, buffer []byte) {
	b := scratch[:0]
	for i := range s.records {
		r := s.records[i]
		r.Payload = nil
		// It can't be too large without its payload: it was a frame before.
		b, _ = journal.AppendFrame(b, &r)
	}
	full := sha256.Sum256(b)
	copy(sum[:], full[:])
	return sum, b
}

// bucketOf is a job's bucket. The last byte of every id is random or of an HMAC.
func bucketOf(id journal.JobID) byte { return id[len(id)-1] }

// indexKey is an entry of an index: a bucket of the file and a key.
type indexKey struct {
	index int
	key   []byte
}

// appendIndexKeys appends all entries that the row has in the indexes.
func (s *state) appendIndexKeys(keys []indexKey, id journal.JobID) []indexKey {
	if s.empty() {
		return keys
	}
	if class, at, ok := s.due(); ok {
		keys = append(keys, indexKey{indexDue, dueKey(class, at, id)})
	}
	number, ok := s.counted()
	if !ok {
		return keys
	}
	keys = append(keys, indexKey{indexList, listKey(everybody, number, s.at, id)})
	if s.head.known {
		keys = append(keys, indexKey{indexList, listKey(s.head.tenant, number, s.at, id)})
		if s.head.key != [16]byte{} {
			keys = append(keys, indexKey{indexKeys, append(s.head.key[:], id[:]...)})
		}
	} else {
		keys = append(keys, indexKey{indexDue, dueKey(dueHead, 0, id)})
	}
	if !statuses[number].Final() {
		for _, home := range (Row{s.records}).Homes() {
			keys = append(keys, indexKey{indexLive, append(streamKey(home), id[:]...)})
		}
	}
	return keys
}

func dueKey(class byte, at int64, id journal.JobID) []byte {
	k := make([]byte, 0, 1+8+16)
	k = append(k, class)
	k = binary.BigEndian.AppendUint64(k, uint64(at))
	return append(k, id[:]...)
}

const listPrefix = 16 + 1 // tenant, status

func listKey(tenant [16]byte, status int, at journal.Clock, id journal.JobID) []byte {
	k := make([]byte, 0, listPrefix+8+16)
	k = append(k, tenant[:]...)
	k = append(k, byte(status))
	k = binary.BigEndian.AppendUint64(k, uint64(at))
	return append(k, id[:]...)
}

func streamKey(s journal.Stream) []byte {
	k := make([]byte, 0, 16+len(s.Origin)+16)
	k = append(k, s.Incarnation[:]...)
	return append(k, s.Origin...)
}

func parseStreamKey(k []byte) (journal.Stream, bool) {
	if len(k) <= 16 || len(k) > 16+journal.MaxOrigin {
		return journal.Stream{}, false
	}
	return journal.Stream{Origin: string(k[16:]), Incarnation: journal.Incarnation(k[:16])}, true
}
