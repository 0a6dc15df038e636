package keyring

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestClusterKeyIsOpenedOnlyInItsPlace(t *testing.T) {
	op, other := GenerateOperatorKey(), GenerateOperatorKey()
	k := NewClusterKey()
	wrapped, err := k.Wrap(op, "c")
	if err != nil {
		t.Fatal(err)
	}
	got, err := UnwrapClusterKey(op, "c", k.Public(), wrapped)
	if err != nil {
		t.Fatal(err)
	}
	if !ed25519.Verify(k.Public(), []byte("text"), got.Sign([]byte("text"))) {
		t.Error("the opened key signs otherwise")
	}
	damaged := append([]byte{}, wrapped...)
	damaged[len(damaged)-1] ^= 1
	for what, tc := range map[string]struct {
		op      OperatorKey
		cluster string
		public  []byte
		wrapped []byte
		want    error
	}{
		"another operator key": {other, "c", k.Public(), wrapped, ErrWrongOperatorKey},
		"another cluster":      {op, "d", k.Public(), wrapped, ErrDamaged},
		"another public half":  {op, "c", NewClusterKey().Public(), wrapped, ErrDamaged},
		"damaged":              {op, "c", k.Public(), damaged, ErrDamaged},
		"no operator key":      {OperatorKey{}, "c", k.Public(), wrapped, ErrNoOperatorKey},
	} {
		if _, err := UnwrapClusterKey(tc.op, tc.cluster, tc.public, tc.wrapped); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", what, err, tc.want)
		}
	}
	if text := fmt.Sprintf("%v %+v %#v %s", k, k, k, k); strings.Contains(text, string(k.private)) || strings.Count(text, "[cluster key]") != 4 {
		t.Errorf("it prints as %s", text)
	}
}
