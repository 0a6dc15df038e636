package jobs

import (
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// What a client's call can die of. The gateway puts them into words.
var (
	// ErrNotFound: no such job for this tenant.
	ErrNotFound = errors.New("no such job")
	// ErrNotFinal: a job that is not done can't be deleted.
	ErrNotFinal = errors.New("only jobs that are done can be deleted")
	// ErrNotRetryable: the job succeeded or is not done.
	ErrNotRetryable = errors.New("only jobs that failed, expired or were cancelled can be retried")
	// ErrImpossible: the cluster's sites and nodes can't give the durability.
	ErrImpossible = errors.New("the cluster can't give this durability")
	// ErrKeyReused: the Idempotency-Key came with another body before, or its job
	// has ended and is not kept any more.
	ErrKeyReused = errors.New("the Idempotency-Key was used for another request")
	// ErrNotReady: this node can't take jobs yet.
	ErrNotReady = errors.New("this node can't take jobs yet")
	// ErrPartial: this node's table was damaged, is made anew from other nodes' and
	// may lack what was asked for.
	ErrPartial = errors.New("this node's job table was damaged and is made anew from other nodes")
	// ErrBusy: the node holds as many jobs as it may.
	ErrBusy = errors.New("too many jobs wait at this node")
	// ErrUnavailable: the journal takes nothing now.
	ErrUnavailable = errors.New("jobs can't be written now")
	// ErrBadCursor: after or before names no job that can be seen.
	ErrBadCursor = errors.New("the cursor names no job")
)

// DurabilityError: the job was written and is not known to be as durable as
// asked. It may exist.
type DurabilityError struct {
	ID     journal.JobID
	Wanted journal.Durability
	Has    journal.Durability
	After  time.Duration
}

func (e *DurabilityError) Error() string {
	return fmt.Sprintf("the job is %q durable after %s, %q was asked for", e.Has, e.After, e.Wanted)
}
