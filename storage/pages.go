package storage

import "github.com/dsnode/dsnode/storage/boltfile"

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
