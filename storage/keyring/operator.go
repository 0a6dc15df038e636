package keyring

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
)

// OperatorKey is the one secret that an operator keeps. It prints as
// "[operator key]" in every format; only Encode reveals it. The zero value is no
// key.
type OperatorKey struct {
	material [keySize]byte
	set      bool
}

// KeyRef says where to read an operator key; exactly one field is set.
type KeyRef struct {
	Env  string // name of an environment variable
	File string // path
}

func (r KeyRef) String() string {
	if r.File != "" {
		return "file " + r.File
	}
	return "environment variable " + r.Env
}

// A key in hex with some white space fits; a larger file is something else.
const maxKeyFile = 1024

// GenerateOperatorKey makes a new random key.
func GenerateOperatorKey() OperatorKey {
	k := OperatorKey{set: true}
	// crypto/rand.Read never fails; it ends the process instead.
	_, _ = rand.Read(k.material[:])
	return k
}

// LoadOperatorKey reads the key that ref names. Only its owner may have access to
// the file (mode 0600 or 0400). Errors are ErrNoOperatorKey, ErrBadOperatorKey,
// ErrKeyFileMode or of the file system; none contains a part of the key.
func LoadOperatorKey(ref KeyRef) (OperatorKey, error) {
	switch {
	case ref.Env == "" && ref.File == "":
		return OperatorKey{}, fmt.Errorf("%w: name a file or an environment variable that holds it", ErrNoOperatorKey)
	case ref.Env != "" && ref.File != "":
		return OperatorKey{}, fmt.Errorf("%w: both %s and file %s are named; keep one of them",
			ErrNoOperatorKey, KeyRef{Env: ref.Env}, ref.File)
	}
	text, err := readKeyText(ref)
	if err != nil {
		return OperatorKey{}, err
	}
	k, err := ParseOperatorKey(text)
	if err != nil {
		return OperatorKey{}, fmt.Errorf("%s: %w", ref, err)
	}
	return k, nil
}

func readKeyText(ref KeyRef) (string, error) {
	if ref.Env != "" {
		text, ok := os.LookupEnv(ref.Env)
		if !ok || text == "" {
			return "", fmt.Errorf("%w: %s is not set", ErrNoOperatorKey, ref)
		}
		return text, nil
	}
	f, err := os.Open(ref.File)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: %w", ErrNoOperatorKey, err)
	}
	if err != nil {
		return "", fmt.Errorf("read operator key: %w", err)
	}
	defer func() { _ = f.Close() }() // only read from
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("read operator key: %w", err)
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s: %w: it is not a regular file", ref, ErrBadOperatorKey)
	}
	if mode := info.Mode().Perm(); mode&^0o600 != 0 {
		return "", fmt.Errorf("%w: %s has mode %04o; run: chmod 600 %s", ErrKeyFileMode, ref.File, mode, ref.File)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return "", fmt.Errorf("read operator key: %w", err)
	}
	if len(b) > maxKeyFile {
		return "", fmt.Errorf("%s: %w: more than %d bytes", ref, ErrBadOperatorKey, maxKeyFile)
	}
	return string(b), nil
}

// ParseOperatorKey reads 32 bytes in base64 (either alphabet, with or without
// padding) or in hex; white space around them is ignored.
func ParseOperatorKey(text string) (OperatorKey, error) {
	text = strings.TrimSpace(text)
	var b []byte
	var err error
	if len(text) == hex.EncodedLen(keySize) {
		b, err = hex.DecodeString(text)
	} else {
		plain := strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(text, "="))
		b, err = base64.RawStdEncoding.DecodeString(plain)
	}
	if err != nil || len(b) != keySize {
		return OperatorKey{}, fmt.Errorf("%w: want %d random bytes in base64 or hex, as `head -c 32 /dev/urandom | base64` prints them",
			ErrBadOperatorKey, keySize)
	}
	k := OperatorKey{set: true}
	copy(k.material[:], b)
	return k, nil
}

// Encode returns the key in the form that LoadOperatorKey reads.
func (k OperatorKey) Encode() string {
	return base64.StdEncoding.EncodeToString(k.material[:])
}

func (k OperatorKey) String() string       { return "[operator key]" }
func (k OperatorKey) GoString() string     { return "[operator key]" }
func (k OperatorKey) LogValue() slog.Value { return slog.StringValue("[operator key]") }

// sealer returns the operator key's Sealer for one purpose.
func (k OperatorKey) sealer(purpose string) (Sealer, error) {
	if !k.set {
		return nil, ErrNoOperatorKey
	}
	material, err := subkey(k.material[:], purpose, keySize)
	if err != nil {
		return nil, err
	}
	return NewSealer(material)
}
