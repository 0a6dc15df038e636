package agreed

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

const (
	keyA = "00000000000000aa"
	keyB = "00000000000000bb"
	keyM = "00000000000000dd"
)

// rapidOrTest is implemented by *testing.T and *rapid.T.
type rapidOrTest interface {
	Helper()
	Fatal(args ...any)
}

func applied(t rapidOrTest, s *State, typ CommandType, data any) *State {
	t.Helper()
	c, err := NewCommand(typ, applyTime, data)
	if err != nil {
		t.Fatal(err)
	}
	next, err := Apply(s, c)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

func memberWith(name, operatorKey string) Node {
	return Node{Name: name, Site: name[:1], Feature: 1, Instance: "i", OperatorKey: operatorKey}
}

// keyed is a cluster of a-1 and b-1 with the active keys keyA and keyM.
func keyed(t rapidOrTest, founded *State) *State {
	t.Helper()
	s := applied(t, founded, CmdNodePut, memberWith("a-1", "op1"))
	s = applied(t, s, CmdNodePut, memberWith("b-1", "op1"))
	for id, kind := range map[string]DataKeyKind{keyA: DataKeySeal, keyM: DataKeyMAC} {
		s = applied(t, s, CmdDataKeyAdd, DataKeyAdd{ID: id, Kind: kind, Wrapped: []byte(id), OperatorKey: "op1", By: "leader"})
		for _, n := range []string{"a-1", "b-1"} {
			s = applied(t, s, CmdDataKeyConfirm, DataKeyConfirm{Node: n, IDs: []string{id}, OperatorKey: "op1"})
		}
		s = applied(t, s, CmdDataKeyActivate, DataKeyActivate{ID: id})
	}
	return s
}

func TestDataKeysRefused(t *testing.T) {
	add := func(id string, kind DataKeyKind) DataKeyAdd {
		return DataKeyAdd{ID: id, Kind: kind, Wrapped: []byte("w"), OperatorKey: "op1", By: "me"}
	}
	same := func(s *State) *State { return s }
	pending := func(s *State) *State { return applied(t, s, CmdDataKeyAdd, add(keyB, DataKeySeal)) }
	rotated := func(s *State) *State {
		s = pending(s)
		for _, n := range []string{"a-1", "b-1"} {
			s = applied(t, s, CmdDataKeyConfirm, DataKeyConfirm{Node: n, IDs: []string{keyB}, OperatorKey: "op1"})
		}
		return applied(t, s, CmdDataKeyActivate, DataKeyActivate{ID: keyB})
	}
	newOperatorKey := func(s *State) *State {
		for _, n := range []string{"a-1", "b-1"} {
			s = applied(t, s, CmdNodePut, memberWith(n, "op2"))
		}
		return s
	}
	huge, foreign := add(keyB, DataKeySeal), add(keyB, DataKeySeal)
	huge.Wrapped, foreign.OperatorKey = make([]byte, maxWrappedKey+1), "op2"
	for _, tc := range []struct {
		name  string
		given func(*State) *State
		typ   CommandType
		data  any
		want  error
		text  string
	}{
		{"a short id", same, CmdDataKeyAdd, add("aa", DataKeySeal), ErrDataKeyRefused, ""},
		{"an id in capitals", same, CmdDataKeyAdd, add(strings.ToUpper(keyB), DataKeySeal), ErrDataKeyRefused, ""},
		{"an existing id", same, CmdDataKeyAdd, add(keyA, DataKeySeal), ErrDataKeyRefused, "already exists"},
		{"an unknown kind", same, CmdDataKeyAdd, add(keyB, "sign"), ErrDataKeyRefused, "sign"},
		{"a second MAC key", same, CmdDataKeyAdd, add(keyB, DataKeyMAC), ErrDataKeyRefused, "the MAC key already exists"},
		{"a huge key", same, CmdDataKeyAdd, huge, ErrDataKeyRefused, ""},
		{"a key under another operator key", same, CmdDataKeyAdd, foreign, ErrOperatorKey, "op2"},
		{"a second pending key", pending, CmdDataKeyAdd, add("00000000000000cc", DataKeySeal), ErrDataKeyPending, keyB},
		{"a confirmation of an unknown node", pending, CmdDataKeyConfirm, DataKeyConfirm{Node: "z", IDs: []string{keyB}, OperatorKey: "op1"}, ErrUnknownNode, ""},
		{"a confirmation of an unknown key", pending, CmdDataKeyConfirm, DataKeyConfirm{Node: "a-1", IDs: []string{"x"}, OperatorKey: "op1"}, ErrUnknownDataKey, ""},
		{"a confirmation under another operator key", pending, CmdDataKeyConfirm, DataKeyConfirm{Node: "a-1", IDs: []string{keyB}, OperatorKey: "op2"}, ErrDataKeysChanged, ""},
		{"activation before confirmation", pending, CmdDataKeyActivate, DataKeyActivate{ID: keyB}, ErrDataKeyUnconfirmed, "a-1, b-1"},
		{"activation of an unknown key", same, CmdDataKeyActivate, DataKeyActivate{ID: keyB}, ErrUnknownDataKey, ""},
		{"dropping the active key", same, CmdDataKeyDrop, DataKeyDrop{ID: keyA, Free: []string{"a-1", "b-1"}}, ErrDataKeyInUse, "active"},
		{"dropping the MAC key", same, CmdDataKeyDrop, DataKeyDrop{ID: keyM, Free: []string{"a-1", "b-1"}}, ErrDataKeyInUse, "active"},
		{"dropping a pending key", pending, CmdDataKeyDrop, DataKeyDrop{ID: keyB, Free: []string{"a-1", "b-1"}}, ErrDataKeyInUse, "pending"},
		{"dropping a key that a node may have records of", rotated, CmdDataKeyDrop, DataKeyDrop{ID: keyA, Free: []string{"a-1"}}, ErrDataKeyInUse, "b-1"},
		{"a rewrap with an operator key that nodes lack", same, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: {1}, keyM: {1}}}, ErrOperatorKeyMissing, "a-1, b-1"},
		{"a rewrap without an operator key", newOperatorKey, CmdDataKeyRewrap, DataKeyRewrap{Wrapped: map[string][]byte{keyA: {1}, keyM: {1}}}, ErrOperatorKey, ""},
		{"a rewrap of too few keys", newOperatorKey, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: {1}}}, ErrDataKeysChanged, ""},
		{"a rewrap of other keys", newOperatorKey, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: {1}, keyB: {1}}}, ErrDataKeysChanged, keyM},
		{"a rewrap with an empty wrapped key", newOperatorKey, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: {1}, keyM: nil}}, ErrDataKeysChanged, keyM},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := tc.given(keyed(t, founded(t)))
			got, err := Apply(s, command(t, tc.typ, applyTime, tc.data))
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("error %v, want %v with the text %q", err, tc.want, tc.text)
			}
			if got != s {
				t.Fatal("a refusal changed the state")
			}
		})
	}
}

