package node

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/storage/journal"
)

// jobCopies tells failover what each site has of the others' job journals.
type jobCopies struct{ j *asyncJobs }

// toldFor is how old the newest news of a node's journal may be to count.
const toldFor = 5 * time.Second

// AtRisk implements failover.Copies.
func (c jobCopies) AtRisk(from, to string) failover.AtRisk {
	s, peers := c.j.n.cluster.State(), c.j.n.cluster.Peers()
	ends := map[journal.Stream]uint64{}
	var unheard int64
	var silent []string // nodes whose journals may have grown unnoticed
	for name, node := range s.Nodes {
		if node.Site != from || name == c.j.n.cfg.Name {
			continue
		}
		p := peers[name]
		if st, err := readStream(p.Journal); err == nil {
			ends[st] = p.JournalEnd
			unheard += 2 * int64(p.JournalGrowth) //nolint:gosec // a count of records
		}
		if !told(p) && !c.j.replication.EndsKnown(name) {
			silent = append(silent, name)
		}
	}
	got := c.j.replication.CopyOf(to, from, streamsOf(s, from), ends)
	r := failover.AtRisk{Known: got.Known, Age: got.Age, Records: got.Records, Unheard: unheard}
	switch {
	case !got.Known:
		r.Doubt = fmt.Sprintf("no node of %s has told how old its copy is, as far as this node has heard", to)
	case len(silent) > 0:
		r.Doubt = fmt.Sprintf("it is not known what %s has written in the last %s", strings.Join(silent, " and "), toldFor)
	case !got.Lately:
		r.Doubt = fmt.Sprintf("%s has not told how old its copy is for more than %s", to, toldFor)
	}
	return r
}

// told reports whether a node has told the end of its journal lately.
func told(p cluster.PeerView) bool { return p.Journal != "" && p.HeardWithin(toldFor) }

// Ends implements failover.Copies.
func (c jobCopies) Ends(ctx context.Context, from string, nodes []string) (map[string]uint64, error) {
	held, err := c.j.replication.EndsOf(ctx, nodes, streamsOf(c.j.n.cluster.State(), from))
	if err != nil {
		return nil, err
	}
	ends := make(map[string]uint64, len(held))
	for st, end := range held {
		ends[keyOf(st)] = end
	}
	return ends, nil
}

// Lacking implements failover.Copies.
func (c jobCopies) Lacking(ctx context.Context, to string, ends map[string]uint64) (map[string]int64, error) {
	of := make(map[journal.Stream]uint64, len(ends))
	for key, end := range ends {
		st, err := readStream(key)
		if err != nil {
			return nil, err
		}
		of[st] = end
	}
	return c.j.replication.Lacking(ctx, to, of)
}

// streamsOf returns a function that reports whether a node of a site writes a stream, or
// executes its jobs. It does not block.
func streamsOf(s *agreed.State, site string) func(journal.Stream) bool {
	return func(st journal.Stream) bool {
		if s.Nodes[st.Origin].Site == site {
			return true
		}
		j, known := s.Streams[keyOf(st)]
		return known && s.Nodes[j.Owner].Site == site
	}
}

func keyOf(st journal.Stream) string { return agreed.StreamKey(st.Origin, st.Incarnation.String()) }

// readStream is the inverse of keyOf.
func readStream(key string) (journal.Stream, error) {
	origin, incarnation, _ := strings.Cut(key, "/")
	i, err := journal.ParseIncarnation(incarnation)
	return journal.Stream{Origin: origin, Incarnation: i}, err
}
