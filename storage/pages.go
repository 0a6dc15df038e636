package storage

import "github.com/dsnode/dsnode/storage/boltfile"

// pageSize is passed to bbolt explicitly, so that files can move between machines.
const pageSize = 4096

// raftLayout describes raft.db, which is small enough to check every page.
func raftLayout() boltfile.Layout {
	return boltfile.Layout{
		PageSize: pageSize,
		Buckets:  []string{string(bucketLog), string(bucketMeta), string(bucketStable)},
		MaxEntry: maxEntry,
		Depth:    boltfile.Whole,
	}
}
