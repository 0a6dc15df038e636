package jobs

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

// ids makes the ids of jobs. Without an Idempotency-Key an id has 48 bits of Unix
// milliseconds and 80 random bits. With one it is an HMAC of tenant, key, endpoint and
// body: the same at every node, also in sites that can't reach each other.
type ids struct {
	ring *keyring.Ring
	mac  atomic.Pointer[keyring.MAC]
}

func newID(now time.Time) journal.JobID {
	var id journal.JobID
	_, _ = rand.Read(id[6:]) // it never returns an error
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(now.UnixMilli())<<16) //nolint:gosec // the time is after 1970
	copy(id[:6], ms[:6])
	return id
}

// keyed returns the id, and a hash of the key alone: two jobs with the same hash and
// different ids have the same key and different bodies. The error is
// keyring.ErrNoDataKey.
func (i *ids) keyed(tenant, key, endpoint string, body []byte) (id journal.JobID, hash string, err error) {
	mac := i.mac.Load()
	if mac == nil {
		if mac, err = i.ring.MAC("job id v1"); err != nil {
			return id, "", err
		}
		i.mac.Store(mac) // it never changes
	}
	ofBody := mac.Sum([]byte(tenant), []byte(key), []byte(endpoint), body)
	ofKey := mac.Sum([]byte(tenant), []byte(key))
	copy(id[:], ofBody[:])
	return id, hex.EncodeToString(ofKey[:16]), nil
}
