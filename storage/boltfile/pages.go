// Package boltfile checks whether bbolt may open a file, and contains bbolt's
// panics when a file turns out to be damaged later. It also creates bbolt files
// (create.go) and detects that one has lost its latest transactions (mark.go).
//
// It parses bbolt's file format (version 2) itself. bbolt trusts its pages: a
// damaged one can make it panic in its own goroutine, recurse forever, or read
// beyond the end of its mapping, and a caller can contain none of that. So the
// pages are checked first, through read calls, which return errors. The content
// of the records is checked by the file's owner.
package boltfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"runtime/debug"
)

var (
	// ErrDamaged means that a file differs from what was written.
	ErrDamaged = errors.New("stored data is damaged")
	// ErrForeign means that a file is not of the kind that its name says.
	ErrForeign = errors.New("not a file of dsnode")
)

const (
	pageHeader     = 16
	pageBranch     = 0x01
	pageLeaf       = 0x02
	pageFreelist   = 0x10
	leafIsBucket   = 0x01
	pageElement    = 16 // branch and leaf elements have the same size
	bucketHeader   = 16
	metaMagic      = 0xED0CDAED
	metaVersion    = 2
	metaSize       = 64
	noFreelistPage = ^uint64(0)
	maxTreeDepth   = 32 // at least two keys per page: 2^32 pages
)

// Depth is how much of a file Check reads.
type Depth int

const (
	// Whole reads every page; a file that passes can't crash bbolt.
	Whole Depth = iota
	// Heads reads only the headers of leaf pages: no page is used twice, or both
	// free and used. A damaged leaf is found when it is used, inside Contain.
	Heads
	// Branches does not read leaf pages, for files with too many of them. A damaged
	// leaf, or one that is used twice, is found when it is used, inside Contain.
	Branches
)

// Layout describes a bbolt file of dsnode.
type Layout struct {
	PageSize int      // passed to bbolt explicitly, so that files can move between machines
	Buckets  []string // all buckets of the top level, sorted; none of them has sub-buckets
	// MaxEntry bounds the bytes of a key with its value; 0: bounded by the file's size.
	MaxEntry int
	Freelist bool // the file keeps its free list (bbolt's NoFreelistSync is off)
	Depth    Depth
}

// Meta is what the valid meta page says.
type Meta struct {
	HighWater uint64 // pages that may be in use
	Txid      uint64 // of the last transaction

	root, freelist uint64
}

// Check checks the reachable pages of a bbolt file, to the layout's depth. The
// error wraps ErrDamaged or ErrForeign, or is an error of reading.
func Check(f io.ReaderAt, size int64, l Layout) (Meta, error) {
	m, err := latestMeta(f, size, l)
	if err != nil {
		return m, err
	}
	c := pageCheck{f: f, layout: l, highWater: m.HighWater, seen: make([]uint64, m.HighWater/64+1), maxOverflow: m.HighWater}
	if l.MaxEntry > 0 {
		// bbolt splits a page only if it has at least four keys, so up to four of the
		// largest entries may share a run of pages.
		c.maxOverflow = uint64(4*(l.MaxEntry/l.PageSize) + 64)
	}
	if err := c.tree(m.root, 0, nil, nil, true); err != nil {
		return m, err
	}
	if len(l.Buckets) != c.found {
		return m, fmt.Errorf("%w: it has %d of the buckets %q", ErrForeign, c.found, l.Buckets)
	}
	if l.Freelist {
		return m, c.freelist(m.freelist)
	}
	return m, nil
}

// CheckFile runs Check on the file at path.
func CheckFile(path string, l Layout) (Meta, error) {
	f, err := os.Open(path)
	if err != nil {
		return Meta{}, err
	}
	defer func() { _ = f.Close() }() // only read from
	info, err := f.Stat()
	if err != nil {
		return Meta{}, err
	}
	return Check(f, info.Size(), l)
}

// Contain, deferred, turns a panic of bbolt into ErrDamaged; bbolt panics on pages
// that changed while it runs. A page that the disk fails to read causes a fault at
// its mapped address. SetPanicOnFault(true) makes that a panic too; Contain
// restores the previous setting, which it is passed:
//
//	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
func Contain(err *error, before bool) {
	debug.SetPanicOnFault(before)
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: %v", ErrDamaged, p)
	}
}

