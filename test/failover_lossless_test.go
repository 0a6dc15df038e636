//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// journalsOn makes disks for the journals alone of nodes: while one hangs, its node gets no
// job records, and all else works.
func journalsOn(t *testing.T, nodes ...string) (disks map[string]*lab.Disk, configure func(*node.Config)) {
	t.Helper()
	disks = map[string]*lab.Disk{}
	dirs := map[string]string{}
	for _, name := range nodes {
		disks[name] = lab.NewDisk(t)
		dirs[name] = filepath.Join(t.TempDir(), "data")
		journals := filepath.Join(disks[name].Dir(), "journal")
		for _, dir := range []string{dirs[name], journals} {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(journals, filepath.Join(dirs[name], "journal")); err != nil {
			t.Fatal(err)
		}
	}
	return disks, func(c *node.Config) {
		if dir, known := dirs[c.Name]; known {
			c.DataDir = dir
		}
	}
}

var lacks = regexp.MustCompile(`lacks (\d+) of shanghai-a-1 .*its copy is ([0-9.]+) s old`)

// lossless returns the plan's check of that name.
func lossless(ctx context.Context, n *lab.Node, to string) (admin.Check, error) {
	plan, err := n.SwitchoverPlan(ctx, to)
	if err != nil {
		return admin.Check{}, err
	}
	i := slices.IndexFunc(plan.Checks, func(c admin.Check) bool { return c.Name == "lossless" })
	if i < 0 {
		return admin.Check{}, fmt.Errorf("%s's plan has no check lossless: %+v", n.Name, plan)
	}
	return plan.Checks[i], nil
}

// acknowledgedBetween counts the jobs that were acknowledged in a time.
func acknowledgedBetween(jobs []lab.Job, from, to time.Time) int {
	n := 0
	for _, j := range jobs {
		if j.Acknowledged.After(from) && j.Acknowledged.Before(to) {
			n++
		}
	}
	return n
}

// The target of a switchover does not get the job records of the old primary. Every node's
// plan names them, by origin and with the age of the copy, and the switchover is refused. An
// accepted loss goes on, and its figures are not less than what clients were told is stored.
// When the target gets the records, nothing was lost.
func TestFailoverLosslessOrRefused(t *testing.T) {
	disks, configure := journalsOn(t, "shanghai-b-1")
	disk := disks["shanghai-b-1"]
	defer disk.Resume()
	s := begin(t, lab.Topology{Node: configure})
	old, epoch, _ := s.primary()
	target := s.lab.Sites[1]
	if old != s.lab.Sites[0] {
		t.Fatalf("%s is the primary, the test needs %s", old.Name, s.lab.Sites[0].Name)
	}
	jobs := s.lab.StartJobs(lab.JobLoad{Clients: 2, Durabilities: []string{"node"}, Sites: []*lab.Site{old}, Every: 50 * time.Millisecond})
	await(t, s.running, 50)
	s.lab.WaitFor(within(15*time.Second), "the plan of each node to be lossless", func(ctx context.Context) error {
		for _, n := range s.lab.Nodes() {
			if check, err := lossless(ctx, n, target.Name); err != nil || !check.OK {
				return fmt.Errorf("%s: %+v, %w", n.Name, check, err)
			}
		}
		return nil
	})

	disk.Hang()
	hung := time.Now()
	s.audit.Unhealthy()
	s.lab.WaitFor(within(15*time.Second), "the plan of each node to name the records", func(ctx context.Context) error {
		for _, n := range s.lab.Nodes() {
			check, err := lossless(ctx, n, target.Name)
			if err != nil || check.OK || check.Waivable {
				return fmt.Errorf("%s: %+v, %w", n.Name, check, err)
			}
			found := lacks.FindStringSubmatch(check.Detail)
			if found == nil {
				return fmt.Errorf("%s: %s", n.Name, check.Detail)
			}
			if age, err := strconv.ParseFloat(found[2], 64); err != nil || age > time.Since(hung).Seconds()+5 {
				t.Errorf("%s: %v after the disk hung: %s", n.Name, time.Since(hung), check.Detail)
			}
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, n := range s.lab.Nodes() {
		result, err := n.Switchover(ctx, target.Name)
		var refused *lab.Refused
		if !errors.As(err, &refused) || refused.Code != "precheck_failed" || !strings.Contains(refused.Message, "lossless") || !lacks.MatchString(refused.Message) {
			t.Fatalf("asked at %s: %+v, %v", n.Name, result, err)
		}
		t.Logf("asked at %s: %v", n.Name, refused)
	}
	if site, now, _ := s.primary(); site != old || now != epoch {
		t.Errorf("%s is the primary in epoch %d, want %s in %d", site.Name, now, old.Name, epoch)
	}

	asked := time.Now()
	result, err := old.Nodes[0].SwitchoverAs(ctx, admin.FailoverRequest{To: target.Name, AcceptLoss: true})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(result.Checks, func(c admin.Check) bool { return c.Name == "lossless" })
	if i < 0 || !strings.Contains(result.Checks[i].Detail, "the loss is accepted") || !lacks.MatchString(result.Checks[i].Detail) {
		t.Errorf("the checks %+v don't name the loss", result.Checks)
	}
	s.awaitChange(asked, epoch+1, within(5*time.Second), s.lab.Nodes())
	s.audit.Heal()
	disk.Resume()
	s.lab.WaitHealthy(within(returns))
	ledger := jobs.Stop()
	// Half a second before it hung, records may have been on their way.
	least := acknowledgedBetween(ledger, hung.Add(500*time.Millisecond), asked)
	switch {
	case result.RecordsAtRisk == nil || result.RPOSeconds == nil:
		t.Errorf("no figures: %+v", result)
	case *result.RecordsAtRisk < int64(least) || *result.RPOSeconds < asked.Sub(hung).Seconds()-2:
		t.Errorf("%d records of the last %.1f s are at risk; clients had %d jobs acknowledged in the %.1f s since the disk hung",
			*result.RecordsAtRisk, *result.RPOSeconds, least, asked.Sub(hung).Seconds())
	default:
		t.Logf("%d records of the last %.1f s were at risk, of at least %d jobs; no primary for %.0f ms",
			*result.RecordsAtRisk, *result.RPOSeconds, least, 1000*result.IdleSeconds)
	}
	s.wantFigures(target.Nodes[0], epoch+1, result.RecordsAtRisk, result.RPOSeconds)
	for _, n := range s.lab.Nodes() {
		s.wantJobs(n, ledger)
	}
	s.end()
}

// wantFigures checks what a node shows of the last failover.
func (s *scenario) wantFigures(n *lab.Node, epoch uint64, records *int64, rpo *float64) {
	s.t.Helper()
	status, err := n.Status(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	f := status.LastFailover
	if f == nil || f.Epoch != epoch || f.RecordsAtRisk == nil || records == nil || *f.RecordsAtRisk != *records || f.RPOSeconds == nil || rpo == nil || *f.RPOSeconds != *rpo {
		s.t.Errorf("%s shows the failover %+v, want epoch %d, %v records and %v s", n.Name, f, epoch, records, rpo)
	}
}

// wantJobs waits until a node has every job that was acknowledged.
func (s *scenario) wantJobs(n *lab.Node, ledger []lab.Job) {
	s.t.Helper()
	next := 0
	s.lab.WaitFor(within(returns), n.Name+" to have every job", func(ctx context.Context) error {
		for ; next < len(ledger); next++ {
			if ledger[next].Acknowledged.IsZero() {
				continue
			}
			if _, err := n.Job(ctx, ledger[next].ID); err != nil {
				return fmt.Errorf("job %d: %w", next, err)
			}
		}
		return nil
	})
}

// The primary's site is destroyed with job records that it alone has. The record of the
// failover counts at least as many as are lost, over at least the time of the oldest.
func TestFailoverSaysWhatMayBeLost(t *testing.T) {
	disks, configure := journalsOn(t, "shanghai-b-1", "beijing-1")
	defer func() {
		for _, d := range disks {
			d.Resume()
		}
	}()
	s := begin(t, lab.Topology{Node: configure})
	old, epoch, _ := s.primary()
	if old != s.lab.Sites[0] {
		t.Fatalf("%s is the primary, the test needs %s", old.Name, s.lab.Sites[0].Name)
	}
	jobs := s.lab.StartJobs(lab.JobLoad{Clients: 2, Durabilities: []string{"node"}, Sites: []*lab.Site{old}, Every: 50 * time.Millisecond})
	s.lab.WaitFor(within(15*time.Second), "some jobs, and a lossless plan", func(ctx context.Context) error {
		check, err := lossless(ctx, s.lab.Sites[1].Nodes[0], s.lab.Sites[1].Name)
		if err != nil || !check.OK || jobs.Count() < 20 {
			return fmt.Errorf("%d jobs, %+v, %w", jobs.Count(), check, err)
		}
		return nil
	})
	for _, d := range disks {
		d.Hang()
	}
	s.audit.Unhealthy()
	before := jobs.Count()
	s.lab.WaitFor(within(10*time.Second), "jobs that only the primary has", func(context.Context) error {
		if n := jobs.Count() - before; n < 20 {
			return fmt.Errorf("%d jobs", n)
		}
		return nil
	})
	lost := time.Now()
	old.Nodes[0].Kill()
	s.audit.Unreachable(old, false)
	ledger := jobs.Stop()
	old.Nodes[0].WipeDisk()
	s.awaitChange(lost, epoch+1, within(replaces), s.others(old))
	for _, d := range disks {
		d.Resume()
	}
	var f *admin.Failover
	s.lab.WaitFor(within(5*time.Second), "the record of the failover", func(ctx context.Context) error {
		status, err := s.others(old)[0].Status(ctx)
		if err != nil {
			return err
		}
		f = status.LastFailover
		return nil
	})
	missing, oldest := s.missing(ledger, s.others(old))
	if missing == 0 {
		t.Error("no job is lost, so the test shows nothing")
	}
	if f == nil || f.Epoch != epoch+1 || f.RecordsAtRisk == nil || f.RPOSeconds == nil {
		t.Fatalf("no figures in %+v", f)
	}
	window := lost.Sub(oldest).Seconds()
	t.Logf("%d jobs of the last %.2f s before the loss are lost; the failover says %d records of %.2f s", missing, window, *f.RecordsAtRisk, *f.RPOSeconds)
	if *f.RecordsAtRisk < int64(missing) || *f.RPOSeconds < window {
		t.Errorf("the failover says less than was lost: %d records of %.2f s", *f.RecordsAtRisk, *f.RPOSeconds)
	}
	if *f.RPOSeconds > window+5 {
		t.Errorf("the failover says %.2f s", *f.RPOSeconds)
	}
	s.end(old)
}

// missing counts the acknowledged jobs that no node has, and returns when the oldest of them
// was acknowledged.
func (s *scenario) missing(ledger []lab.Job, nodes []*lab.Node) (lost int, oldest time.Time) {
	s.t.Helper()
	for _, j := range ledger {
		if j.Acknowledged.IsZero() {
			continue
		}
		found := false
		for _, n := range nodes {
			s.lab.WaitFor(within(returns), n.Name+" to say whether it has a job", func(ctx context.Context) error {
				_, err := n.Job(ctx, j.ID)
				found = found || err == nil
				if err != nil && !errors.Is(err, lab.ErrNoSuchJob) {
					return err
				}
				return nil
			})
		}
		if !found {
			if lost++; oldest.IsZero() || j.Acknowledged.Before(oldest) {
				oldest = j.Acknowledged
			}
		}
	}
	return lost, oldest
}
