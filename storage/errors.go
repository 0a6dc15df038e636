package storage

import (
	"errors"

	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/keyring"
)

var (
	// ErrDamaged means that a file differs from what was written: bytes changed,
	// records are missing, or an older copy replaced it. The rest of the file is
	// not used.
	ErrDamaged = boltfile.ErrDamaged
	// ErrForeign means that a file is not of the kind that its name says.
	ErrForeign = boltfile.ErrForeign
	// ErrFailed means that an earlier write failed. The store reads and writes
	// nothing any more; the node must restart, on a working disk.
	ErrFailed = errors.New("storage has failed")
	// ErrClosed means that the store was closed.
	ErrClosed = errors.New("storage is closed")
	// ErrOutOfOrder means that entries do not follow the last one stored, or that
	// a deletion would leave a hole.
	ErrOutOfOrder = errors.New("log entries out of order")
	// ErrTooLarge means that a record exceeds the limit for its kind.
	ErrTooLarge = errors.New("record too large")
	// ErrLocked means that another process uses the data directory.
	ErrLocked = errors.New("data directory is in use")
	// ErrReplaced means that the data directory was deleted or replaced while it is open.
	ErrReplaced = errors.New("the data directory was deleted or replaced while the node runs")
)

// The keyring's sentinel errors pass through unchanged; these aliases spare
// callers the import.
var (
	ErrWrongKey    = keyring.ErrWrongKey
	ErrNewerFormat = keyring.ErrNewerFormat
)
