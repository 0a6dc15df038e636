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

// rapidOrTest is what both kinds of test can do.
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

// keyed is a cluster of a-1 and b-1 whose keys keyA and keyM are in use.
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
		words string
	}{
		{"a short id", same, CmdDataKeyAdd, add("aa", DataKeySeal), ErrDataKeyRefused, ""},
		{"an id in capitals", same, CmdDataKeyAdd, add(strings.ToUpper(keyB), DataKeySeal), ErrDataKeyRefused, ""},
		{"an id that is there", same, CmdDataKeyAdd, add(keyA, DataKeySeal), ErrDataKeyRefused, "there already"},
		{"an unknown kind", same, CmdDataKeyAdd, add(keyB, "sign"), ErrDataKeyRefused, "sign"},
		{"a second MAC key", same, CmdDataKeyAdd, add(keyB, DataKeyMAC), ErrDataKeyRefused, "one MAC key"},
		{"a huge key", same, CmdDataKeyAdd, huge, ErrDataKeyRefused, ""},
		{"a key under another operator key", same, CmdDataKeyAdd, foreign, ErrOperatorKey, "op2"},
		{"a second pending key", pending, CmdDataKeyAdd, add("00000000000000cc", DataKeySeal), ErrDataKeyPending, keyB},
		{"a confirmation of a stranger", pending, CmdDataKeyConfirm, DataKeyConfirm{Node: "z", IDs: []string{keyB}, OperatorKey: "op1"}, ErrUnknownNode, ""},
		{"a confirmation of nothing", pending, CmdDataKeyConfirm, DataKeyConfirm{Node: "a-1", IDs: []string{"x"}, OperatorKey: "op1"}, ErrUnknownDataKey, ""},
		{"a confirmation under another operator key", pending, CmdDataKeyConfirm, DataKeyConfirm{Node: "a-1", IDs: []string{keyB}, OperatorKey: "op2"}, ErrDataKeysChanged, ""},
		{"use before confirmation", pending, CmdDataKeyActivate, DataKeyActivate{ID: keyB}, ErrDataKeyUnconfirmed, "a-1, b-1"},
		{"use of nothing", same, CmdDataKeyActivate, DataKeyActivate{ID: keyB}, ErrUnknownDataKey, ""},
		{"the end of the active key", same, CmdDataKeyDrop, DataKeyDrop{ID: keyA, Free: []string{"a-1", "b-1"}}, ErrDataKeyInUse, "active"},
		{"the end of the MAC key", same, CmdDataKeyDrop, DataKeyDrop{ID: keyM, Free: []string{"a-1", "b-1"}}, ErrDataKeyInUse, "active"},
		{"the end of a pending key", pending, CmdDataKeyDrop, DataKeyDrop{ID: keyB, Free: []string{"a-1", "b-1"}}, ErrDataKeyInUse, "pending"},
		{"the end of a key that may be carried", rotated, CmdDataKeyDrop, DataKeyDrop{ID: keyA, Free: []string{"a-1"}}, ErrDataKeyInUse, "b-1"},
		{"a rewrap that some can't open", same, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: {1}, keyM: {1}}}, ErrOperatorKeyMissing, "a-1, b-1"},
		{"a rewrap without a name", newOperatorKey, CmdDataKeyRewrap, DataKeyRewrap{Wrapped: map[string][]byte{keyA: {1}, keyM: {1}}}, ErrOperatorKey, ""},
		{"a rewrap of some", newOperatorKey, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: {1}}}, ErrDataKeysChanged, ""},
		{"a rewrap of others", newOperatorKey, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: {1}, keyB: {1}}}, ErrDataKeysChanged, keyM},
		{"a rewrap into nothing", newOperatorKey, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: {1}, keyM: nil}}, ErrDataKeysChanged, keyM},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := tc.given(keyed(t, founded(t)))
			got, err := Apply(s, command(t, tc.typ, applyTime, tc.data))
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.words) {
				t.Fatalf("error %v, want %v with %q", err, tc.want, tc.words)
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
		t.Fatalf("one more: %v", err)
	}
}

