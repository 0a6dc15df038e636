package journal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dsnode/dsnode/test/crash"
)

// full reports whether a test may take minutes.
func full() bool { return os.Getenv("DSNODE_TEST_FULL") != "" }

func TestMain(m *testing.M) { crash.Main(m, child) }

// copied is a stream of another node, all of whose records are known.
var copied = streamOf(9)

func copiedRecord(seq uint64) Record {
	r := Record{Stream: copied, Seq: seq, Clock: Clock(seq), Kind: CancelAsked, Format: knownFormat}
	binary.BigEndian.PutUint64(r.Job[:], seq)
	r.Payload = make([]byte, seq%700)
	return r
}

// child appends and copies as fast as it can until it is killed. It prints:
//
//	acked STREAM SEQ JOB   an append has returned
//	copied SEQ             a copy is durable up to SEQ
//	trimming STREAM SEQ    records below SEQ may be missing
func child(dir string) int {
	say := crash.Say
	o := testOptions(dir)
	o.SegmentBytes = 64 << 10
	l, err := Open(o)
	if err != nil {
		say("open failed: %v", err)
		return 4
	}
	id := Stream{Origin: "self"}
	binary.BigEndian.PutUint64(id.Incarnation[:], rand.Uint64())
	if err := l.Create(context.Background(), id); err != nil {
		say("create failed: %v", err)
		return 4
	}
	say("open")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				var r Record
				r.Kind, r.Payload = Deleted, make([]byte, rand.IntN(2000))
				binary.BigEndian.PutUint64(r.Job[:], rand.Uint64())
				last, err := l.Append(context.Background(), id, []Record{r})
				if err != nil {
					say("append failed: %v", err)
					return
				}
				say("acked %s %d %s", id, last, r.Job)
				if rand.IntN(300) == 0 && last > 200 {
					say("trimming %s %d", id, last-200)
					if err := l.Trim(id, last-200); err != nil {
						say("trim failed: %v", err)
					}
				}
			}
		})
	}
	wg.Go(func() {
		for {
			e, _ := l.End(copied)
			var frames []byte
			for i := range 1 + rand.Uint64N(20) {
				r := copiedRecord(e.Durable + 1 + i)
				frames, err = AppendFrame(frames, &r)
				if err != nil {
					say("frame: %v", err)
					return
				}
			}
			durable, err := l.Receive(context.Background(), copied, frames)
			if err != nil {
				say("receive failed: %v", err)
				return
			}
			say("copied %d", durable)
		}
	})
	wg.Wait()
	return 3
}

// promises is what the child processes have acknowledged, over all restarts.
type promises struct {
	acked   map[string]map[uint64]string // by stream and seq: the job
	trimmed map[string]uint64
	copied  uint64
	count   int
}

func (p *promises) hear(line string) error {
	var stream, job string
	var seq uint64
	word, rest, _ := strings.Cut(line, " ")
	var err error
	switch word {
	case "open":
	case "acked":
		_, err = fmt.Sscanf(rest, "%s %d %s", &stream, &seq, &job)
		if p.acked[stream] == nil {
			p.acked[stream] = map[uint64]string{}
		}
		if was := p.acked[stream][seq]; was != "" {
			err = fmt.Errorf("%s %d was also used for %s", stream, seq, was)
		}
		p.acked[stream][seq] = job
		p.count++
	case "copied":
		_, err = fmt.Sscanf(rest, "%d", &p.copied)
		p.count++
	case "trimming":
		_, err = fmt.Sscanf(rest, "%s %d", &stream, &seq)
		p.trimmed[stream] = max(p.trimmed[stream], seq)
	default:
		err = errors.New("unexpected")
	}
	if err != nil {
		return fmt.Errorf("child said %q: %w", line, err)
	}
	return nil
}

