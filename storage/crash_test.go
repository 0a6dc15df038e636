package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/test/crash"
	"github.com/dsnode/dsnode/test/skip"
)

func TestMain(m *testing.M) { crash.Main(m, child) }

// child works on the stores like raft, until something fails. It prints:
//
//	stored LAST TERM     entries up to LAST are acknowledged
//	term T               the term is acknowledged
//	compacting MAX       entries up to MAX may be missing from now on
//	cutting MIN          entries from MIN may be missing from now on
//	cut MIN TERM         they are removed; the next ones have TERM
//	snapshot INDEX       a snapshot is acknowledged
//	no snapshot: ERR     the snapshot failed; the log continues
//	failed: ERR          the store failed; exit code 3
func child(dir string) int {
	// strace counts the calls of each thread separately.
	runtime.LockOSThread()
	say := crash.Say
	t := &testing.B{} // for the helpers' signatures; no helper fails here
	metrics := NewMetrics(prometheus.NewRegistry())
	o := Options{Dir: dir, Sealer: testSealer(t, 1), Logger: slog.New(slog.DiscardHandler), Metrics: metrics}
	s, err := OpenRaftStore(o)
	if err != nil {
		say("open failed: %v", err)
		return 4
	}
	snaps, err := OpenSnapshotStore(o)
	if err != nil {
		say("open failed: %v", err)
		return 4
	}
	say("open")
	if err := work(s, snaps, say); err != nil {
		// From here on nothing may be acknowledged, and Failed must be closed.
		select {
		case <-s.Failed():
		default:
			say("not failed: %v", err)
			return 5
		}
		last := s.now.last
		for i := range uint64(20) {
			for _, err := range []error{
				s.StoreLog(entry(last+1+i, 1)), s.SetUint64([]byte("CurrentTerm"), 1<<40),
				s.DeleteRange(0, last), s.GetLog(last, new(raft.Log)),
			} {
				if !errors.Is(err, ErrFailed) {
					say("acknowledged after the failure: %v", err)
					return 5
				}
			}
		}
		say("failed: %v", err)
		_ = s.Close() // must not hang; its error does not matter
		return 3
	}
	return 0
}

func work(s *RaftStore, snaps *SnapshotStore, say func(string, ...any)) error {
	term, err := s.GetUint64([]byte("CurrentTerm"))
	if err != nil {
		return err
	}
	for {
		switch first, last := s.now.first, s.now.last; {
		case last > 1_000_000:
			return errors.New("nothing has ended this process in a million entries")
		case rand.IntN(20) == 0:
			term++
			if err := s.SetUint64([]byte("CurrentTerm"), term); err != nil {
				return err
			}
			say("term %d", term)
		case rand.IntN(100) == 0 && last > first+100:
			to := last - 50
			if err := snapshot(snaps, to, term); err != nil {
				// Raft continues without a snapshot, and so does this until the log fails too.
				say("no snapshot: %v", err)
				continue
			}
			say("snapshot %d", to)
			say("compacting %d", to)
			if err := s.DeleteRange(first, to); err != nil {
				return err
			}
		case rand.IntN(30) == 0 && last > first+10:
			from := last - rand.Uint64N(10)
			say("cutting %d", from)
			if err := s.DeleteRange(from, last); err != nil {
				return err
			}
			say("cut %d", from)
		default:
			n := uint64(1)
			if rand.IntN(3) == 0 {
				n = 1 + rand.Uint64N(64)
			}
			if err := s.StoreLogs(entriesFrom(last+1, last+n, term)); err != nil {
				return err
			}
			say("stored %d %d", last+n, term)
		}
	}
}