func TestDataKeysAreBounded(t *testing.T) {
	s := keyed(t, founded(t))
	for i := len(s.DataKeys); i < maxDataKeys; i++ {
		id := fmt.Sprintf("%016x", i)
		s = applied(t, s, CmdDataKeyAdd, DataKeyAdd{ID: id, Kind: DataKeySeal, Wrapped: []byte("w"), OperatorKey: "op1"})
		for _, n := range []string{"a-1", "b-1"} {
			s = applied(t, s, CmdDataKeyConfirm, DataKeyConfirm{Node: n, IDs: []string{id}, OperatorKey: "op1"})
		}
		s = applied(t, s, CmdDataKeyActivate, DataKeyActivate{ID: id})
	}
	_, err := Apply(s, command(t, CmdDataKeyAdd, applyTime, DataKeyAdd{ID: keyB, Kind: DataKeySeal, Wrapped: []byte("w"), OperatorKey: "op1"}))
	if !errors.Is(err, ErrStateFull) {
		t.Fatalf("adding one key too many: %v, want ErrStateFull", err)
	}
}

func TestDataKeyLifeCycle(t *testing.T) {
	s := keyed(t, founded(t))
	later := applyTime.Add(time.Hour)
	s = applied(t, s, CmdDataKeyAdd, DataKeyAdd{ID: keyB, Kind: DataKeySeal, Wrapped: []byte("w"), OperatorKey: "op1", By: "ann"})
	before := s
	s = applied(t, s, CmdDataKeyConfirm, DataKeyConfirm{Node: "a-1", IDs: []string{keyA, keyB, "gone"}, OperatorKey: "op1"})
	if k, _ := before.DataKey(keyB); len(k.Confirmed) != 0 {
		t.Fatal("a published state was changed")
	}
	k, _ := s.DataKey(keyB)
	if diff := cmp.Diff([]string{"b-1"}, s.Unconfirmed(k)); diff != "" {
		t.Fatal(diff)
	}
	// After the removal of b-1 its confirmation is not needed. A later node with its
	// name has confirmed nothing.
	gone := applied(t, s, CmdNodeRemove, NodeRemove{Name: "b-1"})
	gone, err := Apply(gone, command(t, CmdDataKeyActivate, later, DataKeyActivate{ID: keyB}))
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]DataKeyState{keyA: DataKeyRetired, keyB: DataKeyActive, keyM: DataKeyActive} {
		if k, _ := gone.DataKey(id); k.State() != want {
			t.Errorf("%s is %s, want %s", id, k.State(), want)
		}
	}
	if k, _ := gone.DataKey(keyA); !k.RetiredAt.Equal(later) {
		t.Errorf("retired at %s", k.RetiredAt)
	}
	back := applied(t, gone, CmdNodePut, memberWith("b-1", "op1"))
	k, _ = back.DataKey(keyA)
	if diff := cmp.Diff([]string{"b-1"}, back.Unconfirmed(k)); diff != "" {
		t.Fatal(diff)
	}
	back = applied(t, back, CmdDataKeyDrop, DataKeyDrop{ID: keyA, Free: []string{"b-1", "a-1"}})
	if _, there := back.DataKey(keyA); there || len(back.DataKeys) != 2 {
		t.Fatalf("%s was not dropped: %v", keyA, back.DataKeys)
	}
	if back.DataKeysVersion <= gone.DataKeysVersion {
		t.Fatalf("DataKeysVersion is %d after %d", back.DataKeysVersion, gone.DataKeysVersion)
	}
	b, err := back.Encode()
	if err != nil {
		t.Fatal(err)
	}
	restored, err := DecodeState(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(back.DataKeys, restored.DataKeys); diff != "" || restored.DataKeysVersion != back.DataKeysVersion {
		t.Fatal(diff)
	}
}

