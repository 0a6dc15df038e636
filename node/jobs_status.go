package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/replication"
)

// Status returns the counts of jobs, and how far the copies of each site are behind. Both
// are nil before run is ready.
func (j *asyncJobs) Status(s *agreed.State) (*admin.Jobs, map[string]replication.Copy) {
	c, err := j.service.Counts()
	if errors.Is(err, jobs.ErrNotReady) || s.Parsed == nil {
		return nil, nil
	}
	copies := make(map[string]replication.Copy, len(s.Parsed.Sites))
	for site := range s.Parsed.Sites {
		copies[site] = j.replication.Copy(site)
	}
	if err != nil { // rows are missing: the counts are unknown
		return &admin.Jobs{}, copies
	}
	return &admin.Jobs{Queued: &c.Queued, Running: &c.Running, Succeeded: &c.Succeeded, Failed: &c.Failed}, copies
}

// Alone is what only another node has.
func (j *asyncJobs) Alone(node string) replication.Alone { return j.replication.Alone(node) }

// Problems says what is wrong with the journals of this node, and why it can't start jobs.
func (j *asyncJobs) Problems() []string {
	var problems []string
	if free, floor, known := j.log.Space(); known && free <= floor {
		problems = append(problems, fmt.Sprintf("its disk has %d MiB left, less than its reserve of %d MiB: it refuses new jobs, and below half of it copies of other nodes' jobs; "+
			"make room on the disk with %s", free>>20, floor>>20, j.n.cfg.DataDir))
	}
	if j.n.dataDir != nil {
		if err := j.n.dataDir.Intact(); err != nil {
			problems = append(problems, fmt.Sprintf("%v: it refuses jobs, and forgets at its end what it has accepted since its start; "+
				"stop it, put its data directory back or leave it empty, and start it", err))
		}
	}
	if damaged := j.damaged(); damaged != "" {
		problems = append(problems, damaged)
	}
	if j.service == nil { // the node is being opened
		return problems
	}
	if cant := j.service.Problem(); cant != "" {
		problems = append(problems, cant)
	}
	return problems
}

// Missing says why this node may lack jobs that other nodes have; empty: it doesn't.
func (j *asyncJobs) Missing() string { return missing(j.replication.Standing()) }

func missing(st replication.Standing) string {
	switch {
	case st.Partial:
		since, from := "", "no node whose table is complete has answered yet"
		if !st.Since.IsZero() {
			since = " since " + st.Since.UTC().Format(time.RFC3339)
		}
		if st.From != "" {
			from = fmt.Sprintf("it has %d jobs and gets the %d jobs of node %s", st.Jobs, st.Of, st.From)
		}
		return fmt.Sprintf("its job table is new or was damaged and lacks jobs%s (%s): until it is complete, don't stop, wipe or remove other nodes, "+
			"and ask another node for jobs; jobs that were accepted here before are not executed", since, from)
	case len(st.Behind) > 0:
		return fmt.Sprintf("it has not yet received all jobs of %s", strings.Join(st.Behind, ", "))
	}
	return ""
}

// damaged says which records this node's own journals have lost; empty: none.
func (j *asyncJobs) damaged() string {
	for s, end := range j.log.Ends() {
		if s.Origin == j.n.cfg.Name && end.Damaged != 0 {
			return fmt.Sprintf("its journal %s lost records %d to %d to damage, and no node that is heard has them: "+
				"start a node that has them, or remove this one (dsnode node remove) so that other nodes take over its jobs",
				s, end.Durable+1, end.Damaged)
		}
	}
	return ""
}

// Check compares the table with the journals, for operators and tests.
func (j *asyncJobs) Check(ctx context.Context) error {
	if _, err := j.service.Counts(); err != nil {
		return err
	}
	ends := j.log.Ends()
	if err := j.table.Check(ctx); err != nil {
		return err
	}
	for s, end := range ends {
		if applied := j.table.Applied(s); applied < end.Durable {
			return fmt.Errorf("the table has %s up to %d, the journal up to %d", s, applied, end.Durable)
		}
	}
	return nil
}
