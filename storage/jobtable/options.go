package jobtable

import (
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

var (
	// ErrDamaged means that the table's file is not what was written. It is
	// derived: Discard it, open a new one, and fill that by replaying all
	// journals, or from another node's rows where segments were trimmed.
	ErrDamaged = errors.New("the job table is damaged")
	// ErrFailed means that a write failed earlier; the node must stop.
	ErrFailed = errors.New("the job table has failed")
	// ErrClosed means that the table was closed.
	ErrClosed = errors.New("the job table is closed")
	// ErrNewerFormat means that a later version of dsnode wrote the table.
	ErrNewerFormat = errors.New("the job table is of a format that this version does not know")
)

// Options say where the table is and what it needs. Dir, Sealer and
// Ring are required.
type Options struct {
	Dir    string // its lock is held by the caller
	Sealer *journal.Sealer
	// Ring is the sealer's. Tenants stand in indexes as a MAC of it.
	Ring *keyring.Ring
	// Retention is how long after its end a job is kept, asked each time: it may
	// change. Nil: 24 h.
	Retention func() time.Duration
	Now       func() time.Time // time.Now when nil
	Clock     *journal.HLC     // of Now when nil; it says what time the records' clocks have come to
	Logger    *slog.Logger     // none when nil
	// Registerer gets the metrics; none when nil.
	Registerer prometheus.Registerer
}

const (
	defaultRetention = 24 * time.Hour
	maxAhead         = 10 * time.Minute // of a clock that is made here
)

func (o Options) withDefaults() Options {
	if o.Retention == nil {
		o.Retention = func() time.Duration { return defaultRetention }
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Clock == nil {
		o.Clock = journal.NewHLC(o.Now, maxAhead)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Filter says which rows List gives, newest first.
type Filter struct {
	// Tenant's jobs only, "" being those of no tenant, unless AllTenants.
	Tenant     string
	AllTenants bool
	// Status has to be one of these; any when empty.
	Status []journal.Status
	// After gives what comes behind this job in the list (older ones), Before
	// what stands directly before it (newer ones). At most one of them.
	After, Before journal.JobID
	Limit         int // 1 to MaxLimit; MaxLimit when 0
}

// MaxLimit bounds a page of List.
const MaxLimit = 100