func snapshot(snaps *SnapshotStore, index, term uint64) error {
	sink, err := snaps.Create(1, index, term, threeVoters, 1, nil)
	if err != nil {
		return err
	}
	if _, err := sink.Write(bytes.Repeat([]byte("state"), 1000)); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// promises is what the child processes have acknowledged, over all restarts.
type promises struct {
	first, last uint64            // entries that must be there
	terms       map[uint64]uint64 // term of each entry from first to last
	doubtful    uint64            // entries from here on may be missing; 0 for none
	term        uint64
	snapshot    uint64
	acks        int
}

func (p *promises) hear(line string) error {
	word, rest, _ := strings.Cut(line, " ")
	var a, b uint64
	var err error
	fields := strings.Fields(rest)
	if len(fields) > 0 && word != "failed:" && word != "no" {
		a, err = strconv.ParseUint(fields[0], 10, 64)
	}
	if len(fields) > 1 && word == "stored" && err == nil {
		b, err = strconv.ParseUint(fields[1], 10, 64)
	}
	if err != nil {
		return fmt.Errorf("child said %q: %w", line, err)
	}
	p.acks++
	switch word {
	case "open", "failed:", "no":
	case "stored":
		for i := p.last + 1; i <= a; i++ {
			p.terms[i] = b
		}
		p.last = a
		if p.first == 0 {
			p.first = 1
		}
	case "term":
		p.term = a
	case "snapshot":
		p.snapshot = a
	case "compacting":
		p.first = a + 1
	case "cutting":
		p.doubtful = a
	case "cut":
		p.last, p.doubtful = a-1, 0
	default:
		return fmt.Errorf("child said %q", line)
	}
	return nil
}

// check opens the stores of a dead child, compares them with its promises, and takes
// their content as the new promises: what was not acknowledged may exist or not, and
// then stays so.
func (p *promises) check(t *testing.T, dir string) {
	t.Helper()
	s, err := OpenRaftStore(storeOptions(t, dir))
	if err != nil {
		t.Fatalf("after %d promises: %v", p.acks, err)
	}
	defer closeRaft(t, s)
	must := p.last
	if p.doubtful != 0 {
		must = p.doubtful - 1
	}
	got := *s.entries.Load()
	if got.last < must || must > 0 && must >= p.first && got.first > p.first {
		t.Fatalf("the store has entries %d to %d, %d to %d were acknowledged", got.first, got.last, p.first, must)
	}
	for i := got.first; i <= got.last && got.last > 0; i++ {
		var l raft.Log
		if err := s.GetLog(i, &l); err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		if !sameEntry(&l, entry(i, l.Term)) {
			t.Fatalf("entry %d has different content", i)
		}
		if want, ok := p.terms[i]; ok && i <= must && l.Term != want {
			t.Fatalf("entry %d is of term %d, %d was acknowledged", i, l.Term, want)
		}
		p.terms[i] = l.Term
	}
	term, err := s.GetUint64([]byte("CurrentTerm"))
	if err != nil || term < p.term || term > p.term+1 {
		t.Fatalf("term %d, %d was acknowledged: %v", term, p.term, err)
	}
	snaps := openSnapshots(t, dir)
	if p.snapshot > 0 {
		if l := listed(t, snaps); len(l) == 0 || l[0] < p.snapshot {
			t.Fatalf("snapshots %v, %d was acknowledged", l, p.snapshot)
		}
	}
	if err := CheckTogether(s, snaps); err != nil {
		t.Fatal(err)
	}
	p.first, p.last, p.doubtful, p.term = got.first, got.last, 0, term
}

// A process is killed a hundred times at random moments. Each time everything that it
// acknowledged is there.
func TestNothingAcknowledgedIsLostWhenKilled(t *testing.T) {
	rounds := 40
	switch {
	case os.Getenv("DSNODE_TEST_FULL") != "":
		rounds = 400
	case testing.Short():
		rounds = 15
	}
	dir := t.TempDir()
	p := promises{terms: map[uint64]uint64{}}
	for range rounds {
		crash.Kill(t, dir, 150, p.hear)
		p.check(t, dir)
	}
	t.Logf("%d kills, %d promises kept", rounds, p.acks)
	if p.acks < 10*rounds {
		t.Fatalf("only %d acknowledgements in %d runs: the test does too little", p.acks, rounds)
	}
}

// The n-th and all later syncs or writes fail: the store reports it and acknowledges
// nothing afterwards. After a restart everything acknowledged is there.
func TestNothingAcknowledgedIsLostWhenTheDiskFails(t *testing.T) {
	strace, err := exec.LookPath("strace")
	skip.Unless(t, err == nil, "strace is not installed; it injects the faults")
	probe := exec.Command(strace, "-f", "-e", "trace=none", "true")
	out, err := probe.CombinedOutput()
	skip.Unless(t, err == nil, fmt.Sprintf("strace may not trace here: %v %s", err, out))

	many := []int{1, 2, 3, 5, 8, 13, 21, 34, 55, 56, 57, 58, 89}
	tests := []struct {
		calls, error string
		when         []int
	}{
		{"fdatasync,fsync", "EIO", many},
		{"pwrite64", "EIO", many},
		{"pwrite64", "ENOSPC", many},
		{"ftruncate", "ENOSPC", []int{1, 2, 3, 1, 2, 3}}, // the file grows
	}
	for _, tt := range tests {
		t.Run(tt.calls+" "+tt.error, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			p := promises{terms: map[uint64]uint64{}}
			failed := 0
			for _, when := range tt.when {
				inject := fmt.Sprintf("inject=%s:error=%s:when=%d+", tt.calls, tt.error, when)
				cmd := crash.Command(dir, strace, "-f", "-qq", "-o", "/dev/null", "-e", "trace="+tt.calls, "-e", inject)
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				deadline := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
				text, err := io.ReadAll(out)
				if err != nil {
					t.Fatal(err)
				}
				err = cmd.Wait()
				deadline.Stop()
				var exit *exec.ExitError
				if !errors.As(err, &exit) {
					t.Fatalf("call %d failed, but the store did not: %v\n%s%s", when, err, text, stderr.String())
				}
				switch code := exit.ExitCode(); code {
				case 3:
					failed++
				case 4: // it failed while opening, before any acknowledgement
				default:
					t.Fatalf("exit code %d\n%s%s", code, text, stderr.String())
				}
				for line := range strings.Lines(string(text)) {
					if strings.HasPrefix(line, "open failed:") {
						continue
					}
					if err := p.hear(strings.TrimSpace(line)); err != nil {
						t.Fatal(err)
					}
				}
				p.check(t, dir)
			}
			t.Logf("%d promises kept, %d failures while working", p.acks, failed)
			if failed < 2 || p.acks < 20 {
				t.Fatalf("%d failures, %d acknowledgements: the test does too little", failed, p.acks)
			}
		})
	}
}