// latestMeta returns the meta page that bbolt would choose.
func latestMeta(f io.ReaderAt, size int64, l Layout) (Meta, error) {
	var best Meta
	pageSize := int64(l.PageSize)
	var known, valid int
	for i := range int64(2) {
		b := make([]byte, pageHeader+metaSize)
		if _, err := f.ReadAt(b, i*pageSize); err != nil {
			if errors.Is(err, io.EOF) {
				return best, fmt.Errorf("%w: it has only %d bytes", ErrDamaged, size)
			}
			return best, err
		}
		b = b[pageHeader:]
		if binary.NativeEndian.Uint32(b) == metaMagic {
			known++
		}
		if !metaIntact(b) {
			continue
		}
		valid++
		m := Meta{
			root:      binary.NativeEndian.Uint64(b[16:]),
			freelist:  binary.NativeEndian.Uint64(b[32:]),
			HighWater: binary.NativeEndian.Uint64(b[40:]),
			Txid:      binary.NativeEndian.Uint64(b[48:]),
		}
		// Our files always have these two values; those of other programs differ.
		if int64(binary.NativeEndian.Uint32(b[8:])) != pageSize || (m.freelist != noFreelistPage) != l.Freelist {
			return best, fmt.Errorf("%w: it is another program's database", ErrForeign)
		}
		if valid == 1 || m.Txid > best.Txid {
			best = m
		}
	}
	if valid == 0 && known == 0 {
		return best, fmt.Errorf("%w: it is not a database", ErrForeign)
	}
	if valid == 0 {
		return best, fmt.Errorf("%w: neither meta page is valid", ErrDamaged)
	}
	if best.HighWater < 2 || best.HighWater > uint64(size/pageSize) {
		return best, fmt.Errorf("%w: it has %d bytes, but %d pages are in use", ErrDamaged, size, best.HighWater)
	}
	return best, nil
}

// metaIntact is bbolt's own check of a meta page.
func metaIntact(b []byte) bool {
	sum := fnv.New64a()
	_, _ = sum.Write(b[:56]) // a hash never fails
	return binary.NativeEndian.Uint32(b) == metaMagic &&
		binary.NativeEndian.Uint32(b[4:]) == metaVersion &&
		binary.NativeEndian.Uint64(b[56:]) == sum.Sum64()
}

type pageCheck struct {
	f           io.ReaderAt
	layout      Layout
	highWater   uint64
	maxOverflow uint64
	seen        []uint64                   // one bit per page
	found       int                        // top-level buckets
	leaves      int                        // depth of the current bucket's leaves
	bufs        [2*maxTreeDepth + 2][]byte // one per level; keys of a level point into its buffer
}

