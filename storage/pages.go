package storage

import (
	"io"

	"github.com/dsnode/dsnode/storage/boltfile"
)

// pageSize is given to bbolt explicitly, so files move between machines.
const pageSize = 4096

// raftLayout is what raft.db looks like: small enough to be read whole.
func raftLayout() boltfile.Layout {
	return boltfile.Layout{
		PageSize: pageSize,
		Buckets:  []string{string(bucketLog), string(bucketMeta), string(bucketStable)},
		MaxEntry: maxEntry,
		Depth:    boltfile.Whole,
	}
}

// checkPages says whether bbolt may open the file.
func checkPages(f io.ReaderAt, size int64) (boltfile.Meta, error) {
	return boltfile.Check(f, size, raftLayout())
}
