package replication

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dsnode/dsnode/storage/atomicfile"
	"github.com/dsnode/dsnode/storage/journal"
)

// What was durable once was so for good, whoever looks: a client that was shown
// a result must not be shown its absence after a restart, when nobody has told
// yet what he holds, nor after somebody lost a disk. So what is shown as durable
// is what is noted on this node's disk, a moment after it came true.

// reachedEvery is the least time between two notes, and a note shall take no more
// than a tenth of all time, as long as reachedAtLatest allows that: its syncs, of
// a new file and its directory, hold up those of the journals.
const (
	reachedEvery    = 50 * time.Millisecond
	reachedAtLatest = 500 * time.Millisecond
)

const reachedFormat = 1

// reachedFile is the note, relative to Options.Dir.
const reachedFile = "durable.json"

type depths [len(levels)]uint64 // up to which seq, by level

// reachedNote is what is durable, as noted.
type reachedNote struct {
	path string

	mu    sync.Mutex // guards noted
	noted map[journal.Stream]depths
}

type reachedText struct {
	Format  int               `json:"format"`
	Streams map[string]depths `json:"streams"`
	Sum     uint32            `json:"sum"` // crc32c of the above with sum 0
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (t reachedText) encode() ([]byte, error) {
	t.Sum = 0
	b, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	t.Sum = crc32.Checksum(b, castagnoli)
	return json.Marshal(t)
}

// openReached reads the note; a damaged one is begun anew, which can only show
// less than there is.
func openReached(dir string) (n *reachedNote, damaged error, err error) {
	n = &reachedNote{path: filepath.Join(dir, reachedFile), noted: map[journal.Stream]depths{}}
	b, err := os.ReadFile(n.path)
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read how durable jobs are: %w", err)
	}
	noted, damaged := decodeReached(b)
	if damaged == nil {
		n.noted = noted
	}
	return n, damaged, nil
}

func decodeReached(b []byte) (map[journal.Stream]depths, error) {
	var t reachedText
	if err := json.Unmarshal(b, &t); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", reachedFile, err)
	}
	if again, err := t.encode(); err != nil || string(again) != strings.TrimSpace(string(b)) || t.Format != reachedFormat {
		return nil, fmt.Errorf("%s is damaged, or of another version", reachedFile)
	}
	noted := make(map[journal.Stream]depths, len(t.Streams))
	for name, d := range t.Streams {
		at := strings.LastIndexByte(name, '/')
		if at <= 0 {
			return nil, fmt.Errorf("%s names no stream: %q", reachedFile, name)
		}
		i, err := journal.ParseIncarnation(name[at+1:])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", reachedFile, err)
		}
		noted[journal.Stream{Origin: name[:at], Incarnation: i}] = d
	}
	return noted, nil
}

// best is the strongest level that a record is noted to have.
func (n *reachedNote) best(s journal.Stream, seq uint64) journal.Durability {
	n.mu.Lock()
	d := n.noted[s]
	n.mu.Unlock()
	best := journal.Durability("")
	for i, through := range d {
		if through >= seq {
			best = levels[i]
		}
	}
	return best
}

// note writes what is new down, and then shows it. Streams that are not held any
// more are forgotten.
func (n *reachedNote) note(now map[journal.Stream]depths) error {
	n.mu.Lock()
	next := make(map[journal.Stream]depths, len(now))
	for s, d := range now {
		old := n.noted[s]
		for i := range d {
			d[i] = max(d[i], old[i])
		}
		next[s] = d
	}
	// That a record is on this node's own disk needs no note: the journal is there
	// to be asked. Without other nodes, submissions then cause no more syncs here.
	same := maps.EqualFunc(next, n.noted, func(a, b depths) bool { return slices.Equal(a[1:], b[1:]) })
	if same {
		n.noted = next
	}
	n.mu.Unlock()
	if same {
		return nil
	}
	t := reachedText{Format: reachedFormat, Streams: make(map[string]depths, len(next))}
	for s, d := range next {
		t.Streams[s.String()] = d
	}
	b, err := t.encode()
	if err == nil {
		err = atomicfile.Replace(n.path, b)
	}
	if err != nil {
		return fmt.Errorf("note how durable jobs are: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.noted = next
	return nil
}

// keepReached notes what has become durable until ctx ends. A note that can't be
// written is an error: results would be shown no more.
func (r *Replication) keepReached(ctx context.Context) error {
	for {
		changed := r.ledger.watch()
		began := time.Now()
		if err := r.reached.note(r.depths()); err != nil {
			return err
		}
		if !pause(ctx, min(max(reachedEvery, 10*time.Since(began)), reachedAtLatest)) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// depths is how durable each stream is that this node holds.
func (r *Replication) depths() map[journal.Stream]depths {
	held := r.opts.Log.Ends()
	now := make(map[journal.Stream]depths, len(held))
	r.ledger.mu.Lock()
	defer r.ledger.mu.Unlock()
	for s := range held {
		now[s] = r.ledger.reached(s)
	}
	return now
}
