package keyring

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dsnode/dsnode/storage/atomicfile"
)

// NodeKeyFile is the name of the file in the data directory.
const NodeKeyFile = "node.key"

// The file is
//
//	"DSNODKEY" (8) | format (1) | crc32c of what follows (4) | sealed key (69)
//
// The checksum distinguishes a damaged file from a wrong operator key; an operator
// has to act differently on the two.
const (
	nodeKeyMagic   = "DSNODKEY"
	nodeKeyFormat  = 1
	nodeKeySize    = len(nodeKeyMagic) + 1 + 4 + keySize + Overhead
	nodeKeyPurpose = "dsnode operator wraps node key v1"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// OpenNodeKey returns the Sealer of this node's own key. On the first start it
// makes a random key and stores it durably in dir/node.key, wrapped with the
// operator's key. The directory must exist, and the caller must hold its lock.
//
// The error wraps ErrWrongOperatorKey, ErrDamaged, ErrNewerFormat or
// ErrNoOperatorKey, or is one of the file system.
func OpenNodeKey(dir string, op OperatorKey) (Sealer, error) {
	material, err := readNodeKey(dir, op)
	if errors.Is(err, fs.ErrNotExist) {
		material = make([]byte, keySize)
		_, _ = rand.Read(material) // never fails; it ends the process instead
		err = writeNodeKey(dir, material, op)
	}
	if err != nil {
		return nil, err
	}
	return NewSealer(material)
}

// RewrapNodeKey wraps the node's key with another operator key. After a failure or
// a crash either the old or the new file exists. The node's key itself and
// everything that it sealed stay the same.
func RewrapNodeKey(dir string, from, to OperatorKey) error {
	material, err := readNodeKey(dir, from)
	if err != nil {
		return err
	}
	return writeNodeKey(dir, material, to)
}

func readNodeKey(dir string, op OperatorKey) ([]byte, error) {
	path := filepath.Join(dir, NodeKeyFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read node key: %w", err)
	}
	wrapped, err := parseNodeKey(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	s, err := op.sealer(nodeKeyPurpose)
	if err != nil {
		return nil, err
	}
	material, err := s.Open(nil, wrapped, []byte(nodeKeyMagic))
	if errors.Is(err, ErrWrongKey) {
		return nil, fmt.Errorf("%w: %s was made with a different operator key; give this node the key it was first started with, "+
			"or, if it is lost, remove the node's data directory and let the node join again", ErrWrongOperatorKey, path)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return material, nil
}

// parseNodeKey checks the file's format and returns the sealed key.
func parseNodeKey(b []byte) ([]byte, error) {
	const at = len(nodeKeyMagic)
	if len(b) < at+1 || string(b[:at]) != nodeKeyMagic {
		return nil, fmt.Errorf("%w: not a node key", ErrDamaged)
	}
	if b[at] != nodeKeyFormat {
		return nil, fmt.Errorf("%w: node key format %d", ErrNewerFormat, b[at])
	}
	if len(b) != nodeKeySize {
		return nil, fmt.Errorf("%w: node key has %d bytes, want %d", ErrDamaged, len(b), nodeKeySize)
	}
	wrapped := b[at+5:]
	if binary.BigEndian.Uint32(b[at+1:]) != crc32.Checksum(wrapped, castagnoli) {
		return nil, fmt.Errorf("%w: node key checksum", ErrDamaged)
	}
	return wrapped, nil
}

func writeNodeKey(dir string, material []byte, op OperatorKey) error {
	s, err := op.sealer(nodeKeyPurpose)
	if err != nil {
		return err
	}
	wrapped := s.Seal(nil, material, []byte(nodeKeyMagic))
	b := append([]byte(nodeKeyMagic), nodeKeyFormat)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(wrapped, castagnoli))
	b = append(b, wrapped...)

	if err := atomicfile.Replace(filepath.Join(dir, NodeKeyFile), b); err != nil {
		return fmt.Errorf("write node key: %w", err)
	}
	return nil
}