// A full file system has the same effect as a failing one.
func TestNothingAcknowledgedIsLostWhenTheDiskIsFull(t *testing.T) {
	dir, resize := crash.SmallDisk(t, "1m")
	data := filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := OpenRaftStore(storeOptions(t, data))
	if err != nil {
		t.Fatal(err)
	}
	var stored uint64
	for err == nil {
		if err = s.StoreLogs(entriesFrom(stored+1, stored+32, 1)); err == nil {
			stored += 32
		}
	}
	if !errors.Is(err, ErrFailed) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("a full disk: %v", err)
	}
	<-s.Failed()
	if err := s.StoreLog(entry(stored+1, 1)); !errors.Is(err, ErrFailed) {
		t.Fatalf("storing after the failure: %v", err)
	}
	closeRaft(t, s)

	// Opening must rewrite the file. Without space it fails and leaves the file unchanged.
	if _, err := OpenRaftStore(storeOptions(t, data)); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("open on a full disk: %v", err)
	}
	resize("8m")
	s = openRaft(t, data)
	if last, err := s.LastIndex(); last < stored || err != nil {
		t.Fatalf("entries up to %d, %d were acknowledged: %v", last, stored, err)
	}
	for i := uint64(1); i <= stored; i++ {
		var l raft.Log
		if err := s.GetLog(i, &l); err != nil || !sameEntry(&l, entry(i, 1)) {
			t.Fatalf("entry %d: %v", i, err)
		}
	}
	mustStore(t, s, entry(s.now.last+1, 1))
	closeRaft(t, s)
}
