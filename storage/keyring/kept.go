package keyring

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dsnode/dsnode/storage/atomicfile"
)

// KeptFile is the name of the file in the data directory.
const KeptFile = "data.keys"

// The file is
//
//	"DSDATKEY" (8) | format (1) | sealed JSON
//
// sealed with the node's own key, so that it can be opened even if the operator's
// key changes.
const (
	keptMagic  = "DSDATKEY"
	keptFormat = 1
	// Far more than maxRing keys need.
	maxKept = 64 << 10
)

// Kept is what a node stores of the agreed data keys for its next run. With it the
// node can open its records without a quorum. It also never goes back to a key
// that the cluster has retired: while it replays its Raft log, it would otherwise
// take such a key for the current one.
type Kept struct {
	ClusterID string
	// Generation and Version order two lists; see cluster.State.
	Generation, Version uint64
	Current             KeyID // zero: none
	Keys                []DataKey
}

type keptJSON struct {
	ClusterID  string        `json:"cluster_id"`
	Generation uint64        `json:"generation"`
	Version    uint64        `json:"version"`
	Current    KeyID         `json:"current"`
	Keys       []keptKeyJSON `json:"keys"`
}

type keptKeyJSON struct {
	Kind     Kind   `json:"kind"`
	Material []byte `json:"material"`
}

// ReadKept returns what WriteKept stored; the zero Kept when there is no file. The
// error wraps ErrWrongKey, ErrDamaged, ErrNewerFormat or is one of the file system.
func ReadKept(dir string, s Sealer) (Kept, error) {
	path := filepath.Join(dir, KeptFile)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Kept{}, nil
	}
	if err == nil && info.Size() > maxKept {
		return Kept{}, fmt.Errorf("%s: %w: %d bytes", path, ErrDamaged, info.Size())
	}
	if err != nil {
		return Kept{}, fmt.Errorf("read data keys: %w", err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return Kept{}, fmt.Errorf("read data keys: %w", err)
	}
	k, err := parseKept(b, s)
	if err != nil {
		return Kept{}, fmt.Errorf("%s: %w", path, err)
	}
	return k, nil
}

func parseKept(b []byte, s Sealer) (Kept, error) {
	const at = len(keptMagic)
	if len(b) < at+1 || string(b[:at]) != keptMagic {
		return Kept{}, fmt.Errorf("%w: not a file of data keys", ErrDamaged)
	}
	if b[at] != keptFormat {
		return Kept{}, fmt.Errorf("%w: data keys format %d", ErrNewerFormat, b[at])
	}
	text, err := s.Open(nil, b[at+1:], []byte(keptMagic))
	if err != nil {
		return Kept{}, err
	}
	var j keptJSON
	if err := json.Unmarshal(text, &j); err != nil {
		// Don't include err: its text could contain a part of a key.
		return Kept{}, fmt.Errorf("%w: the sealed content is not JSON", ErrDamaged)
	}
	k := Kept{ClusterID: j.ClusterID, Generation: j.Generation, Version: j.Version, Current: j.Current}
	for _, one := range j.Keys {
		key, err := DataKeyFrom(one.Kind, one.Material)
		if err != nil {
			return Kept{}, err
		}
		k.Keys = append(k.Keys, key)
	}
	return k, nil
}

// WriteKept replaces the stored keys, durably.
func WriteKept(dir string, s Sealer, k Kept) error {
	j := keptJSON{ClusterID: k.ClusterID, Generation: k.Generation, Version: k.Version, Current: k.Current}
	for _, key := range k.Keys {
		j.Keys = append(j.Keys, keptKeyJSON{Kind: key.kind, Material: key.material[:]})
	}
	text, err := json.Marshal(j)
	if err != nil {
		return fmt.Errorf("encode data keys: %w", err)
	}
	b := append([]byte(keptMagic), keptFormat)
	b = s.Seal(b, text, []byte(keptMagic))
	if err := atomicfile.Replace(filepath.Join(dir, KeptFile), b); err != nil {
		return fmt.Errorf("write data keys: %w", err)
	}
	return nil
}
