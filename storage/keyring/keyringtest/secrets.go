package keyringtest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/dsnode/dsnode/storage/keyring"
)

// spySealer records the plaintext of Seal, so that a test can read keys.
type spySealer struct{ seen []byte }

func (s *spySealer) Seal(dst, plaintext, _ []byte) []byte {
	s.seen = bytes.Clone(plaintext)
	return append(dst, make([]byte, len(plaintext)+keyring.Overhead)...)
}

func (s *spySealer) Open(_, _, _ []byte) ([]byte, error) { return nil, keyring.ErrDamaged }

// Secrets returns kept data keys and operator keys in all forms in which people and
// programs write keys. There must be a data key.
func Secrets(t testing.TB, kept keyring.Kept, operator ...keyring.OperatorKey) [][]byte {
	t.Helper()
	spy := &spySealer{}
	if err := keyring.WriteKept(t.TempDir(), spy, kept); err != nil {
		t.Fatal(err)
	}
	var j struct {
		Keys []struct{ Material []byte }
	}
	if err := json.Unmarshal(spy.seen, &j); err != nil || len(j.Keys) != len(kept.Keys) || len(j.Keys) == 0 {
		t.Fatalf("%d keys, %v", len(j.Keys), err)
	}
	var raw, forms [][]byte
	for _, k := range j.Keys {
		raw = append(raw, k.Material)
	}
	for _, op := range operator {
		b, err := base64.StdEncoding.DecodeString(op.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if op != (keyring.OperatorKey{}) {
			raw = append(raw, b)
		}
	}
	for _, b := range raw {
		if len(b) != 32 {
			t.Fatalf("a key of %d bytes", len(b))
		}
		forms = append(forms, b, []byte(hex.EncodeToString(b)),
			[]byte(base64.RawStdEncoding.EncodeToString(b)), []byte(base64.RawURLEncoding.EncodeToString(b)),
			[]byte(fmt.Sprint(b)), []byte(strings.ReplaceAll(strings.Trim(fmt.Sprint(b), "[]"), " ", ",")))
	}
	return forms
}

// NoneIn fails the test when b, which was read at where, contains a secret.
func NoneIn(t testing.TB, secrets [][]byte, where string, b []byte) {
	t.Helper()
	for _, s := range secrets {
		if bytes.Contains(b, s) {
			t.Errorf("%s contains a key as plaintext", where)
		}
	}
}
