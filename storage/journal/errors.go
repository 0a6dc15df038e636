package journal

import "errors"

// Errors of a Log. ErrDamaged, ErrNewerFormat and ErrTooLarge are defined in
// record.go.
var (
	// ErrFailed means that a write or a sync failed, or that a stored record is
	// damaged. The log reads and writes nothing any more; the node must restart, on a
	// working disk.
	ErrFailed = errors.New("the journal has failed")
	// ErrClosed means that the log was closed.
	ErrClosed = errors.New("the journal is closed")
	// ErrFull means that the disk has less free space than the floor. Nothing was
	// written. It ends by itself when there is space again.
	ErrFull = errors.New("the disk of the journal is full")
	// ErrReplaced means that the journal's directory was deleted or replaced while it is open.
	ErrReplaced = errors.New("the directory of the journal was deleted or replaced")
	// ErrUncertain means that the caller's context ended while its records were being
	// written: they may be in the journal or not.
	ErrUncertain = errors.New("the records may have been written")
	// ErrNoStream means that this node does not hold the stream.
	ErrNoStream = errors.New("no such stream")
	// ErrStreamExists means that the stream to create exists.
	ErrStreamExists = errors.New("the stream exists")
	// ErrTooManyStreams means that the log holds MaxStreams.
	ErrTooManyStreams = errors.New("too many streams")
	// ErrFrozen means that the stream does not take records by this call: Append is for
	// streams created in this process and not frozen, Receive for all others.
	ErrFrozen = errors.New("the stream does not take records this way")
	// ErrTrimmed means that this node no longer holds the records.
	ErrTrimmed = errors.New("the records have been trimmed")
	// ErrGap means that records are missing between those held and those given or asked
	// for.
	ErrGap = errors.New("records are missing in between")
	// ErrDiverged means that two different records have the same place in a stream.
	// Only a copied disk or a restored image can cause it.
	ErrDiverged = errors.New("a record differs from the one held in its place")
)

// Refused reports whether an error means that nothing was written and that the same call may
// succeed later: the disk has too little room, or the directory is gone.
func Refused(err error) bool { return errors.Is(err, ErrFull) || errors.Is(err, ErrReplaced) }
