package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// recover opens every stream of the directory.
func (l *Log) recover() error {
	if err := os.MkdirAll(l.o.Dir, 0o700); err != nil {
		return err
	}
	if err := l.disk.syncDir(filepath.Dir(l.o.Dir)); err != nil {
		return err
	}
	if err := l.openStore(); err != nil {
		return err
	}
	known, err := l.readCheckpoint()
	if err != nil {
		return err
	}
	marked, err := readWatermarks(l.o.Dir)
	if err != nil {
		return err
	}
	origins, err := os.ReadDir(l.o.Dir)
	if err != nil {
		return err
	}
	var dropped []string // directories of streams that a crash left half-deleted
	ended := map[Stream]bool{}
	for _, o := range origins {
		origin, ok := unescape(o.Name())
		if !o.IsDir() || !ok {
			continue
		}
		dir := filepath.Join(l.o.Dir, o.Name())
		incarnations, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, i := range incarnations {
			if name, found := strings.CutPrefix(i.Name(), droppedPrefix); found {
				dropped = append(dropped, filepath.Join(dir, i.Name()))
				if incarnation, err := ParseIncarnation(name); err == nil {
					ended[Stream{origin, incarnation}] = true
				}
				continue
			}
			incarnation, err := ParseIncarnation(i.Name())
			if !i.IsDir() || err != nil {
				continue
			}
			id := Stream{origin, incarnation}
			if err := l.recoverStream(id, filepath.Join(dir, i.Name()), known[id.String()], marked); err != nil {
				return err
			}
		}
	}
	// The checkpoint has no stream that was dropped, so the files of these were deleted.
	for name, c := range known {
		id, ok := parseStream(name)
		if _, found := l.streams[id]; !ok || found || ended[id] || c.Durable == 0 {
			continue
		}
		if err := l.recoverStream(id, l.dirOf(id), c, marked); err != nil {
			return err
		}
	}
	// Not earlier: until the new checkpoint is written, the old watermarks are needed.
	if err := l.writeCheckpoint(l.all()); err != nil {
		return err
	}
	for _, dir := range dropped { // not earlier: the old checkpoint may still have them
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	if l.watermarks, err = newWatermarks(l.disk, l.o.Dir); err != nil {
		return err
	}
	return nil
}

func (l *Log) recoverStream(id Stream, dir string, known checkpoint, marked map[Incarnation]watermark) error {
	s := &stream{id: id, dir: dir}
	r := recovery{l: l, s: s, checkpoint: known}
	r.checkpoint.Durable = max(r.checkpoint.Durable, marked[id.Incarnation].of(id))
	if err := r.run(); err != nil {
		return fmt.Errorf("stream %s: %w", id, err)
	}
	if len(s.segments) > 0 {
		l.streams[id] = s
		for _, g := range s.segments {
			l.clock.Observe(g.clock)
		}
	}
	return nil
}

// parseStream is the inverse of Stream.String.
func parseStream(name string) (Stream, bool) {
	at := strings.LastIndexByte(name, '/')
	if at <= 0 {
		return Stream{}, false
	}
	i, err := ParseIncarnation(name[at+1:])
	return Stream{name[:at], i}, err == nil
}

func unescape(name string) (string, bool) {
	var b []byte
	for i := 0; i < len(name); i++ {
		if name[i] != '%' {
			b = append(b, name[i])
			continue
		}
		var c byte
		if i+2 >= len(name) {
			return "", false
		}
		if _, err := fmt.Sscanf(name[i+1:i+3], "%02x", &c); err != nil {
			return "", false
		}
		b = append(b, c)
		i += 2
	}
	return string(b), escape(string(b)) == name && len(b) > 0 && len(b) <= MaxOrigin
}

// recovery reads one stream's files.
type recovery struct {
	l          *Log
	s          *stream
	checkpoint checkpoint // zero if there is none

	note  damageNote
	files []uint64 // first seqs of the existing segments
}

func (r *recovery) path(i int) string { return filepath.Join(r.s.dir, segmentName(r.files[i])) }

func (r *recovery) run() error {
	var err error
	if r.note, err = readDamage(r.s.dir); err != nil {
		return err
	}
	r.s.damaged = r.note.Through
	if err := r.list(); err != nil {
		return err
	}
	for i := range r.files {
		g, trouble, err := r.scan(i)
		if err != nil {
			return err
		}
		if trouble == nil {
			r.s.segments = append(r.s.segments, g)
			continue
		}
		torn := errors.Is(trouble, errTorn)
		switch {
		case torn && g == nil: // without a valid header: the segment was empty
			if err := r.l.disk.remove(r.path(i)); err != nil {
				return err
			}
		case torn:
			r.s.segments = append(r.s.segments, g)
			if err := r.truncateTorn(g); err != nil {
				return err
			}
		default:
			if err := r.truncateAtDamage(i, g, trouble); err != nil {
				return err
			}
		}
		break
	}
	if len(r.s.segments) == 0 {
		if r.s.damaged == 0 && r.checkpoint.Durable > 0 {
			if err := r.noteDeleted(); err != nil {
				return err
			}
		}
		if r.s.damaged == 0 {
			// A crash interrupted the creation of the stream; it never had a record.
			return os.RemoveAll(r.s.dir)
		}
		if err := r.emptySegment(max(r.note.From, 1)); err != nil {
			return err
		}
	}
	g := r.s.last()
	r.s.durable = g.last
	if err := r.rewriteEnd(g); err != nil {
		return fmt.Errorf("rewrite the end of %s: %w", g.path, err)
	}
	r.l.segments.Add(int64(len(r.s.segments)))
	for _, g := range r.s.segments {
		r.l.bytes.Add(g.size)
	}
	if r.s.damaged != 0 && r.s.durable >= r.s.damaged {
		return r.l.clearDamage(r.s)
	}
	return nil
}

// list finds the segments. It removes temporary files, and segments in front of one that
// restarts the stream.
func (r *recovery) list() error {
	entries, err := os.ReadDir(r.s.dir)
	if err != nil && !isNotExist(err) { // without it: all files of the stream were deleted
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := r.l.disk.remove(filepath.Join(r.s.dir, e.Name())); err != nil {
				return err
			}
		}
		if first, ok := parseSegmentName(e.Name()); ok {
			r.files = append(r.files, first)
		}
	}
	slices.Sort(r.files)
	for i := len(r.files) - 1; i > 0; i-- {
		flags, err := r.flags(i)
		if err != nil {
			return err
		}
		if flags&flagBegins == 0 {
			continue
		}
		for j := range i {
			if err := r.l.disk.remove(r.path(j)); err != nil {
				return err
			}
		}
		r.files = r.files[i:]
		break
	}
	return nil
}