func TestRewrapKeepsKeysActive(t *testing.T) {
	s := keyed(t, founded(t))
	s = applied(t, s, CmdNodePut, memberWith("a-1", "op2"))
	if diff := cmp.Diff([]string{"b-1"}, s.LackOperatorKey("op2")); diff != "" {
		t.Fatal(diff)
	}
	s = applied(t, s, CmdNodePut, memberWith("b-1", "op2"))
	s = applied(t, s, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: []byte("a2"), keyM: []byte("m2")}})
	if s.OperatorKey() != "op2" {
		t.Fatalf("operator key %s, want op2", s.OperatorKey())
	}
	for _, k := range s.DataKeys {
		if k.State() != DataKeyActive || len(k.Confirmed) != 0 || !bytes.HasSuffix(k.Wrapped, []byte("2")) {
			t.Errorf("after the rewrap: %+v", k)
		}
	}
}

func TestMayOpenRefusesOtherOperatorKeys(t *testing.T) {
	s := keyed(t, founded(t))
	for _, tc := range []struct {
		name, current, previous string
		want                    error
	}{
		{"the operator key", "op1", "", nil},
		{"the operator key as the previous one", "op2", "op1", nil},
		{"another key", "op2", "", ErrOperatorKey},
		{"two other keys", "op2", "op3", ErrOperatorKey},
		{"no fingerprint", "", "", nil},
	} {
		err := s.MayOpen(Node{Name: "c-1", OperatorKey: tc.current, OperatorKeyPrevious: tc.previous})
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	if err := founded(t).MayOpen(Node{Name: "c-1", OperatorKey: "op2"}); err != nil {
		t.Errorf("without data keys: %v", err)
	}
}

// For commands in any order: no key is active before every member has opened it, no
// key is dropped while a member has records sealed with it, there is one active
// sealing key once there was one, and one operator key wraps all keys.
func TestDataKeyRulesInAnyOrder(t *testing.T) {
	start := founded(t)
	rapid.Check(t, func(t *rapid.T) {
		s := applied(t, start, CmdNodePut, memberWith("a-1", "op1"))
		nodes := []string{"a-1", "b-1", "c-1"}
		ids := []string{keyA, keyB, "00000000000000cc", keyM}
		// carries says which nodes have records sealed with a key, by key and node. A
		// node seals with the active key.
		carries := map[string]map[string]bool{}
		sealing := false
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			node, id := rapid.SampledFrom(nodes).Draw(t, "node"), rapid.SampledFrom(ids).Draw(t, "id")
			op := rapid.SampledFrom([]string{"op1", "op2"}).Draw(t, "operator key")
			var typ CommandType
			var data any
			switch rapid.IntRange(0, 8).Draw(t, "what") {
			case 0:
				typ, data = CmdNodePut, memberWith(node, op)
			case 1:
				typ, data = CmdNodeRemove, NodeRemove{Name: node}
				if len(s.Nodes) == 1 {
					continue
				}
			case 2:
				kind := DataKeySeal
				if id == keyM {
					kind = DataKeyMAC
				}
				typ, data = CmdDataKeyAdd, DataKeyAdd{ID: id, Kind: kind, Wrapped: []byte(op), OperatorKey: op}
			case 3, 4:
				typ, data = CmdDataKeyConfirm, DataKeyConfirm{Node: node, IDs: []string{id, rapid.SampledFrom(ids).Draw(t, "other")}, OperatorKey: op}
			case 5:
				typ, data = CmdDataKeyActivate, DataKeyActivate{ID: id}
			case 6: // every node without such records is in Free
				free := []string{}
				for n := range s.Nodes {
					if !carries[id][n] {
						free = append(free, n)
					}
				}
				typ, data = CmdDataKeyDrop, DataKeyDrop{ID: id, Free: free}
			case 7:
				wrapped := map[string][]byte{}
				for _, k := range s.DataKeys {
					wrapped[k.ID] = []byte(op)
				}
				typ, data = CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: op, Wrapped: wrapped}
			case 8: // a node seals new records, and re-seals its old ones
				if _, member := s.Nodes[node]; !member {
					continue
				}
				for _, k := range s.DataKeys {
					if k.Kind == DataKeySeal && k.State() == DataKeyActive {
						if carries[k.ID] == nil {
							carries[k.ID] = map[string]bool{}
						}
						carries[k.ID][node] = true
					} else {
						delete(carries[k.ID], node)
					}
				}
				continue
			}
			c, err := NewCommand(typ, applyTime, data)
			if err != nil {
				t.Fatal(err)
			}
			before := s
			image, err := before.Encode()
			if err != nil {
				t.Fatal(err)
			}
			next, err := Apply(s, c)
			if again, err := before.Encode(); err != nil || !bytes.Equal(image, again) {
				t.Fatalf("%s changed a published state: %v", typ, err)
			}
			if err != nil {
				if next != before {
					t.Fatalf("a refused %s changed the state", typ)
				}
				continue
			}
			s = next
			if typ == CmdNodeRemove { // with its records
				for _, by := range carries {
					delete(by, node)
				}
			}
			active := 0
			for _, k := range s.DataKeys {
				if k.OperatorKey != s.OperatorKey() || string(k.Wrapped) != k.OperatorKey {
					t.Fatalf("%s is wrapped with operator key %s, others with %s", k.ID, k.OperatorKey, s.OperatorKey())
				}
				old, was := before.DataKey(k.ID)
				if k.State() == DataKeyActive && k.Kind == DataKeySeal {
					active++
				}
				if was && old.State() == DataKeyPending && k.State() == DataKeyActive && len(before.Unconfirmed(old)) > 0 {
					t.Fatalf("%s is active, but %v have not opened it", k.ID, before.Unconfirmed(old))
				}
			}
			sealing = sealing || active > 0
			if active > 1 || sealing && active == 0 {
				t.Fatalf("%d active sealing keys after %s", active, typ)
			}
			for id, by := range carries {
				if _, there := s.DataKey(id); !there && len(by) > 0 {
					t.Fatalf("%s was dropped, but %v have records sealed with it", id, by)
				}
			}
			if slices.ContainsFunc(before.DataKeys, func(k DataKey) bool { return k.Kind == DataKeyMAC }) &&
				!slices.ContainsFunc(s.DataKeys, func(k DataKey) bool { return k.ID == keyM }) {
				t.Fatal("the MAC key was dropped")
			}
		}
	})
}
