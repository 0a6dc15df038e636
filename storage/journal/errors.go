package journal

import "errors"

// What can go wrong with a log. ErrDamaged, ErrNewerFormat and ErrTooLarge stand
// with the record.
var (
	// ErrFailed means that a write or a sync failed, or that a stored record turned
	// out to be damaged. Nothing is read or written from then on; only a restart
	// of the node, with a sound disk, helps.
	ErrFailed = errors.New("the journal has failed")
	// ErrClosed means that the log was closed.
	ErrClosed = errors.New("the journal is closed")
	// ErrFull means that the disk has less room than the floor. Nothing was
	// written; it recovers by itself when there is room again.
	ErrFull = errors.New("the disk of the journal is full")
	// ErrUncertain means that the caller went away while its records were being
	// written: they may be in the journal or not.
	ErrUncertain = errors.New("the records may have been written")
	// ErrNoStream means that no such stream is held here.
	ErrNoStream = errors.New("no such stream")
	// ErrStreamExists means that the stream to create is there already.
	ErrStreamExists = errors.New("the stream exists")
	// ErrTooManyStreams means that MaxStreams are held.
	ErrTooManyStreams = errors.New("too many streams")
	// ErrFrozen means that the stream takes no records this way: appends go to a
	// stream of this process that is open, copies to any other.
	ErrFrozen = errors.New("the stream takes no such records")
	// ErrTrimmed means that the records are not held any more.
	ErrTrimmed = errors.New("the records have been trimmed")
	// ErrGap means that records are missing between what is held and what was
	// given or asked for.
	ErrGap = errors.New("records are missing in between")
	// ErrDiverged means that two different records have one place in a stream.
	// That must never happen; a disk was copied or an image restored.
	ErrDiverged = errors.New("a record differs from the one held in its place")
)