// flags returns the flags of a segment's header, 0 if it can't be read.
func (r *recovery) flags(i int) (byte, error) {
	f, err := r.l.disk.open(r.path(i), os.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // only read from
	size, err := f.size()
	if err != nil {
		return 0, err
	}
	w := window{f: f, end: size}
	b, err := w.peek(maxHeader)
	if err != nil {
		return 0, nil // scan returns the error
	}
	_, _, flags, _, _ := parseHeader(b)
	return flags, nil
}

// errTorn means that a crash interrupted the last write; no record of it was acknowledged.
var errTorn = errors.New("the last write is incomplete")

// scan reads segment i. trouble is nil, errTorn, or wraps ErrDamaged. g ends in front of
// the trouble, and is nil when the header is not valid.
func (r *recovery) scan(i int) (g *segment, trouble, err error) {
	f, err := r.l.disk.open(r.path(i), os.O_RDONLY)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = f.Close() }() // only read from
	size, err := f.size()
	if err != nil {
		return nil, nil, err
	}
	first := r.files[i]
	head, err := r.header(f, size, first)
	if n := len(r.s.segments); err == nil && n > 0 && r.s.segments[n-1].last+1 != first {
		return nil, fmt.Errorf("%w: a segment begins with %d, the previous one ends with %d", ErrDamaged, first, r.s.segments[n-1].last), nil
	}
	if err == nil {
		g = &segment{path: r.path(i), first: first, last: first - 1, size: int64(head)}
		var at int64
		at, err = walk(f, r.s.id, int64(head), size, func(at int64, frame []byte, rec *Record) error {
			if rec.Seq != g.last+1 {
				return fmt.Errorf("%w: record %d after %d", ErrDamaged, rec.Seq, g.last)
			}
			g.add(rec, at)
			g.size = at + int64(len(frame))
			return nil
		})
		head = int(at)
	}
	last := i == len(r.files)-1
	switch {
	case errors.Is(err, ErrNewerFormat):
		return nil, nil, fmt.Errorf("%s: %w; a later version of dsnode wrote it: start that version", r.path(i), err)
	case g != nil && (err == nil && g.size == size || errors.Is(err, ErrDamaged) && zeros(f, int64(head), size)):
		if last && r.checkpoint.Durable > g.last {
			return g, fmt.Errorf("%w: it ends with %d, but %d was durable", ErrDamaged, g.last, r.checkpoint.Durable), nil
		}
		return g, nil, nil
	case err == nil: // a batch header without frames
		err = ErrShort
	case errors.Is(err, unix.EIO):
		return g, fmt.Errorf("%w: %w", ErrDamaged, err), nil
	case !errors.Is(err, ErrShort) && !errors.Is(err, ErrDamaged):
		return nil, nil, err
	}
	if !last {
		return g, fmt.Errorf("%w: %w", ErrDamaged, err), nil
	}
	end := first - 1
	if g != nil {
		end = g.last
	}
	if r.checkpoint.Durable > end {
		return g, fmt.Errorf("%w: %w; %d was durable", ErrDamaged, err, r.checkpoint.Durable), nil
	}
	mark, found, err2 := nextBatchHeader(f, r.s.id, int64(head)+1, size)
	if err2 != nil {
		return g, fmt.Errorf("%w: %w", ErrDamaged, err2), nil
	}
	if found {
		return g, fmt.Errorf("%w: %w; a later batch, at %d, is intact", ErrDamaged, err, mark), nil
	}
	return g, fmt.Errorf("%w: %w", errTorn, err), nil
}

