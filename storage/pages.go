package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// This file reads bbolt's file format (version 2) by itself, only to decide
// whether bbolt may open the file. bbolt trusts its pages: a damaged one makes
// it panic in a goroutine of its own, recurse for ever, or read beyond the end
// of its mapping, and none of that can be contained from outside. So every
// reachable page is checked first, through read calls, whose errors are errors.
//
// What passes here can't crash bbolt; whether the records are the right ones
// is decided by their seals (raft_verify.go).
const (
	pageSize       = 4096 // given to bbolt explicitly, so files move between machines
	pageHeader     = 16
	pageBranch     = 0x01
	pageLeaf       = 0x02
	leafIsBucket   = 0x01
	pageElement    = 16 // branch and leaf elements have the same size
	bucketHeader   = 16
	metaMagic      = 0xED0CDAED
	metaVersion    = 2
	metaSize       = 64
	noFreelistPage = ^uint64(0)
	maxTreeDepth   = 32 // at least two keys a page: 2^32 pages, 16 TiB
	// bbolt splits a page from four keys on, so up to four of the largest
	// entries may share a run of pages.
	maxOverflow = 4*(maxEntry>>12) + 64
)

// pageMeta is what counts of a valid meta page.
type pageMeta struct {
	root, highWater, txid uint64
}

// checkPages checks all reachable pages of a bbolt file with the given
// top-level buckets. The error wraps ErrDamaged or ErrForeign, or is what
// reading said.
func checkPages(f io.ReaderAt, size int64, buckets ...string) (pageMeta, error) {
	m, err := latestMeta(f, size)
	if err != nil {
		return m, err
	}
	c := pageCheck{f: f, highWater: m.highWater, seen: make([]uint64, m.highWater/64+1), want: buckets}
	if err := c.tree(m.root, 0, nil, nil, true); err != nil {
		return m, err
	}
	if len(c.want) != c.found {
		return m, fmt.Errorf("%w: it has %d of the buckets %q", ErrForeign, c.found, c.want)
	}
	return m, nil
}

// latestMeta picks the meta page that bbolt would pick.
func latestMeta(f io.ReaderAt, size int64) (pageMeta, error) {
	var best pageMeta
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
		// Ours always have these two (createRaftFile); other programs' differ.
		if binary.NativeEndian.Uint32(b[8:]) != pageSize || binary.NativeEndian.Uint64(b[32:]) != noFreelistPage {
			return best, fmt.Errorf("%w: it is another program's database", ErrForeign)
		}
		m := pageMeta{
			root:      binary.NativeEndian.Uint64(b[16:]),
			highWater: binary.NativeEndian.Uint64(b[40:]),
			txid:      binary.NativeEndian.Uint64(b[48:]),
		}
		if valid == 1 || m.txid > best.txid {
			best = m
		}
	}
	if valid == 0 && known == 0 {
		return best, fmt.Errorf("%w: it is no database", ErrForeign)
	}
	if valid == 0 {
		return best, fmt.Errorf("%w: both meta pages", ErrDamaged)
	}
	if best.highWater < 2 || best.highWater > uint64(size/pageSize) {
		return best, fmt.Errorf("%w: it has %d bytes, but %d pages are in use", ErrDamaged, size, best.highWater)
	}
	return best, nil
}

// metaIntact is the check that bbolt makes.
func metaIntact(b []byte) bool {
	sum := fnv.New64a()
	_, _ = sum.Write(b[:56]) // a hash never fails
	return binary.NativeEndian.Uint32(b) == metaMagic &&
		binary.NativeEndian.Uint32(b[4:]) == metaVersion &&
		binary.NativeEndian.Uint64(b[56:]) == sum.Sum64()
}

type pageCheck struct {
	f         io.ReaderAt
	highWater uint64
	seen      []uint64 // a bit a page
	want      []string // top-level buckets
	found     int
	bufs      [2*maxTreeDepth + 2][]byte // one a level; keys of a level point into its own
}

// tree checks the page id and all below it. Keys must lie in [from, to); nil
// is no limit. top says that the values are buckets.
func (c *pageCheck) tree(id uint64, depth int, from, to []byte, top bool) error {
	isRoot := from == nil && to == nil
	if depth > maxTreeDepth {
		return fmt.Errorf("%w: page %d is %d levels deep", ErrDamaged, id, depth)
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
	known := c.found < len(c.want) && string(e.key(i)) == c.want[c.found]
	switch {
	case e.flags(i) != leafIsBucket || len(value) < bucketHeader:
		return fmt.Errorf("%w: page %d holds something that is no bucket", ErrDamaged, id)
	case !known:
		return fmt.Errorf("%w: it has a bucket %q", ErrForeign, e.key(i))
	}
	c.found++
	root := binary.NativeEndian.Uint64(value)
	if root != 0 {
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

// read gives the page id with its overflow, and marks all of it as seen.
func (c *pageCheck) read(id uint64, depth int, top bool) ([]byte, error) {
	if id < 2 || id >= c.highWater {
		return nil, fmt.Errorf("%w: a reference to page %d of %d", ErrDamaged, id, c.highWater)
	}
	var header [pageHeader]byte
	if _, err := c.f.ReadAt(header[:], int64(id*pageSize)); err != nil {
		return nil, fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(binary.NativeEndian.Uint32(header[12:]))
	if binary.NativeEndian.Uint64(header[:]) != id || overflow > maxOverflow || id+overflow >= c.highWater {
		return nil, fmt.Errorf("%w: header of page %d", ErrDamaged, id)
	}
	for p := id; p <= id+overflow; p++ {
		if c.seen[p/64]&(1<<(p%64)) != 0 {
			return nil, fmt.Errorf("%w: page %d is used twice", ErrDamaged, p)
		}
		c.seen[p/64] |= 1 << (p % 64)
	}
	level := depth
	if !top {
		level += maxTreeDepth + 1
	}
	size := int(overflow+1) * pageSize
	if cap(c.bufs[level]) < size {
		c.bufs[level] = make([]byte, size)
	}
	page := c.bufs[level][:size]
	if _, err := c.f.ReadAt(page, int64(id*pageSize)); err != nil {
		return nil, fmt.Errorf("read page %d: %w", id, err)
	}
	return page, nil
}

// elements is a page whose elements lie inside it.
type elements struct {
	page   []byte
	branch bool
	count  int
}

// parseElements checks that the page is a branch or a leaf, and that every
// key and value lies inside it, behind the elements.
func parseElements(page []byte, id uint64) (elements, error) {
	if len(page) < pageHeader {
		return elements{}, fmt.Errorf("%w: page %d is cut", ErrDamaged, id)
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
			return e, fmt.Errorf("%w: element %d of page %d", ErrDamaged, i, id)
		}
	}
	return e, nil
}

func (e elements) at(i int) []byte { return e.page[pageHeader+i*pageElement:] }

// extent is where the key begins in the page, and the sizes of key and value.
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

// checkPagesOf is checkPages of the file at path.
func checkPagesOf(path string, buckets ...string) (pageMeta, error) {
	f, err := os.Open(path)
	if err != nil {
		return pageMeta{}, err
	}
	defer func() { _ = f.Close() }() // only read from
	info, err := f.Stat()
	if err != nil {
		return pageMeta{}, err
	}
	return checkPages(f, info.Size(), buckets...)
}
