package keyring

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func TestKeptKeysRoundTrip(t *testing.T) {
	dir, s := t.TempDir(), newTestSealer(t, 1)
	got, err := ReadKept(dir, s)
	if err != nil || !reflect.DeepEqual(got, Kept{}) {
		t.Fatalf("without a file: %+v, %v", got, err)
	}
	seal := NewDataKey(KindSeal)
	for _, want := range []Kept{
		{ClusterID: "c1", Generation: 1, Version: 7, Current: seal.ID(), Keys: []DataKey{NewDataKey(KindMAC), seal}},
		{ClusterID: "c1", Generation: 2, Version: 3},
	} {
		if err := WriteKept(dir, s, want); err != nil {
			t.Fatal(err)
		}
		got, err := ReadKept(dir, s)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	if _, err := ReadKept(dir, newTestSealer(t, 2)); !errors.Is(err, ErrWrongKey) {
		t.Fatalf("another node's key: %v", err)
	}
	info, err := os.Stat(filepath.Join(dir, KeptFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, mode %v", err, info.Mode())
	}
}

func TestKeptKeysAreSealedAndDamageIsDetected(t *testing.T) {
	dir, s := t.TempDir(), newTestSealer(t, 1)
	k := NewDataKey(KindSeal)
	if err := WriteKept(dir, s, Kept{ClusterID: "c1", Current: k.ID(), Keys: []DataKey{k}}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, KeptFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range [][]byte{
		k.material[:], []byte(hex.EncodeToString(k.material[:])), []byte(base64.StdEncoding.EncodeToString(k.material[:])),
	} {
		if bytes.Contains(good, secret) {
			t.Fatal("the file contains a key as plaintext")
		}
	}
	for at := range good {
		b := bytes.Clone(good)
		b[at] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadKept(dir, s); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrWrongKey) && !errors.Is(err, ErrNewerFormat) {
			t.Fatalf("byte %d: %v", at, err)
		}
	}
	if err := os.WriteFile(path, make([]byte, maxKept+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadKept(dir, s); !errors.Is(err, ErrDamaged) {
		t.Fatalf("a huge file: %v", err)
	}
}

func FuzzParseKept(f *testing.F) {
	s := newTestSealer(f, 1)
	sealed := func(text string) []byte {
		return s.Seal(append([]byte(keptMagic), keptFormat), []byte(text), []byte(keptMagic))
	}
	f.Add([]byte(`{"keys":[{"kind":"seal","material":"AAAA"}]}`))
	f.Add([]byte(`{"current":"zz"}`))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		// The raw bytes as a file, and as the sealed content of one.
		for _, b := range [][]byte{b, sealed(string(b))} {
			k, err := parseKept(b, s)
			if err != nil && len(k.Keys) > 0 {
				t.Fatal("both keys and an error were returned")
			}
		}
	})
}
