package journal

import (
	"math/rand/v2"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// faultDisk is the real file system, which also tracks the bytes that would not survive
// a power failure, and whose calls can be made to fail.
type faultDisk struct {
	osDisk
	mu    sync.Mutex
	files map[string]*faultFileState
	// fail is called before each call: "open", "write", "sync", "rename", "remove", "syncdir".
	fail func(call, path string) error
	room int64 // free bytes; 0: those of the real disk
}

// faultFileState holds the parts of a file that are in the page cache only: written
// and not synced, or marked clean after a failed sync.
type faultFileState struct {
	dirty []span
	lost  []span
}

type span struct{ from, to int64 }

func newFaultDisk() *faultDisk { return &faultDisk{files: map[string]*faultFileState{}} }

func (d *faultDisk) may(call, path string) error {
	d.mu.Lock()
	fail := d.fail
	d.mu.Unlock()
	if fail == nil {
		return nil
	}
	return fail(call, path)
}

func (d *faultDisk) failing(fail func(call, path string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = fail
}

func (d *faultDisk) state(path string) *faultFileState {
	if d.files[path] == nil {
		d.files[path] = &faultFileState{}
	}
	return d.files[path]
}

func (d *faultDisk) open(path string, flags int) (file, error) {
	if err := d.may("open", path); err != nil {
		return nil, err
	}
	f, err := d.osDisk.open(path, flags)
	if err != nil {
		return nil, err
	}
	if flags&os.O_TRUNC != 0 {
		d.mu.Lock()
		delete(d.files, path)
		d.mu.Unlock()
	}
	return &faultFile{file: f, d: d, path: path}, nil
}

func (d *faultDisk) rename(from, to string) error {
	if err := d.may("rename", from); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for path, s := range d.files {
		if path == from || strings.HasPrefix(path, from+"/") {
			delete(d.files, path)
			d.files[to+path[len(from):]] = s
		}
	}
	return d.osDisk.rename(from, to)
}

func (d *faultDisk) remove(path string) error {
	if err := d.may("remove", path); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.files, path)
	return d.osDisk.remove(path)
}

func (d *faultDisk) syncDir(path string) error { return d.may("syncdir", path) }

func (d *faultDisk) free(path string) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.room != 0 {
		return d.room, nil
	}
	return d.osDisk.free(path)
}

type faultFile struct {
	file
	d    *faultDisk
	path string
}

func (f *faultFile) WriteAt(b []byte, at int64) (int, error) {
	err := f.d.may("write", f.path)
	n := len(b)
	if err != nil {
		n = rand.IntN(len(b) + 1) // a part of it may have been written
	}
	f.d.mu.Lock()
	s := f.d.state(f.path)
	s.dirty = append(s.dirty, span{at, at + int64(n)})
	s.lost = without(s.lost, span{at, at + int64(n)})
	f.d.mu.Unlock()
	if _, err := f.file.WriteAt(b[:n], at); err != nil {
		return 0, err
	}
	return n, err
}

func (f *faultFile) sync() error {
	err := f.d.may("sync", f.path)
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	s := f.d.state(f.path)
	if err != nil {
		s.lost = append(s.lost, s.dirty...) // the next sync succeeds without writing them
	}
	s.dirty = nil
	return err
}

func without(spans []span, cut span) []span {
	var rest []span
	for _, s := range spans {
		if s.from < min(s.to, cut.from) {
			rest = append(rest, span{s.from, min(s.to, cut.from)})
		}
		if s.to > max(s.from, cut.to) {
			rest = append(rest, span{max(s.from, cut.to), s.to})
		}
	}
	return rest
}

// losePower changes the files to what the disk may hold after a power failure: any
// subset of the unsynced sectors, and the file's length or a shorter one.
func (d *faultDisk) losePower(t fataler, rnd *rand.Rand) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	const sector = 512
	for path, s := range d.files {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		zero := func(from, to int64) {
			if _, err := f.WriteAt(make([]byte, to-from), from); err != nil {
				t.Fatal(err)
			}
		}
		for _, l := range s.lost {
			zero(l.from, l.to)
		}
		kind := rnd.IntN(4)
		for _, w := range s.dirty {
			switch kind {
			case 0: // all of it was written
			case 1:
				zero(w.from, w.to)
			case 2: // truncated
				info, err := f.Stat()
				if err != nil {
					t.Fatal(err)
				}
				if cut := w.from + rnd.Int64N(w.to-w.from+1); w.to == info.Size() {
					if err := f.Truncate(cut); err != nil {
						t.Fatal(err)
					}
				} else {
					zero(min(cut, w.to), w.to)
				}
			case 3:
				for at := w.from; at < w.to; {
					end := min(w.to, (at/sector+1)*sector)
					if rnd.IntN(2) == 0 {
						zero(at, end)
					}
					at = end
				}
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	d.files = map[string]*faultFileState{}
}

// fataler has the methods that testing.TB and rapid.T share.
type fataler interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// failAll makes every call of one kind fail.
func failAll(kind string, with unix.Errno) func(call, path string) error {
	return func(call, _ string) error {
		if call == kind {
			return with
		}
		return nil
	}
}
