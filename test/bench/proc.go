//go:build linux

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// tick is the unit of times in /proc: 1/USER_HZ, which is 1/100 s on all machines that
// Go supports.
const tick = 10 * time.Millisecond

// processTree returns a process and its descendants.
func processTree(pid int) []int {
	all := []int{pid}
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return all // it has ended
	}
	for _, t := range tasks {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		if err != nil {
			continue // the thread has ended
		}
		for child := range strings.FieldsSeq(string(text)) {
			if id, err := strconv.Atoi(child); err == nil {
				all = append(all, processTree(id)...)
			}
		}
	}
	return all
}

// cpuTime returns the user and system time of a process and its descendants.
func cpuTime(pid int) (time.Duration, error) {
	var sum time.Duration
	for _, p := range processTree(pid) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		if err != nil {
			return 0, fmt.Errorf("read the CPU time: %w", err)
		}
		// The second field is the name in parentheses, which may contain any character.
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if len(fields) < 13 {
			return 0, fmt.Errorf("read the CPU time: /proc/%d/stat has %d fields", p, len(fields))
		}
		for _, f := range fields[11:13] {
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read the CPU time: %w", err)
			}
			sum += time.Duration(n) * tick
		}
	}
	return sum, nil
}

// anonymous returns the anonymous memory of a process and its descendants in bytes.
// Memory that several of them share is counted for each.
func anonymous(pid int) (int64, error) {
	var sum int64
	for _, p := range processTree(pid) {
		n, err := field(fmt.Sprintf("/proc/%d/smaps_rollup", p), "Anonymous:")
		if err != nil {
			return 0, fmt.Errorf("read the memory: %w", err)
		}
		sum += n << 10
	}
	return sum, nil
}

// field reads a line "Name: number …" of a file in /proc.
func field(file, name string) (int64, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), name); ok {
			if words := strings.Fields(rest); len(words) > 0 {
				return strconv.ParseInt(words[0], 10, 64)
			}
		}
	}
	return 0, fmt.Errorf("%s has no %s", file, name)
}

// sockets counts the open sockets of a process.
func sockets(pid int) (int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("count the sockets: %w", err)
	}
	n := 0
	for _, e := range entries {
		to, err := os.Readlink(dir + "/" + e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return 0, fmt.Errorf("count the sockets: %w", err)
		}
		if strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n, nil
}

// busy is the CPU time that the machine has spent, and the part of it that this
// process, its ended children and the processes of the sandbox have spent.
type busy struct {
	at        time.Time
	all, ours time.Duration
}

func (s *sandbox) busy() (busy, error) {
	b := busy{at: time.Now()}
	f, err := os.ReadFile("/proc/stat")
	if err != nil {
		return b, fmt.Errorf("read the machine's CPU time: %w", err)
	}
	line, _, _ := strings.Cut(string(f), "\n")
	for i, word := range strings.Fields(line) {
		// cpu user nice system idle iowait irq softirq steal guest guest_nice
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		n, err := strconv.ParseInt(word, 10, 64)
		if err != nil {
			return b, fmt.Errorf("read the machine's CPU time: %w", err)
		}
		b.all += time.Duration(n) * tick
	}
	b.ours += ownCPU()
	for _, p := range s.processes {
		if p.alive() != nil {
			continue
		}
		t, err := cpuTime(p.pid())
		if err != nil {
			return b, err
		}
		b.ours += t
	}
	return b, nil
}

// ownCPU returns the CPU time of this process and its ended children.
func ownCPU() (all time.Duration) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			panic(err) // only for a wrong argument
		}
		all += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return all
}

// elsewhere returns how many CPUs other processes kept busy between two times, or 0 when
// the times are too close to measure that.
func elsewhere(from, to busy) float64 {
	if to.at.Sub(from.at) < 20*tick {
		return 0
	}
	return max(0, ((to.all-from.all)-(to.ours-from.ours)).Seconds()/to.at.Sub(from.at).Seconds())
}

// machine describes the machine of the figures.
type machine struct {
	Time   time.Time `json:"time"`
	CPU    string    `json:"cpu"`
	CPUs   int       `json:"cpus"`
	Memory int64     `json:"memory_bytes"`
	Kernel string    `json:"kernel"`
	Go     string    `json:"go"`
	Load   string    `json:"load_average"` // 1, 5 and 15 minutes, at the start
}

func thisMachine() machine {
	m := machine{Time: time.Now(), CPUs: runtime.NumCPU(), Go: runtime.Version(), CPU: runtime.GOARCH, Load: loadAverage()}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := strings.Cut(string(text), "model name\t: "); ok {
			m.CPU, _, _ = strings.Cut(rest, "\n")
		}
	}
	if kb, err := field("/proc/meminfo", "MemTotal:"); err == nil {
		m.Memory = kb << 10
	}
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(text))
	}
	return m
}

func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	words := strings.Fields(string(text))
	return strings.Join(words[:min(3, len(words))], " ")
}
