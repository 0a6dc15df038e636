package failover

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Copies tells what the other sites have of a site's job journals. Streams are named by
// agreed.StreamKey. Those of a site are the ones that a node of it wrote, or executes.
type Copies interface {
	// AtRisk is what the loss of a site would lose if another took over, as this node last
	// heard. It must not block.
	AtRisk(from, to string) AtRisk
	// Ends asks nodes of a site up to where they hold its streams now.
	Ends(ctx context.Context, from string, nodes []string) (map[string]uint64, error)
	// Lacking asks the nodes of a site how many of the records up to these ends it lacks
	// now, by the node that wrote them.
	Lacking(ctx context.Context, to string, ends map[string]uint64) (map[string]int64, error)
}

// AtRisk is what a site lacks of another site's job journals.
type AtRisk struct {
	// Known: the site itself has told how old its copy is. Without that, nothing else here
	// is known.
	Known bool
	// Records are those that some node is known to have had and the site lacks, by the node
	// that wrote them.
	Records map[string]int64
	// Age: the site has everything that the other one had on its disks this long ago.
	Age time.Duration
	// Doubt says why there may be more: what is not known, or is out of date. Empty: none.
	Doubt string
	// Unheard is how many records the other site may have written since it was last heard:
	// as many as it wrote at most in two pings' time lately.
	Unheard int64
}

// Total is the number of Records, nil when it is not known.
func (r AtRisk) Total() *int64 {
	if !r.Known {
		return nil
	}
	n := int64(0)
	for _, lacking := range r.Records {
		n += lacking
	}
	return &n
}

// onItsWayFor bounds the age of a copy that counts as one that keeps up: the records that
// it lacks are on their way. An idle copy is measured once a second.
const onItsWayFor = 2 * time.Second

// lossless says whether a switchover to a site can go without loss, and why. Records that
// are on their way are no obstacle, because the switchover waits for them.
func lossless(from, to string, r AtRisk) (ok bool, detail string) {
	if !r.Known {
		return false, fmt.Sprintf("it is not known what %s has of the jobs of %s: %s", to, from, r.Doubt)
	}
	lacks := fmt.Sprintf("%s lacks %s", to, recordsOf(r.Records))
	if len(r.Records) == 0 {
		lacks = fmt.Sprintf("%s lacks no record of %s", to, from)
	}
	age := "its copy is " + seconds(r.Age) + " old"
	switch {
	case r.Doubt != "":
		return false, fmt.Sprintf("%s; as last known %s, %s", r.Doubt, lacks, age)
	case len(r.Records) == 0:
		return true, fmt.Sprintf("%s, %s", lacks, age)
	case r.Age < onItsWayFor:
		return true, fmt.Sprintf("%s, %s: they are on their way, and the switchover waits for them", lacks, age)
	}
	return false, fmt.Sprintf("%s, %s", lacks, age)
}

// recordsOf names numbers of records by origin.
func recordsOf(records map[string]int64) string {
	var parts []string
	for _, origin := range slices.Sorted(maps.Keys(records)) {
		parts = append(parts, fmt.Sprintf("%d of %s", records[origin], origin))
	}
	return strings.Join(parts, ", ") + " (job records)"
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// lossOf gives the figures of a failover: how many records, and the work of how much time,
// may be lost. silence is how long the lost site has been silent. The site may have worked
// on after the last ping that it answered, until shortly before the next one was due, so
// that time counts; later than that it was cut off, and what it wrote then comes back with
// it.
func lossOf(r AtRisk, silence, tick time.Duration) (records *int64, rpo *float64) {
	records = r.Total()
	if records == nil {
		return nil, nil
	}
	*records += r.Unheard
	s := max(0, r.Age-max(0, silence-2*tick)).Seconds()
	return records, &s
}