// tree checks page id and all pages below it. Keys must lie in [from, to); nil is
// no limit. top means that the values are buckets.
func (c *pageCheck) tree(id uint64, depth int, from, to []byte, top bool) error {
	isRoot := from == nil && to == nil
	if depth > maxTreeDepth {
		return fmt.Errorf("%w: page %d is %d levels deep", ErrDamaged, id, depth)
	}
	if !top && !isRoot && c.layout.Depth != Whole {
		if leaf, err := c.skip(id, depth); leaf || err != nil {
			return err
		}
	}
	page, err := c.read(id, depth, top)
	if err != nil {
		return err
	}
	elements, err := parseElements(page, id)
	if err != nil {
		return err
	}
	if elements.count == 0 && (elements.branch || !isRoot) {
		return fmt.Errorf("%w: page %d is empty", ErrDamaged, id)
	}
	if err := elements.inOrder(from, to); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	for i := range elements.count {
		switch {
		case elements.branch:
			upper := to
			if i+1 < elements.count {
				upper = elements.key(i + 1)
			}
			err = c.tree(elements.child(i), depth+1, elements.key(i), upper, top)
		case top:
			err = c.bucket(elements, i, id)
		case elements.flags(i) != 0:
			err = fmt.Errorf("%w: page %d has element flags %x", ErrDamaged, id, elements.flags(i))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bucket checks one bucket of the top level.
func (c *pageCheck) bucket(e elements, i int, id uint64) error {
	value := e.value(i)
	known := c.found < len(c.layout.Buckets) && string(e.key(i)) == c.layout.Buckets[c.found]
	switch {
	case e.flags(i) != leafIsBucket || len(value) < bucketHeader:
		return fmt.Errorf("%w: page %d has an element that is not a bucket", ErrDamaged, id)
	case !known:
		return fmt.Errorf("%w: it has a bucket %q", ErrForeign, e.key(i))
	}
	c.found++
	root := binary.NativeEndian.Uint64(value)
	if root != 0 {
		c.leaves = -1
		return c.tree(root, 0, nil, nil, false)
	}
	inline, err := parseElements(value[bucketHeader:], id)
	if err != nil {
		return err
	}
	if inline.branch {
		return fmt.Errorf("%w: page %d holds a branch inside a value", ErrDamaged, id)
	}
	for i := range inline.count {
		if inline.flags(i) != 0 {
			return fmt.Errorf("%w: page %d has element flags %x", ErrDamaged, id, inline.flags(i))
		}
	}
	return inline.inOrder(nil, nil)
}

// skip reports whether page id is a leaf that the layout's depth excludes from
// reading, and marks it as seen.
func (c *pageCheck) skip(id uint64, depth int) (leaf bool, err error) {
	// All leaves of a bucket have the same depth, so the first one gives it.
	if c.layout.Depth == Branches && depth == c.leaves {
		if id < 2 || id >= c.highWater {
			return true, fmt.Errorf("%w: a reference to page %d of %d", ErrDamaged, id, c.highWater)
		}
		return true, c.mark(id, 0)
	}
	flags, overflow, err := c.header(id)
	if err != nil || flags != pageLeaf {
		return false, err
	}
	c.leaves = depth
	return true, c.mark(id, overflow)
}

// header returns the type of page id and the number of overflow pages.
func (c *pageCheck) header(id uint64) (flags uint16, overflow uint64, err error) {
	if id < 2 || id >= c.highWater {
		return 0, 0, fmt.Errorf("%w: a reference to page %d of %d", ErrDamaged, id, c.highWater)
	}
	var header [pageHeader]byte
	if _, err := c.f.ReadAt(header[:], int64(id)*int64(c.layout.PageSize)); err != nil {
		return 0, 0, fmt.Errorf("read page %d: %w", id, err)
	}
	overflow = uint64(binary.NativeEndian.Uint32(header[12:]))
	if binary.NativeEndian.Uint64(header[:]) != id || overflow > c.maxOverflow || id+overflow >= c.highWater {
		return 0, 0, fmt.Errorf("%w: wrong header of page %d", ErrDamaged, id)
	}
	return binary.NativeEndian.Uint16(header[8:]), overflow, nil
}

func (c *pageCheck) mark(id, overflow uint64) error {
	for p := id; p <= id+overflow; p++ {
		if c.seen[p/64]&(1<<(p%64)) != 0 {
			return fmt.Errorf("%w: page %d is used twice", ErrDamaged, p)
		}
		c.seen[p/64] |= 1 << (p % 64)
	}
	return nil
}

// freelist checks that no free page is in use, as far as the used pages were
// checked: bbolt would overwrite it.
func (c *pageCheck) freelist(id uint64) error {
	flags, overflow, err := c.header(id)
	if err != nil {
		return err
	}
	if flags != pageFreelist {
		return fmt.Errorf("%w: page %d has type %x, not that of the free list", ErrDamaged, id, flags)
	}
	if err := c.mark(id, overflow); err != nil {
		return err
	}
	page := make([]byte, int(overflow+1)*c.layout.PageSize)
	if _, err := c.f.ReadAt(page, int64(id)*int64(c.layout.PageSize)); err != nil {
		return fmt.Errorf("read page %d: %w", id, err)
	}
	count, ids := uint64(binary.NativeEndian.Uint16(page[10:])), page[pageHeader:]
	if count == 0xFFFF { // then the first id is the real count
		count, ids = binary.NativeEndian.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return fmt.Errorf("%w: free list of %d pages", ErrDamaged, count)
	}
	for i := range count {
		free := binary.NativeEndian.Uint64(ids[8*i:])
		if free < 2 || free >= c.highWater {
			return fmt.Errorf("%w: page %d of %d is free", ErrDamaged, free, c.highWater)
		}
		if err := c.mark(free, 0); err != nil {
			return err
		}
	}
	return nil
}

// read returns page id with its overflow pages, and marks all of them as seen.
func (c *pageCheck) read(id uint64, depth int, top bool) ([]byte, error) {
	_, overflow, err := c.header(id)
	if err == nil {
		err = c.mark(id, overflow)
	}
	if err != nil {
		return nil, err
	}
	level := depth
	if !top {
		level += maxTreeDepth + 1
	}
	size := int(overflow+1) * c.layout.PageSize
	if cap(c.bufs[level]) < size {
		c.bufs[level] = make([]byte, size)
	}
	page := c.bufs[level][:size]
	if _, err := c.f.ReadAt(page, int64(id)*int64(c.layout.PageSize)); err != nil {
		return nil, fmt.Errorf("read page %d: %w", id, err)
	}
	return page, nil
}

// elements is a page whose elements all lie inside it.
type elements struct {
	page   []byte
	branch bool
	count  int
}

// parseElements checks that the page is a branch or a leaf, and that every key and
// value lies inside it, after the element headers.
func parseElements(page []byte, id uint64) (elements, error) {
	if len(page) < pageHeader {
		return elements{}, fmt.Errorf("%w: page %d is truncated", ErrDamaged, id)
	}
	flags := binary.NativeEndian.Uint16(page[8:])
	e := elements{page: page, branch: flags == pageBranch, count: int(binary.NativeEndian.Uint16(page[10:]))}
	if flags != pageBranch && flags != pageLeaf {
		return e, fmt.Errorf("%w: page %d has type %x", ErrDamaged, id, flags)
	}
	behind := uint64(pageHeader + e.count*pageElement)
	if behind > uint64(len(page)) {
		return e, fmt.Errorf("%w: page %d has %d elements", ErrDamaged, id, e.count)
	}
	for i := range e.count {
		from, key, value := e.extent(i)
		if key == 0 || from < behind || from+key+value > uint64(len(page)) {
			return e, fmt.Errorf("%w: element %d of page %d reaches outside of it", ErrDamaged, i, id)
		}
	}
	return e, nil
}

func (e elements) at(i int) []byte { return e.page[pageHeader+i*pageElement:] }

// extent returns where the key begins in the page, and the sizes of key and value.
func (e elements) extent(i int) (from, key, value uint64) {
	b := e.at(i)
	base := uint64(pageHeader + i*pageElement)
	if e.branch { // pos (4), key size (4), page (8)
		return base + uint64(binary.NativeEndian.Uint32(b)), uint64(binary.NativeEndian.Uint32(b[4:])), 0
	}
	// flags (4), pos (4), key size (4), value size (4)
	return base + uint64(binary.NativeEndian.Uint32(b[4:])), uint64(binary.NativeEndian.Uint32(b[8:])),
		uint64(binary.NativeEndian.Uint32(b[12:]))
}

func (e elements) key(i int) []byte {
	from, key, _ := e.extent(i)
	return e.page[from : from+key]
}

func (e elements) value(i int) []byte {
	from, key, value := e.extent(i)
	return e.page[from+key : from+key+value]
}

func (e elements) flags(i int) uint32 { return binary.NativeEndian.Uint32(e.at(i)) }
func (e elements) child(i int) uint64 { return binary.NativeEndian.Uint64(e.at(i)[8:]) }

func (e elements) inOrder(from, to []byte) error {
	for i := range e.count {
		k := e.key(i)
		switch {
		case i == 0 && from != nil && bytes.Compare(k, from) < 0,
			i > 0 && bytes.Compare(k, e.key(i-1)) <= 0,
			to != nil && bytes.Compare(k, to) >= 0:
			return fmt.Errorf("%w: key %d is out of order", ErrDamaged, i)
		}
	}
	return nil
}
