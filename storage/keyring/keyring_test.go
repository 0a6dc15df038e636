package keyring

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func newTestSealer(t testing.TB, seed byte) Sealer {
	t.Helper()
	s, err := NewSealer(bytes.Repeat([]byte{seed}, keySize))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOpenNeedsTheSameKeyAndPlace(t *testing.T) {
	a, b := newTestSealer(t, 1), newTestSealer(t, 2)
	rapid.Check(t, func(t *rapid.T) {
		plain := rapid.SliceOf(rapid.Byte()).Draw(t, "plain")
		aad := rapid.SliceOf(rapid.Byte()).Draw(t, "aad")
		prefix := rapid.SliceOf(rapid.Byte()).Draw(t, "prefix")
		sealed := a.Seal(bytes.Clone(prefix), plain, aad)
		if !bytes.HasPrefix(sealed, prefix) {
			t.Fatal("Seal changed the bytes before it in dst")
		}
		sealed = sealed[len(prefix):]
		if len(sealed) != len(plain)+Overhead {
			t.Fatalf("%d bytes were sealed as %d", len(plain), len(sealed))
		}
		before := bytes.Clone(sealed)
		got, err := a.Open(bytes.Clone(prefix), sealed, aad)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, append(bytes.Clone(prefix), plain...)) {
			t.Fatal("Open returned different bytes")
		}
		if !bytes.Equal(before, sealed) {
			t.Fatal("Open changed the sealed bytes")
		}
		if _, err := a.Open(nil, sealed, append(aad, 'x')); !errors.Is(err, ErrDamaged) {
			t.Fatalf("another place: %v", err)
		}
		if _, err := b.Open(nil, sealed, aad); !errors.Is(err, ErrWrongKey) {
			t.Fatalf("another key: %v", err)
		}
		at := rapid.IntRange(0, len(sealed)-1).Draw(t, "at")
		sealed[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		_, err = a.Open(nil, sealed, aad)
		want := ErrDamaged
		switch {
		case at == 0:
			want = ErrNewerFormat
		case at < headerSize:
			want = ErrWrongKey
		}
		if !errors.Is(err, want) {
			t.Fatalf("flip at %d: %v, want %v", at, err, want)
		}
	})
}

func TestSealNeverRepeatsANonce(t *testing.T) {
	s := newTestSealer(t, 1)
	seen := map[string]bool{}
	for range 1000 {
		nonce := string(s.Seal(nil, []byte("same"), nil)[headerSize : headerSize+12])
		if seen[nonce] {
			t.Fatal("nonce repeated")
		}
		seen[nonce] = true
	}
}

func TestKeyMaterialMustBe32Bytes(t *testing.T) {
	for _, n := range []int{0, 16, 31, 33} {
		if _, err := NewSealer(make([]byte, n)); err == nil {
			t.Errorf("%d bytes were accepted", n)
		}
	}
}

func TestOperatorKeyForms(t *testing.T) {
	k := GenerateOperatorKey()
	b64 := k.Encode()
	raw := k.material[:]
	for name, text := range map[string]string{
		"base64":             b64,
		"base64 and newline": " " + b64 + "\r\n",
		"base64 unpadded":    strings.TrimRight(b64, "="),
		"base64 url":         strings.NewReplacer("+", "-", "/", "_").Replace(b64),
		"hex":                hex.EncodeToString(raw),
		"HEX":                strings.ToUpper(hex.EncodeToString(raw)),
	} {
		got, err := ParseOperatorKey(text)
		if err != nil || got != k {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, text := range []string{"", "secret", b64[4:], b64 + b64, strings.Repeat("z", 64), hex.EncodeToString(raw[:31])} {
		_, err := ParseOperatorKey(text)
		if !errors.Is(err, ErrBadOperatorKey) {
			t.Errorf("%q: %v", text, err)
		}
		if text != "" && err != nil && strings.Contains(err.Error(), text) {
			t.Errorf("the error contains the secret: %v", err)
		}
	}
}

func TestLoadOperatorKey(t *testing.T) {
	k := GenerateOperatorKey()
	dir := t.TempDir()
	file := func(name string, mode os.FileMode, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	t.Setenv("DSNODE_TEST_KEY", k.Encode())
	t.Setenv("DSNODE_TEST_EMPTY", "")
	tests := []struct {
		name string
		ref  KeyRef
		want error
	}{
		{"file 0600", KeyRef{File: file("a", 0o600, k.Encode()+"\n")}, nil},
		{"file 0400", KeyRef{File: file("b", 0o400, k.Encode())}, nil},
		{"environment", KeyRef{Env: "DSNODE_TEST_KEY"}, nil},
		{"group may read", KeyRef{File: file("c", 0o640, k.Encode())}, ErrKeyFileMode},
		{"world may read", KeyRef{File: file("d", 0o644, k.Encode())}, ErrKeyFileMode},
		{"executable", KeyRef{File: file("e", 0o700, k.Encode())}, ErrKeyFileMode},
		{"absent file", KeyRef{File: filepath.Join(dir, "none")}, ErrNoOperatorKey},
		{"unset variable", KeyRef{Env: "DSNODE_TEST_UNSET"}, ErrNoOperatorKey},
		{"empty variable", KeyRef{Env: "DSNODE_TEST_EMPTY"}, ErrNoOperatorKey},
		{"neither", KeyRef{}, ErrNoOperatorKey},
		{"both", KeyRef{Env: "DSNODE_TEST_KEY", File: filepath.Join(dir, "a")}, ErrNoOperatorKey},
		{"garbage", KeyRef{File: file("f", 0o600, "hello")}, ErrBadOperatorKey},
		{"huge", KeyRef{File: file("g", 0o600, strings.Repeat("A", 1<<16))}, ErrBadOperatorKey},
		{"directory", KeyRef{File: dir}, ErrBadOperatorKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := LoadOperatorKey(tt.ref)
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if tt.want == nil && got != k {
				t.Fatal("loaded another key")
			}
			if err != nil && strings.Contains(err.Error(), k.Encode()) {
				t.Fatalf("the error contains the key: %v", err)
			}
		})
	}
}

func TestOperatorKeyDoesNotPrint(t *testing.T) {
	k := GenerateOperatorKey()
	for _, s := range []string{
		fmt.Sprintf("%v %+v %#v %s", k, k, k, k),
		fmt.Sprintf("%v", struct{ Key OperatorKey }{k}),
		k.LogValue().String(),
	} {
		if strings.Contains(s, k.Encode()) || strings.Contains(s, fmt.Sprint(k.material)) ||
			strings.Contains(s, hex.EncodeToString(k.material[:])) {
			t.Errorf("printed: %s", s)
		}
	}
}

func mustNodeKey(t *testing.T, dir string, op OperatorKey) Sealer {
	t.Helper()
	s, err := OpenNodeKey(dir, op)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func wantOpens(t *testing.T, s Sealer, sealed []byte) {
	t.Helper()
	if _, err := s.Open(nil, sealed, nil); err != nil {
		t.Fatalf("opening what the node sealed earlier: %v", err)
	}
}

func TestNodeKeyIsMadeReadAndRewrapped(t *testing.T) {
	dir := t.TempDir()
	op, other := GenerateOperatorKey(), GenerateOperatorKey()
	sealed := mustNodeKey(t, dir, op).Seal(nil, []byte("x"), nil)

	wantOpens(t, mustNodeKey(t, dir, op), sealed)

	_, err := OpenNodeKey(dir, other)
	if !errors.Is(err, ErrWrongOperatorKey) {
		t.Fatalf("another operator key: %v", err)
	}
	if _, err := OpenNodeKey(dir, OperatorKey{}); !errors.Is(err, ErrNoOperatorKey) {
		t.Fatalf("no operator key: %v", err)
	}
	info, err := os.Stat(filepath.Join(dir, NodeKeyFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("node.key: %v, mode %v", err, info.Mode())
	}

	if err := RewrapNodeKey(dir, other, op); !errors.Is(err, ErrWrongOperatorKey) {
		t.Fatalf("rewrap from the wrong key: %v", err)
	}
	if err := RewrapNodeKey(dir, op, other); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, mustNodeKey(t, dir, other), sealed)
	if _, err := OpenNodeKey(dir, op); !errors.Is(err, ErrWrongOperatorKey) {
		t.Fatalf("the old operator key still opens it: %v", err)
	}
	if err := RewrapNodeKey(t.TempDir(), op, other); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("rewrap without a node key: %v", err)
	}
}

func TestTemporaryNodeKeyFileIsReplaced(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, NodeKeyFile+".new"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustNodeKey(t, dir, GenerateOperatorKey())
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) != 1 {
		t.Fatalf("left behind: %v %v", names, err)
	}
}

func TestNodeKeyFileHasNoPlaintextKey(t *testing.T) {
	dir := t.TempDir()
	op := GenerateOperatorKey()
	mustNodeKey(t, dir, op)
	material, err := readNodeKey(dir, op)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, NodeKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range [][]byte{material, op.material[:], []byte(op.Encode())} {
		if bytes.Contains(b, secret) {
			t.Fatal("node.key contains a key as plaintext")
		}
	}
}

func TestDamagedNodeKeyIsNotAWrongOperatorKey(t *testing.T) {
	dir := t.TempDir()
	op := GenerateOperatorKey()
	mustNodeKey(t, dir, op)
	path := filepath.Join(dir, NodeKeyFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := OpenNodeKey(dir, op)
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for bit := range len(good) * 8 {
		b := bytes.Clone(good)
		b[bit/8] ^= 1 << (bit % 8)
		check(fmt.Sprintf("bit %d", bit), b)
	}
	for n := range len(good) {
		check(fmt.Sprintf("first %d bytes", n), good[:n])
	}
	check("longer", append(bytes.Clone(good), 0))
}

func FuzzOpenSealed(f *testing.F) {
	s := newTestSealer(f, 1)
	f.Add([]byte{}, []byte{})
	f.Add(s.Seal(nil, []byte("hello"), []byte("place")), []byte("place"))
	f.Add(s.Seal(nil, nil, nil), []byte(nil))
	f.Fuzz(func(t *testing.T, sealed, aad []byte) {
		plain, err := s.Open(nil, sealed, aad)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrWrongKey) && !errors.Is(err, ErrNewerFormat) {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		if len(plain) != len(sealed)-Overhead {
			t.Fatalf("%d bytes of plaintext from %d", len(plain), len(sealed))
		}
	})
}

func FuzzParseNodeKey(f *testing.F) {
	dir := f.TempDir()
	if _, err := OpenNodeKey(dir, GenerateOperatorKey()); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, NodeKeyFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:20])
	f.Fuzz(func(t *testing.T, b []byte) {
		wrapped, err := parseNodeKey(b)
		if err == nil && len(wrapped) != keySize+Overhead {
			t.Fatalf("a key of %d bytes was accepted", len(wrapped))
		}
	})
}