// check opens the journal of a dead child and compares it with its promises.
func (p *promises) check(t *testing.T, dir string) {
	t.Helper()
	l := mustOpen(t, testOptions(dir))
	defer mustClose(t, l)
	ends := l.Ends()
	for id, e := range ends {
		if e.Damaged != 0 {
			t.Fatalf("%s was found damaged: %+v", id, e)
		}
		acked, held := p.acked[id.String()], map[uint64]string{}
		if e.First > max(p.trimmed[id.String()], 1) {
			t.Fatalf("%s begins with %d, but was trimmed to %d", id, e.First, p.trimmed[id.String()])
		}
		if err := l.Replay(id, e.First, func(records []Record) error {
			for _, r := range records {
				held[r.Seq] = r.Job.String()
				if id == copied && r.Job != copiedRecord(r.Seq).Job {
					return fmt.Errorf("record %d of the copy differs", r.Seq)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for seq, job := range acked {
			if seq >= e.First && held[seq] != job {
				t.Fatalf("%s %d is %q, %q was acknowledged; the stream ends with %d", id, seq, held[seq], job, e.Durable)
			}
		}
		delete(p.acked, id.String())
		if id != copied { // so that the journal stays small
			if err := l.Drop(id); err != nil {
				t.Fatal(err)
			}
		}
	}
	for id := range p.acked {
		t.Fatalf("%s is missing", id)
	}
	if ends[copied].Durable < p.copied {
		t.Fatalf("the copy ends with %d, but %d was durable", ends[copied].Durable, p.copied)
	}
}

// A process is killed at random moments. Everything that it acknowledged is there.
func TestNothingAcknowledgedIsLostWhenKilled(t *testing.T) {
	rounds := 15
	switch {
	case full():
		rounds = 500
	case testing.Short():
		rounds = 5
	}
	dir := t.TempDir()
	p := promises{acked: map[string]map[uint64]string{}, trimmed: map[string]uint64{}}
	for range rounds {
		crash.Kill(t, dir, 1500, p.hear)
		p.check(t, dir)
	}
	t.Logf("%d kills, %d promises kept", rounds, p.count)
	if p.count < 100*rounds {
		t.Fatalf("only %d acknowledgements in %d runs: the test does too little", p.count, rounds)
	}
}

// On a full disk without a floor an append is refused, and a later one succeeds when there is room.
func TestNothingAcknowledgedIsLostWhenTheDiskIsFull(t *testing.T) {
	dir, resize := crash.SmallDisk(t, "1m")
	o := testOptions(dir)
	l := mustOpen(t, o)
	id := streamOf(1)
	mustCreate(t, l, id)
	payload := string(make([]byte, 5000))
	var acked uint64
	var err error
	for err == nil {
		if _, err = l.Append(context.Background(), id, []Record{started(1, payload)}); err == nil {
			acked++
		}
	}
	if !errors.Is(err, ErrFull) || !errors.Is(err, unix.ENOSPC) || l.Err() != nil {
		t.Fatalf("a full disk: %v, the journal: %v", err, l.Err())
	}
	if _, err := l.Append(context.Background(), id, []Record{started(1, payload)}); !errors.Is(err, ErrFull) {
		t.Fatalf("append on a full disk: %v", err)
	}
	if got := recordsOf(t, l, id, 1); len(got) != int(acked) {
		t.Fatalf("%d records of %d can be read on a full disk", len(got), acked)
	}
	resize("8m")
	if _, err := l.Append(context.Background(), id, []Record{started(1, "x")}); err != nil {
		t.Fatalf("append when there is room again: %v", err)
	}
	acked++
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = mustOpen(t, o)
	defer mustClose(t, l) // before the file system is unmounted
	if e, _ := l.End(id); e.Durable != acked || e.Damaged != 0 {
		t.Fatalf("%+v, %d records were acknowledged", e, acked)
	}
	if got := recordsOf(t, l, id, 1); len(got) != int(acked) {
		t.Fatalf("%d records of %d", len(got), acked)
	}
}

// With a floor the log does not fail: submissions are refused early, running jobs can
// finish, and submissions are accepted again when there is space.
func TestFloorRefusesInTimeAndRecovers(t *testing.T) {
	o, d := testOptions(t.TempDir()), newFaultDisk()
	o.FreeFloor = 4 << 20
	l, err := open(o, d)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, l)
	id := streamOf(1)
	mustCreate(t, l, id)
	submit := func() error {
		r := started(1, "")
		r.Kind = Submitted
		_, err := l.Append(context.Background(), id, []Record{r})
		return err
	}
	finish := func() error {
		_, err := l.Append(context.Background(), id, []Record{started(1, "")})
		return err
	}
	copying := func() error {
		e, _ := l.End(copied)
		r := copiedRecord(e.Durable + 1)
		frame, err := AppendFrame(nil, &r)
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.Receive(context.Background(), copied, frame)
		return err
	}
	room := func(free int64) {
		d.mu.Lock()
		d.room = free
		d.mu.Unlock()
		l.space.mu.Lock()
		l.space.checked = time.Time{}
		l.space.mu.Unlock()
	}
	for _, tt := range []struct {
		free                    int64
		submit, copying, finish bool
	}{
		{5 << 20, true, true, true},
		{3 << 20, false, true, true},
		{3 << 19, false, false, true},
		{1 << 19, false, false, false},
		{5 << 20, true, true, true},
	} {
		room(tt.free)
		if free, floor, known := l.Space(); !known || free != tt.free || floor != o.FreeFloor {
			t.Errorf("space: %d bytes free, the floor is %d, known %v; want %d and %d", free, floor, known, tt.free, o.FreeFloor)
		}
		for name, got := range map[string]struct {
			err error
			ok  bool
		}{"submit": {submit(), tt.submit}, "copy": {copying(), tt.copying}, "finish": {finish(), tt.finish}} {
			if (got.err == nil) != got.ok || got.err != nil && !errors.Is(got.err, ErrFull) {
				t.Errorf("%s with %d bytes free: %v", name, tt.free, got.err)
			}
		}
	}
	if err := l.Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(o.Dir, watermarksFile)); err != nil {
		t.Fatal(err)
	}
}
