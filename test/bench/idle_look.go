//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// idleLook is what a node has used up to one moment, and its sizes at that moment.
type idleLook struct {
	at                               time.Time
	user, system                     time.Duration
	switches                         int64
	anonymous, heap, table, journals int64 // bytes
	goroutines                       int64
}

// measure looks twice and prints what each node used between the looks.
func (b *idle) measure(ctx context.Context, w io.Writer) error {
	var before []idleLook
	for _, n := range b.nodes {
		l, err := b.look(ctx, n)
		if err != nil {
			return err
		}
		before = append(before, l)
	}
	machine, err := b.sandbox.busy()
	if err != nil {
		return err
	}
	if err := pause(ctx, b.length); err != nil {
		return err
	}
	end, err := b.sandbox.busy()
	if err != nil {
		return err
	}
	p := &printer{w: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	p.f("node\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", "CPU", "user", "system", "switches/s", "anonymous", "heap", "goroutines", "job table", "journals")
	worst, most := 0.0, int64(0)
	for i, n := range b.nodes {
		l, err := b.look(ctx, n)
		if err != nil {
			return err
		}
		took := l.at.Sub(before[i].at).Seconds()
		user, system := (l.user-before[i].user).Seconds()/took, (l.system-before[i].system).Seconds()/took
		worst, most = max(worst, user+system), max(most, l.anonymous)
		p.f("%s\t%.2f%%\t%.2f%%\t%.2f%%\t%.0f\t%.1f MiB\t%.1f MiB\t%d\t%.1f MiB\t%.1f MiB\n", n.name, 100*(user+system), 100*user, 100*system,
			float64(l.switches-before[i].switches)/took, mib(l.anonymous), mib(l.heap), l.goroutines, mib(l.table), mib(l.journals))
	}
	p.f("target: %.0f%% of a core, %s; %d MiB of anonymous memory, %s; other processes used %.2f CPUs\n", 100*idleCPU, word(worst < idleCPU),
		idleMemory>>20, word(most <= idleMemory), elsewhere(machine, end))
	if p.err == nil {
		p.err = p.w.Flush()
	}
	return p.err
}

// look reads a node's figures from /proc, its metrics and its files.
func (b *idle) look(ctx context.Context, n *idleNode) (l idleLook, err error) {
	metrics, err := fetch(ctx, "http://"+n.addr+"/metrics")
	if err != nil {
		return l, fmt.Errorf("look at %s: %w", n.name, err)
	}
	if l.heap, err = number(metrics, "go_memstats_heap_alloc_bytes "); err != nil {
		return l, err
	}
	if l.goroutines, err = number(metrics, "go_goroutines "); err != nil {
		return l, err
	}
	data := filepath.Join(b.dir, n.name, "data")
	if l.table, err = bytesUnder(filepath.Join(data, "jobs")); err != nil {
		return l, err
	}
	if l.journals, err = bytesUnder(filepath.Join(data, "journal")); err != nil {
		return l, err
	}
	if l.anonymous, err = field(fmt.Sprintf("/proc/%d/status", n.pid), "RssAnon:"); err != nil {
		return l, err
	}
	l.anonymous <<= 10
	if l.switches, err = switches(n.pid); err != nil {
		return l, err
	}
	l.user, l.system, err = userAndSystem(n.pid)
	l.at = time.Now()
	return l, err
}

func (b *idle) writeProfiles(ctx context.Context) error {
	if b.profile == "" {
		return nil
	}
	var all sync.WaitGroup
	failed := make([]error, len(b.nodes))
	for i, n := range b.nodes {
		all.Go(func() {
			for kind, query := range map[string]string{"profile": fmt.Sprintf("?seconds=%.0f", b.length.Seconds()), "heap": "?gc=1"} {
				text, err := fetch(ctx, "http://"+n.addr+"/debug/pprof/"+kind+query)
				if err == nil {
					err = os.WriteFile(fmt.Sprintf("%s.%s.%s.pb.gz", b.profile, n.name, kind), []byte(text), 0o600)
				}
				failed[i] = errors.Join(failed[i], err)
			}
		})
	}
	all.Wait()
	return errors.Join(failed...)
}

// userAndSystem returns the two parts of a process's CPU time.
func userAndSystem(pid int) (user, system time.Duration, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("read the CPU time: %w", err)
	}
	// The second field is the name in parentheses, which may contain any character.
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0, 0, fmt.Errorf("read the CPU time: /proc/%d/stat has %d fields", pid, len(fields))
	}
	var ticks [2]int64
	for i, f := range fields[11:13] {
		if ticks[i], err = strconv.ParseInt(f, 10, 64); err != nil {
			return 0, 0, fmt.Errorf("read the CPU time: %w", err)
		}
	}
	return time.Duration(ticks[0]) * tick, time.Duration(ticks[1]) * tick, nil
}

// switches returns the number of context switches of a process's threads, nearly all
// of which are voluntary. Those of threads that have ended are not counted.
func switches(pid int) (int64, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return 0, fmt.Errorf("count the switches: %w", err)
	}
	sum := int64(0)
	for _, t := range tasks {
		for _, name := range []string{"voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"} {
			n, err := field(t, name)
			if errors.Is(err, fs.ErrNotExist) {
				continue // the thread has ended
			}
			if err != nil {
				return 0, fmt.Errorf("count the switches: %w", err)
			}
			sum += n
		}
	}
	return sum, nil
}

// bytesUnder returns the size of all files below a directory.
func bytesUnder(dir string) (int64, error) {
	sum := int64(0)
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err == nil {
			sum += info.Size()
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("measure %s: %w", dir, err)
	}
	return sum, nil
}
