package storage

import (
	"errors"

	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/keyring"
)

var (
	// ErrDamaged means that a file is not what was written: bytes have
	// changed, records are missing, or an older copy stands in its place. What
	// is left is not used.
	ErrDamaged = boltfile.ErrDamaged
	// ErrForeign means that a file is of another kind than its name says.
	ErrForeign = boltfile.ErrForeign
	// ErrFailed means that a write failed earlier. Nothing is read or written
	// from then on; only a restart of the node, with a sound disk, helps.
	ErrFailed = errors.New("storage has failed")
	// ErrClosed means that the store was closed.
	ErrClosed = errors.New("storage is closed")
	// ErrOutOfOrder means that entries do not come after the last one stored,
	// or that a deletion would leave a hole.
	ErrOutOfOrder = errors.New("log entries out of order")
	// ErrTooLarge means that a record is beyond the bound of its kind.
	ErrTooLarge = errors.New("record too large")
	// ErrLocked means that another process uses the data directory.
	ErrLocked = errors.New("data directory is in use")
)

// The keyring's own sentinels come through unchanged; they stand here too so
// that callers of this package need not import the other.
var (
	ErrWrongKey    = keyring.ErrWrongKey
	ErrNewerFormat = keyring.ErrNewerFormat
)
