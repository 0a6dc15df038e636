package jobs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/dsnode/dsnode/storage/atomicfile"
	"github.com/dsnode/dsnode/storage/journal"
)

// noted is the file with the streams that are islands.
type noted struct {
	Format  int      `json:"format"` // 1
	Islands []string `json:"islands"`
}

// readIslands gives what is noted: nothing, when that can't be told.
func (s *streams) readIslands() ([]journal.Incarnation, error) {
	text, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the first start, unless somebody removed it
	}
	if err != nil {
		return nil, fmt.Errorf("read which job streams nobody else knows: %w", err)
	}
	var n noted
	err = json.Unmarshal(text, &n)
	if err == nil && n.Format != 1 {
		err = fmt.Errorf("format %d", n.Format)
	}
	var islands []journal.Incarnation
	for _, text := range n.Islands {
		i, bad := journal.ParseIncarnation(text)
		err = errors.Join(err, bad)
		islands = append(islands, i)
	}
	if err != nil {
		s.log.Warn("which job streams nobody else knows can't be read; all count as if they were known", "file", s.path, "err", err)
		return nil, nil
	}
	return islands, nil
}

// writeIslands replaces the file, durably and in one step. There are no more
// than a journal holds streams.
func writeIslands(path string, islands map[journal.Stream]struct{}) error {
	n := noted{Format: 1, Islands: make([]string, 0, len(islands))}
	for st := range islands {
		n.Islands = append(n.Islands, st.Incarnation.String())
	}
	slices.Sort(n.Islands)
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return atomicfile.Replace(path, append(text, '\n'))
}
