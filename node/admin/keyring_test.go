package admin

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dsnode/dsnode/cluster/agreed"
)

func (f *fakeCluster) Keyring(context.Context) (Keyring, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.keyring, f.fail
}

func (f *fakeCluster) RotateKeyring(_ context.Context, by string) (DataKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := DataKey{
		ID: "00000000000000aa", Kind: "seal", State: "pending", CreatedBy: by, CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Confirmed: []string{"me-1"}, Missing: []string{},
	}
	f.keyring.Keys, f.keyring.OperatorKey = append(f.keyring.Keys, k), ptr("op1")
	return k, f.fail
}

func (f *fakeCluster) RewrapKeyring(context.Context, string) (Keyring, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.keyring.OperatorKey == nil {
		return Keyring{}, fmt.Errorf("%w: b-1", agreed.ErrOperatorKeyMissing)
	}
	f.keyring.OperatorKey = ptr("op2")
	return f.keyring, f.fail
}

func TestKeyringPassesServerAndClient(t *testing.T) {
	f := newFake("me-1")
	c := dial(t, ClientOptions{Author: "ann@desk"}, serve(t, f, "").URL)
	if _, err := c.RewrapKeyring(t.Context(), ""); !errors.Is(err, agreed.ErrOperatorKeyMissing) {
		t.Fatalf("rewrap: %v", err)
	}
	k, err := c.RotateKeyring(t.Context(), "")
	if err != nil || k.CreatedBy != "ann@desk" || k.Records != nil {
		t.Fatalf("%+v, %v", k, err)
	}
	f.keyring.Keys[0].Records = ptr(int64(7))
	if _, err := c.RewrapKeyring(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	got, err := c.Keyring(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(f.keyring, got); diff != "" {
		t.Error(diff)
	}
}