func TestDataKeyLife(t *testing.T) {
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
	// b-1 goes for good: nobody waits for it any more. Whoever takes its name has
	// confirmed nothing.
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
		t.Fatal("not dropped")
	}
	if back.DataKeysVersion <= gone.DataKeysVersion {
		t.Fatal("the version did not rise")
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

func TestRewrapKeepsKeysInUse(t *testing.T) {
	s := keyed(t, founded(t))
	s = applied(t, s, CmdNodePut, memberWith("a-1", "op2"))
	if diff := cmp.Diff([]string{"b-1"}, s.LackOperatorKey("op2")); diff != "" {
		t.Fatal(diff)
	}
	s = applied(t, s, CmdNodePut, memberWith("b-1", "op2"))
	s = applied(t, s, CmdDataKeyRewrap, DataKeyRewrap{OperatorKey: "op2", Wrapped: map[string][]byte{keyA: []byte("a2"), keyM: []byte("m2")}})
	if s.OperatorKey() != "op2" {
		t.Fatal(s.OperatorKey())
	}
	for _, k := range s.DataKeys {
		if k.State() != DataKeyActive || len(k.Confirmed) != 0 || !bytes.HasSuffix(k.Wrapped, []byte("2")) {
			t.Errorf("%+v", k)
		}
	}
}

func TestNodesThatCanOpenNothingDoNotJoin(t *testing.T) {
	s := keyed(t, founded(t))
	for _, tc := range []struct {
		name, current, previous string
		want                    error
	}{
		{"the operator key", "op1", "", nil},
		{"the operator key as the one before", "op2", "op1", nil},
		{"another", "op2", "", ErrOperatorKey},
		{"two others", "op2", "op3", ErrOperatorKey},
		{"it does not say", "", "", nil},
	} {
		err := s.MayOpen(Node{Name: "c-1", OperatorKey: tc.current, OperatorKeyPrevious: tc.previous})
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	if err := founded(t).MayOpen(Node{Name: "c-1", OperatorKey: "op2"}); err != nil {
		t.Errorf("before there are keys: %v", err)
	}
}

// Whatever order commands come in: nothing is sealed with a key before every
// member has opened it, no key goes while a member may carry it, there is one
// sealing key once there was one, and all are under one operator key.
func TestDataKeysUnderAnyOrder(t *testing.T) {
	start := founded(t)
	rapid.Check(t, func(t *rapid.T) {
		s := applied(t, start, CmdNodePut, memberWith("a-1", "op1"))
		nodes := []string{"a-1", "b-1", "c-1"}
		ids := []string{keyA, keyB, "00000000000000cc", keyM}
		// What the nodes hold: records by key and node. A node seals with the key
		// that its state says.
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
			case 6: // every node says truly what it carries
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
			case 8: // a node seals, or seals anew
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
			if typ == CmdNodeRemove { // its disk goes with it
				for _, by := range carries {
					delete(by, node)
				}
			}
			active := 0
			for _, k := range s.DataKeys {
				if k.OperatorKey != s.OperatorKey() || string(k.Wrapped) != k.OperatorKey {
					t.Fatalf("%s is under operator key %s", k.ID, k.OperatorKey)
				}
				old, was := before.DataKey(k.ID)
				if k.State() == DataKeyActive && k.Kind == DataKeySeal {
					active++
				}
				if was && old.State() == DataKeyPending && k.State() == DataKeyActive && len(before.Unconfirmed(old)) > 0 {
					t.Fatalf("%s is used, and %v have not opened it", k.ID, before.Unconfirmed(old))
				}
			}
			sealing = sealing || active > 0
			if active > 1 || sealing && active == 0 {
				t.Fatalf("%d active sealing keys after %s", active, typ)
			}
			for id, by := range carries {
				if _, there := s.DataKey(id); !there && len(by) > 0 {
					t.Fatalf("%s is gone, and %v carry it", id, by)
				}
			}
			if slices.ContainsFunc(before.DataKeys, func(k DataKey) bool { return k.Kind == DataKeyMAC }) &&
				!slices.ContainsFunc(s.DataKeys, func(k DataKey) bool { return k.ID == keyM }) {
				t.Fatal("the MAC key is gone")
			}
		}
	})
}
