package main

import (
	"context"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
)

// fakeKeyring is the scripts' keyring. A rotated key becomes active at the second request
// for it, unless a site is away.
type fakeKeyring struct {
	rotated bool
	looks   int
	wrapped string
}

func (f *fakeCluster) Keyring(context.Context) (admin.Keyring, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state == "outside" {
		return admin.Keyring{}, cluster.ErrNotMember
	}
	return f.describeKeyring(), nil
}

func (f *fakeCluster) describeKeyring() admin.Keyring {
	op := f.keyring.wrapped
	if op == "" {
		op = "1111111111111111"
	}
	all := []string{"beijing-1", "shanghai-a-1", "shanghai-b-1"}
	k := admin.Keyring{OperatorKey: &op, Keys: []admin.DataKey{
		{ID: "00000000000000dd", Kind: "mac", State: "active", CreatedAt: fakeStart, CreatedBy: "dsnode", ActiveAt: &fakeStart, Confirmed: all, Missing: []string{}},
		{
			ID: "00000000000000aa", Kind: "seal", State: "active", CreatedAt: fakeStart, CreatedBy: "dsnode",
			ActiveAt: &fakeStart, Confirmed: all, Missing: []string{}, Records: ptr(int64(1234)),
		},
	}}
	for _, name := range all {
		n := admin.KeyringNode{Name: name, Site: name[:len(name)-2], OperatorKey: ptr("1111111111111111")}
		if f.keyring.wrapped != "" {
			n.OperatorKey, n.OperatorKeyPrevious = &op, ptr("1111111111111111")
		}
		k.Nodes = append(k.Nodes, n)
	}
	if f.state == "degraded" {
		k.Keys[1].Records = nil
	}
	if !f.keyring.rotated {
		return k
	}
	next := k.Keys[1]
	next.ID, next.CreatedBy, next.Records = "00000000000000bb", "ann@desk", ptr(int64(0))
	f.keyring.looks++
	if f.state == "degraded" || f.keyring.looks < 2 {
		next.State, next.ActiveAt = "pending", nil
		next.Confirmed, next.Missing = all[1:], all[:1]
	} else {
		k.Keys[1].State, k.Keys[1].RetiredAt = "retired", ptr(fakeStart.Add(time.Hour))
	}
	k.Keys = append(k.Keys, next)
	return k
}

func (f *fakeCluster) RotateKeyring(context.Context, string) (admin.DataKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.change(); err != nil {
		return admin.DataKey{}, err
	}
	f.keyring.rotated, f.keyring.looks = true, 0
	k := f.describeKeyring()
	f.keyring.looks = 0
	return k.Keys[2], nil
}

func (f *fakeCluster) RewrapKeyring(context.Context, string) (admin.Keyring, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state == "degraded" {
		return admin.Keyring{}, fmt.Errorf("%w: 2222222222222222, which node shanghai-a-1 has, is not that of beijing-1", agreed.ErrOperatorKeyMissing)
	}
	f.keyring.wrapped = "2222222222222222"
	return f.describeKeyring(), nil
}
