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

// islandsNote is the content of islandsFile.
type islandsNote struct {
	Format  int      `json:"format"` // 1
	Islands []string `json:"islands"`
}

// readIslands returns the islands in the file: none if it can't be parsed.
func (s *streams) readIslands() ([]journal.Incarnation, error) {
	text, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the first start, or the file was removed
	}
	if err != nil {
		return nil, fmt.Errorf("read the file of island streams: %w", err)
	}
	var n islandsNote
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
		s.log.Warn("can't parse the file of island streams; no stream is treated as an island", "file", s.path, "err", err)
		return nil, nil
	}
	return islands, nil
}

// writeIslands replaces the file atomically and durably. It has at most as many entries as
// a journal has streams.
func writeIslands(path string, islands map[journal.Stream]struct{}) error {
	n := islandsNote{Format: 1, Islands: make([]string, 0, len(islands))}
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
