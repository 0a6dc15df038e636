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

// A record that was shown as durable must stay so: a client that has seen a result must
// not find it missing after a restart, when no peer has reported its watermarks yet, or
// after a node has lost its disk. So records are shown as durable according to a note on
// this node's disk, which is written shortly after they have become durable.

// noteEvery is the minimum time between two writes of the note. Writing takes at most a
// tenth of the time, unless that would exceed noteAtLatest: the syncs of the new file and
// its directory delay those of the journals.
const (
	noteEvery    = 50 * time.Millisecond
	noteAtLatest = 500 * time.Millisecond
)

const noteFormat = 1

// noteFile is the file's name, relative to Options.Dir.
const noteFile = "durable.json"

type levelSeqs [len(levels)]uint64 // by durability: up to which seq a stream has it

// durableNote is the content of the note, in memory and on disk.
type durableNote struct {
	path string

	mu    sync.Mutex // guards noted
	noted map[journal.Stream]levelSeqs
}

type durableNoteFile struct {
	Format  int                  `json:"format"`
	Streams map[string]levelSeqs `json:"streams"`
	Sum     uint32               `json:"sum"` // crc32c of the JSON with sum 0
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (t durableNoteFile) encode() ([]byte, error) {
	t.Sum = 0
	b, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	t.Sum = crc32.Checksum(b, castagnoli)
	return json.Marshal(t)
}

// openDurableNote reads the note. A damaged note is discarded, after which records may be
// shown as less durable than they are.
func openDurableNote(dir string) (n *durableNote, damaged error, err error) {
	n = &durableNote{path: filepath.Join(dir, noteFile), noted: map[journal.Stream]levelSeqs{}}
	b, err := os.ReadFile(n.path)
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read how durable jobs are: %w", err)
	}
	noted, damaged := decodeDurableNote(b)
	if damaged == nil {
		n.noted = noted
	}
	return n, damaged, nil
}

func decodeDurableNote(b []byte) (map[journal.Stream]levelSeqs, error) {
	var t durableNoteFile
	if err := json.Unmarshal(b, &t); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", noteFile, err)
	}
	if again, err := t.encode(); err != nil || string(again) != strings.TrimSpace(string(b)) || t.Format != noteFormat {
		return nil, fmt.Errorf("%s is damaged, or of another version", noteFile)
	}
	noted := make(map[journal.Stream]levelSeqs, len(t.Streams))
	for name, d := range t.Streams {
		at := strings.LastIndexByte(name, '/')
		if at <= 0 {
			return nil, fmt.Errorf("%s names no stream: %q", noteFile, name)
		}
		i, err := journal.ParseIncarnation(name[at+1:])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", noteFile, err)
		}
		noted[journal.Stream{Origin: name[:at], Incarnation: i}] = d
	}
	return noted, nil
}

// best returns the strongest durability of a record according to the note.
func (n *durableNote) best(s journal.Stream, seq uint64) journal.Durability {
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

// update writes the note if it changed; only then best uses the new values. It removes
// streams that are no longer held.
func (n *durableNote) update(now map[journal.Stream]levelSeqs) error {
	n.mu.Lock()
	next := make(map[journal.Stream]levelSeqs, len(now))
	for s, d := range now {
		old := n.noted[s]
		for i := range d {
			d[i] = max(d[i], old[i])
		}
		next[s] = d
	}
	// Level 0 (on this node's own disk) is not compared: the journal knows it, and a node
	// without peers then needs no extra syncs for its submissions.
	same := maps.EqualFunc(next, n.noted, func(a, b levelSeqs) bool { return slices.Equal(a[1:], b[1:]) })
	if same {
		n.noted = next
	}
	n.mu.Unlock()
	if same {
		return nil
	}
	t := durableNoteFile{Format: noteFormat, Streams: make(map[string]levelSeqs, len(next))}
	for s, d := range next {
		t.Streams[s.String()] = d
	}
	b, err := t.encode()
	if err == nil {
		err = atomicfile.Replace(n.path, b)
	}
	if err != nil {
		return fmt.Errorf("write the note of durable records: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.noted = next
	return nil
}

// keepDurableNote updates the note until ctx ends. It returns an error when the note can't
// be written, because then results could no longer be shown.
func (r *Replication) keepDurableNote(ctx context.Context) error {
	for {
		changed := r.tracker.changed.Next()
		began := time.Now()
		if err := r.note.update(r.durableLevels()); err != nil {
			return err
		}
		if !pause(ctx, min(max(noteEvery, 10*time.Since(began)), noteAtLatest)) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// durableLevels returns the durability of each stream that this node holds.
func (r *Replication) durableLevels() map[journal.Stream]levelSeqs {
	held := r.opts.Log.Ends()
	now := make(map[journal.Stream]levelSeqs, len(held))
	r.tracker.mu.Lock()
	defer r.tracker.mu.Unlock()
	for s := range held {
		now[s] = r.tracker.durableTo(s)
	}
	return now
}
