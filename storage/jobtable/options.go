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
	// ErrDamaged means that the table's file differs from what was written. The
	// table is derived: Discard it, open a new one, and fill that by replaying all
	// journals, and from another node's rows where the journals were trimmed.
	ErrDamaged = errors.New("the job table is damaged")
	// ErrFailed means that an earlier write failed; the node must stop.
	ErrFailed = errors.New("the job table has failed")
	// ErrClosed means that the table was closed.
	ErrClosed = errors.New("the job table is closed")
	// ErrNewerFormat means that a later version of dsnode wrote the table.
	ErrNewerFormat = errors.New("the job table has a format that this version does not know")
)

// Options of a Table. Dir, Sealer and Ring are required.
type Options struct {
	Dir    string // the caller holds its lock
	Sealer *journal.Sealer
	// Ring is the one of Sealer. The indexes contain tenants as MACs under its key.
	Ring *keyring.Ring
	// Retention returns how long a job is kept after its end. It is called each time,
	// since the setting may change. Nil: 24 h.
	Retention func() time.Duration
	Now       func() time.Time // nil: time.Now
	Clock     *journal.HLC     // the clock of the records; nil: a new one on Now
	Logger    *slog.Logger     // nil: no logs
	// BeforeCommit is called before each commit, with no lock held. It may block, and its
	// error is that of the commit. Nil: nothing.
	BeforeCommit func() error
	// Registerer gets the metrics; nil: none are registered.
	Registerer prometheus.Registerer
}

const (
	defaultRetention = 24 * time.Hour
	maxAhead         = 10 * time.Minute // for a Clock that is nil
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

// Filter selects the rows of List.
type Filter struct {
	// Tenant selects the tenant's jobs, "" those without a tenant; unless AllTenants.
	Tenant     string
	AllTenants bool
	// Status is the list of wanted statuses; empty: all.
	Status []journal.Status
	// After returns the jobs that follow this one in the list (older ones), Before
	// those directly in front of it (newer ones). At most one of them is set.
	After, Before journal.JobID
	Limit         int // 1 to MaxLimit; MaxLimit when 0
}

// MaxLimit bounds a page of List.
const MaxLimit = 100
