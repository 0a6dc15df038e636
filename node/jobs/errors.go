package jobs

import (
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// Errors of a call. The gateway maps them to statuses and messages.
var (
	// ErrNotFound: no such job for this tenant.
	ErrNotFound = errors.New("no such job")
	// ErrNotFinal: a job that has not ended can't be deleted.
	ErrNotFinal = errors.New("only jobs that have ended can be deleted")
	// ErrNotRetryable: the job succeeded or has not ended.
	ErrNotRetryable = errors.New("only jobs that failed, expired or were cancelled can be retried")
	// ErrImpossible: the cluster's sites and nodes can't give the durability.
	ErrImpossible = errors.New("the cluster can't give this durability")
	// ErrKeyReused: the Idempotency-Key was used with another body, or its job was deleted.
	ErrKeyReused = errors.New("the Idempotency-Key was used for another request")
	// ErrNotReady: this node is starting or stopping, or has no data keys yet.
	ErrNotReady = errors.New("this node can't take jobs yet")
	// ErrNoStream: this node writes a stream that the cluster has not agreed on for a while,
	// so that no node can start a job of it.
	ErrNoStream = errors.New("the cluster has not agreed on this node's job stream")
	// ErrPartial: this node has just started, or its job table is new or was damaged. The
	// answer may depend on jobs that it has not received from other nodes yet.
	ErrPartial = errors.New("this node is still getting jobs from other nodes")
	// ErrBusy: the node has reached its bound of waiting jobs or bytes.
	ErrBusy = errors.New("too many jobs wait at this node")
	// ErrUnavailable: the journal can't write now.
	ErrUnavailable = errors.New("jobs can't be written now")
	// ErrBadCursor: after or before names no job that the caller may see.
	ErrBadCursor = errors.New("the cursor names no job")
)

// DurabilityError: the job was written, but it is not known to be as durable as the client
// asked. The job may exist and run.
type DurabilityError struct {
	ID     journal.JobID
	Wanted journal.Durability
	Has    journal.Durability
	After  time.Duration
}

func (e *DurabilityError) Error() string {
	return fmt.Sprintf("the job is %q durable after %s, %q was asked for", e.Has, e.After, e.Wanted)
}