// header checks a segment's header and returns its size, 0 with an error.
func (r *recovery) header(f file, end int64, first uint64) (size int, err error) {
	w := window{f: f, end: end}
	b, err := w.peek(maxHeader)
	if err != nil {
		return 0, err
	}
	id, named, _, size, err := parseHeader(b)
	if err != nil {
		return 0, err
	}
	if id != r.s.id || named != first {
		return 0, fmt.Errorf("%w: its header says segment %d of %s", ErrDamaged, named, id)
	}
	return size, nil
}

// zeros reports whether a part of a file has only zeros.
func zeros(f io.ReaderAt, at, end int64) bool {
	w := window{f: f, at: at, end: end}
	for w.at < end {
		b, err := w.peek(windowBytes)
		if err != nil || len(bytes.Trim(b, "\x00")) > 0 {
			return false
		}
		w.skip(len(b))
	}
	return true
}

// nextBatchHeader finds the next valid batch header from an offset on.
func nextBatchHeader(f io.ReaderAt, id Stream, at, end int64) (offset int64, found bool, err error) {
	magic := []byte{batchMagic >> 24, batchMagic >> 16 & 0xff, batchMagic >> 8 & 0xff, batchMagic & 0xff}
	w := window{f: f, at: at, end: end}
	for {
		b, err := w.peek(windowBytes)
		if err != nil || len(b) < batchHeaderSize {
			return 0, false, err
		}
		i := bytes.Index(b, magic)
		switch {
		case i < 0:
			w.skip(len(b) - len(magic) + 1)
			if w.at+batchHeaderSize > end {
				return 0, false, nil
			}
		case i > 0:
			w.skip(i)
		default:
			if checkBatchHeader(b, id, w.at) == nil {
				return w.at, true, nil
			}
			w.skip(1)
		}
	}
}

// truncateTorn removes the incomplete write at the end.
func (r *recovery) truncateTorn(g *segment) error {
	f, err := r.l.disk.open(g.path, os.O_RDWR)
	if err != nil {
		return err
	}
	size, err := f.size()
	if err == nil {
		err = f.Truncate(g.size)
	}
	if err == nil {
		err = f.sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	r.l.log.Info("removed an incomplete write from the end of a stream; a crash interrupted it, and no record of it was acknowledged",
		"stream", r.s.id.String(), "after", g.last, "bytes", size-g.size)
	return nil
}

// rewriteEnd rewrites the end of the last segment in place and syncs it. When a sync
// fails, the kernel marks the pages clean and never writes them again, but still shows
// them to readers. Only the last write of a stream can be affected.
func (r *recovery) rewriteEnd(g *segment) error {
	from := max(g.size-(MaxAppend+batchHeaderSize), 0)
	if r.checkpoint.Segment == g.first {
		if r.checkpoint.Size == g.size {
			return nil
		}
		from = max(from, min(r.checkpoint.Size, g.size))
	}
	f, err := r.l.disk.open(g.path, os.O_RDWR)
	if err != nil {
		return err
	}
	if err = copyBytes(f, f, from, g.size); err == nil {
		err = f.Truncate(g.size) // remove the zeros written ahead
	}
	if err == nil {
		err = f.sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = r.l.disk.syncDir(r.s.dir)
	}
	return err
}

func (r *recovery) emptySegment(first uint64) error {
	g, f, err := r.l.newSegment(r.s, first, 0)
	if err != nil {
		return err
	}
	r.l.segments.Add(-1) // run counts it again
	r.l.bytes.Add(-g.size)
	r.s.segments = []*segment{g}
	return f.Close()
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
