package jobtable

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// How long the rest of a job is kept.
const (
	// maxExpiry is the longest expires_in of a job, for a submission that can't be
	// opened.
	maxExpiry = 7 * 24 * time.Hour
	// idGrace is how long an id is kept after the job's expiry. A copy of the job
	// that arrives later has expired anyway.
	idGrace = 24 * time.Hour
	// orphanFor is how long a row waits for its submission.
	orphanFor = 24 * time.Hour
)

// Classes of entries in the due index: what the sweeper does, and what the time is.
const (
	dueHead   = 'h' // try again to open the submission
	dueFinal  = 'f' // remove the content; time the job ended
	dueOrphan = 'o' // remove a row without submission; time first seen
	dueID     = 't' // forget the id; time to do it
)

// allTenants takes the place of a tenant's hash in the list index, for lists over
// all tenants.
var allTenants [16]byte

// statuses are numbered in the file by their order here. Never reorder.
var statuses = [...]journal.Status{
	journal.Queued, journal.Running, journal.Succeeded, journal.Failed, journal.Cancelled, journal.Expired,
}

func statusNumber(s journal.Status) int { return slices.Index(statuses[:], s) }

// counted returns the number of the status under which the job is counted; false
// for a job that is not shown or is deleted.
func (s *state) counted() (int, bool) {
	if s.idUntil > 0 || len(s.submissions()) == 0 {
		return 0, false
	}
	return statusNumber(Row{s.records}.Status()), true
}

func (s *state) live() bool {
	n, ok := s.counted()
	return ok && !statuses[n].Final()
}

// idExpiry returns when the id of a submitted job may be forgotten.
func (s *state) idExpiry() int64 {
	end := s.at.Time().Add(maxExpiry)
	if s.head.known {
		end = time.UnixMilli(s.head.expires)
	}
	return end.Add(idGrace).UnixMilli()
}

// due returns the row's class and time in the due index; false when the sweeper has
// nothing to do with it.
func (s *state) due() (class byte, at int64, ok bool) {
	if s.idUntil > 0 {
		return dueID, s.idUntil, true
	}
	r := Row{s.records}
	if rec, ok := r.first(deleted); ok {
		return dueID, rec.Clock.Time().Add(maxExpiry + idGrace).UnixMilli(), true
	}
	if len(s.submissions()) == 0 {
		return dueOrphan, s.firstSeen, len(s.records) > 0
	}
	if rec, ok := r.first(finished); ok {
		return dueFinal, rec.Clock.Time().UnixMilli(), true
	}
	return 0, 0, false
}

// timeSlot is a span of time. Digests are kept per slot, so that tables can be compared
// although each node forgets jobs at a slightly different moment.
type timeSlot uint64

const (
	slotLength = time.Hour
	liveSlot   = timeSlot(0) // jobs that are not final
)

func slotOf(t time.Time) timeSlot {
	return timeSlot(max(0, t.UnixMilli())/slotLength.Milliseconds()) + 1
}

// slot returns the slot whose digests include the row; false for none: the row has
// no submission, or is forgotten.
func (s *state) slot() (timeSlot, bool) {
	if s.idUntil > 0 || len(s.records) == 0 {
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

// contribution returns the row's part of its bucket's digest. It leaves out the
// payloads; a record's Digest covers their content.
func (s *state) contribution(scratch []byte) (sum [16]byte, buffer []byte) {
	b := scratch[:0]
	for i := range s.records {
		r := s.records[i]
		r.Payload = nil
		// AppendFrame can't fail: the record, with its payload, was a frame before.
		b, _ = journal.AppendFrame(b, &r)
	}
	full := sha256.Sum256(b)
	copy(sum[:], full[:])
	return sum, b
}

// bucketOf returns a job's bucket. The last byte of an id is random or from an HMAC.
func bucketOf(id journal.JobID) byte { return id[len(id)-1] }

// indexKey is one entry of an index.
type indexKey struct {
	index int
	key   []byte
}

// appendIndexKeys appends all index entries of the row.
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
	keys = append(keys, indexKey{indexList, listKey(allTenants, number, s.at, id)})
	if s.head.known {
		keys = append(keys, indexKey{indexList, listKey(s.head.tenant, number, s.at, id)})
		if s.head.key != [16]byte{} {
			keys = append(keys, indexKey{indexKeys, append(s.head.key[:], id[:]...)})
		}
	} else {
		keys = append(keys, indexKey{indexDue, dueKey(dueHead, 0, id)})
	}
	if !statuses[number].Final() {
		for _, home := range (Row{s.records}).AcceptedBy() {
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
