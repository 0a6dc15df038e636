package agreed

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// structsOf adds t and the structs in its fields, in the order of the fields.
func structsOf(found []reflect.Type, t reflect.Type) []reflect.Type {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return structsOf(found, t.Elem())
	case reflect.Struct:
	default:
		return found
	}
	if t == reflect.TypeFor[time.Time]() || slices.Contains(found, t) {
		return found
	}
	found = append(found, t)
	for i := range t.NumField() {
		if f := t.Field(i); f.Tag.Get("json") != "-" {
			found = structsOf(found, f.Type)
		}
	}
	return found
}

// needs says which bounds a field needs.
func needs(t reflect.Type) (entries, bytes bool) {
	switch t.Kind() {
	case reflect.String:
		return false, true
	case reflect.Pointer:
		return needs(t.Elem())
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return false, true
		}
		_, bytes = needs(t.Elem())
		return true, bytes
	case reflect.Map:
		return true, true
	case reflect.Bool, reflect.Int, reflect.Int64, reflect.Uint64, reflect.Float64, reflect.Struct:
		return false, false
	default:
		panic(fmt.Sprintf("%s: the check of bounds does not know this kind", t))
	}
}

// A field without a bound lets one command fill every node's memory and make all snapshots
// fail. DESIGN.md has the bounds of the state for people.
func TestEveryFieldHasABound(t *testing.T) {
	page, err := os.ReadFile("DESIGN.md")
	if err != nil {
		t.Fatal(err)
	}
	ofState := structsOf(nil, reflect.TypeFor[State]())
	all := slices.Clone(ofState)
	for typ := range commandLevel {
		if fresh := commandData[typ]; fresh != nil {
			all = structsOf(all, reflect.TypeOf(fresh()))
		} else if typ != CmdTick {
			t.Errorf("%s is not in commandData, so its values are not checked", typ)
		}
	}
	unused := maps.Clone(bounds)
	for _, typ := range all {
		var row []string
		for i := range typ.NumField() {
			f := typ.Field(i)
			if f.Tag.Get("json") == "-" {
				continue
			}
			name := typ.Name() + "." + f.Name
			b, known := bounds[name]
			delete(unused, name)
			entries, bytes := needs(f.Type)
			if known != (entries || bytes) || entries != (b.entries > 0) || bytes != (b.bytes > 0) {
				t.Errorf("%s %s: bounds has %+v; it needs a number of entries: %v, of bytes: %v", name, f.Type, b, entries, bytes)
			}
			switch {
			case entries && bytes:
				row = append(row, fmt.Sprintf("`%s` %d × %d", f.Name, b.entries, b.bytes))
			case entries:
				row = append(row, fmt.Sprintf("`%s` %d ×", f.Name, b.entries))
			case bytes:
				row = append(row, fmt.Sprintf("`%s` %d", f.Name, b.bytes))
			}
		}
		line := fmt.Sprintf("| `%s` | %s |", typ.Name(), strings.Join(row, ", "))
		if len(row) > 0 && slices.Contains(ofState, typ) && !strings.Contains(string(page), "\n"+line+"\n") {
			t.Errorf("DESIGN.md lacks this row of the table of bounds:\n%s", line)
		}
	}
	for name := range unused {
		t.Errorf("%s has a bound and is no field", name)
	}
}

func TestProposalsAreBounded(t *testing.T) {
	long := func(n int) string { return strings.Repeat("x", n+1) }
	full := founded(t)
	for i := range maxStreams {
		j := JobStream{Origin: fmt.Sprint("gone-", i/MaxStreamsPerNode), Incarnation: incarnation(i)}
		if full.Streams == nil {
			full.Streams = map[string]JobStream{}
		}
		full.Streams[j.Key()] = j
	}
	for _, tc := range []struct {
		name string
		typ  CommandType
		data any
		want error
	}{
		{"a usual key", CmdAPIKeyPut, APIKey{ID: "1", Tenant: "团队 a", Note: "for the search"}, nil},
		{"a key with a huge note", CmdAPIKeyPut, APIKey{ID: "1", Note: long(maxNote)}, ErrOverBound},
		{"a key with a huge tenant", CmdAPIKeyPut, APIKey{ID: "1", Tenant: long(maxTenant)}, ErrOverBound},
		{"a key with a huge id", CmdAPIKeyPut, APIKey{ID: long(maxID)}, ErrOverBound},
		{"a key with many models", CmdAPIKeyPut, APIKey{ID: "1", Models: make([]string, config.MaxModels+1)}, ErrOverBound},
		{"a key with a huge model", CmdAPIKeyPut, APIKey{ID: "1", Models: []string{long(maxModelName)}}, ErrOverBound},
		{"a tenant with a line break", CmdAPIKeyPut, APIKey{ID: "1", Tenant: "a\nb"}, ErrOverBound},
		{"a tenant with an escape sequence", CmdAPIKeyPut, APIKey{ID: "1", Tenant: "a\x1b[2J"}, ErrOverBound},
		{"a note with a line break", CmdAPIKeyPut, APIKey{ID: "1", Tenant: "a", Note: "b\u2028c"}, ErrOverBound},
		{"a node with a huge address", CmdNodePut, NodePut{Node: Node{Name: "a-1", RPC: long(maxAddress)}}, ErrOverBound},
		{"a node with a huge version", CmdNodePut, NodePut{Node: Node{Name: "a-1", Version: long(maxID)}}, ErrOverBound},
		{"a huge author", CmdNodeRemove, NodeRemove{Name: "a-1", By: long(maxAuthor)}, ErrOverBound},
		{"a huge reason of a hold", CmdFailoverHold, FailoverHold{Held: true, Reason: long(maxReason)}, ErrOverBound},
		{"a huge reason of a promotion", CmdPromote, Promote{Site: "b", Reason: long(maxReason)}, ErrOverBound},
		{"a huge switchover", CmdSwitchover, SwitchoverSet{Next: &Switchover{ID: long(maxID)}}, ErrOverBound},
		{"a huge drill report", CmdDrillPut, DrillRecord{ID: "d", Report: make([]byte, MaxDrillReport+1)}, ErrOverBound},
		{"a drill of a huge kind", CmdDrillPut, DrillRecord{ID: "d", Kind: long(maxID)}, ErrOverBound},
		{"a huge configuration", CmdConfigSet, ConfigSet{Expect: 1, Text: long(maxConfigBytes)}, ErrOverBound},
		{"a drain of many upstreams", CmdUpstreamDrain, UpstreamDrain{Expect: 1, Configured: make([]string, config.MaxUpstreams+1)}, ErrOverBound},
		{"an own stream beyond those of all nodes", CmdStreamOpen, StreamOpen{Origin: "a-1", Incarnation: incarnation(1)}, ErrStateFull},
		{"a repeated stream", CmdStreamOpen, StreamOpen{Origin: "gone-0", Incarnation: incarnation(0)}, nil},
		{"an inherited stream beyond their bound", CmdStreamInherit, StreamInherit{Origin: "gone-x", Incarnation: incarnation(1), Owner: "a-1"}, ErrStateFull},
		{"a tick", CmdTick, nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := CheckProposal(full, command(t, tc.typ, applyTime, tc.data)); !errors.Is(err, tc.want) || tc.want == nil && err != nil {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
	if err := CheckProposal(full, Command{Type: CmdPromote, Data: json.RawMessage(`{"site":7}`)}); err == nil {
		t.Error("data of another form is accepted")
	}
}

// oversized is a state of a version without bounds: 40 keys with a note of 960 KB.
func oversized(t testing.TB) *State {
	s := founded(t)
	for i := range 40 {
		id := fmt.Sprintf("%012x", i)
		s = applied(t, s, CmdAPIKeyPut, APIKey{ID: id, Tenant: "t", Note: strings.Repeat("n", 960<<10), CreatedAt: applyTime})
	}
	return s
}

// A state that an older version has made too large is read, its cluster goes on, and it
// becomes small again when its keys are revoked.
func TestAStateThatIsTooLargeCanShrink(t *testing.T) {
	s := oversized(t)
	b, err := s.Encode()
	if err != nil || len(b) < maxBytesForConfig {
		t.Fatalf("%d bytes, %v: this test needs more than the bound", len(b), err)
	}
	if s, err = DecodeState(b); err != nil {
		t.Fatal(err)
	}
	check := func(typ CommandType, data any) error { return CheckProposal(s, command(t, typ, applyTime, data)) }
	if err := check(CmdAPIKeyPut, APIKey{ID: "new", Tenant: "t"}); !errors.Is(err, ErrStateFull) || !strings.Contains(err.Error(), "revoke API keys") {
		t.Errorf("a further key: %v, want ErrStateFull and what to do", err)
	}
	if err := check(CmdConfigSet, ConfigSet{Expect: 1, Text: "two"}); !errors.Is(err, ErrStateFull) {
		t.Errorf("a further configuration: %v, want ErrStateFull", err)
	}
	for typ, data := range map[CommandType]any{
		CmdPromote: Promote{Site: "b", ExpectEpoch: 1, Generation: 1}, CmdStreamOpen: StreamOpen{Origin: "a-1", Incarnation: incarnation(1)},
		CmdAPIKeyRevoke: APIKeyRevoke{ID: fmt.Sprintf("%012x", 0)}, CmdFeatureRaise: FeatureRaise{Level: keyCleanupLevel},
		CmdNodePut: NodePut{Node: Node{Name: "b-1", Site: "b"}, Admit: true}, CmdFailoverHold: FailoverHold{Held: true, Reason: "maintenance"},
	} {
		if err := check(typ, data); err != nil {
			t.Errorf("%s is refused: %v", typ, err)
		}
	}
	s = applied(t, s, CmdFeatureRaise, FeatureRaise{Level: keyCleanupLevel})
	for i := range 40 {
		s = applied(t, s, CmdAPIKeyRevoke, APIKeyRevoke{ID: fmt.Sprintf("%012x", i)})
	}
	if b, err = s.Encode(); err != nil || len(b) > 10<<10 {
		t.Errorf("after all keys were revoked the state has %d bytes, %v", len(b), err)
	}
	if err := check(CmdAPIKeyPut, APIKey{ID: "new", Tenant: "t"}); err != nil {
		t.Errorf("a key after that: %v", err)
	}
}

// Configurations are refused later than keys: a cluster with too many keys can be configured.
func TestKeysLeaveRoomForTheConfiguration(t *testing.T) {
	s := founded(t)
	s.History = []ConfigVersion{{Text: strings.Repeat("h", MaxBytesForKeys)}}
	if err := CheckProposal(s, command(t, CmdAPIKeyPut, applyTime, APIKey{ID: "new", Tenant: "t"})); !errors.Is(err, ErrStateFull) {
		t.Errorf("a key: %v, want ErrStateFull", err)
	}
	s.History[0].Text = s.History[0].Text[:MaxBytesForKeys/8] // else Apply drops it
	s.APIKeys = map[string]APIKey{"old": {Note: strings.Repeat("n", MaxBytesForKeys)}}
	if err := CheckProposal(s, command(t, CmdConfigSet, applyTime, ConfigSet{Expect: 1, Text: strings.Repeat("x", maxConfigBytes)})); err != nil {
		t.Errorf("a configuration: %v", err)
	}
}

// What is never refused must fit into a snapshot beside keys and configurations.
func TestTheWholeStateHasABound(t *testing.T) {
	const snapshot = 64 << 20 // storage.maxSnapshot and maxStateBytes in package cluster
	text := func(n int) string { return strings.Repeat("x", n) }
	at := time.Date(2026, 1, 2, 3, 4, 5, 123456789, time.UTC)
	numbered := func(i, n int) string { return fmt.Sprintf("%0*d", n, i) }
	confirmed := map[string]time.Time{}
	s := &State{
		Nodes: map[string]Node{}, Streams: map[string]JobStream{}, Drained: map[string]DrainedUpstream{},
		Purges: CachePurges{Count: 1 << 63, All: 1 << 63, Models: map[string]uint64{}, Keys: map[string]KeyPurge{}},
	}
	for i := range MaxNodes {
		name := numbered(i, maxName)
		s.Nodes[name] = Node{
			Name: name, Site: text(maxName), RPC: text(maxAddress), Gossip: text(maxAddress), API: text(maxAddress), Admin: text(maxAddress),
			Version: text(maxID), Feature: 1 << 30, Instance: text(maxID), StartedAt: at, JoinedAt: at, Admitted: 1 << 63,
			OperatorKey: text(maxDataKeyName), OperatorKeyPrevious: text(maxDataKeyName),
		}
		confirmed[name] = at
	}
	for i := range maxStreams {
		j := JobStream{
			Origin: numbered(i/MaxStreamsPerNode, maxName), Incarnation: incarnation(i), Site: text(maxName), Owner: text(maxName),
			Token: FenceToken{1 << 63, 1 << 63}, OpenedAt: at, Before: text(maxName), OwnedAt: at, Reason: text(maxWord),
		}
		s.Streams[j.Key()] = j
	}
	for range maxRemovals {
		s.Removed = append(s.Removed, Removal{text(maxName), text(maxName), text(maxAuthor), at, 1 << 63, at, text(maxAuthor)})
	}
	for range maxDoneStreams {
		s.DoneStreams = append(s.DoneStreams, text(maxStreamKey))
	}
	for range maxDataKeys {
		s.DataKeys = append(s.DataKeys, DataKey{text(dataKeyIDSize), DataKeySeal, make([]byte, maxWrappedKey), text(maxDataKeyName), at, text(maxDataKeyName), confirmed, at, at})
	}
	for range maxDrills {
		s.Drills = append(s.Drills, DrillRecord{text(maxID), text(maxID), text(maxName), text(maxAuthor), at, at, at, at, text(maxID), make([]byte, MaxDrillReport)})
	}
	for i := range config.MaxUpstreams {
		s.Drained[numbered(i, maxName)] = DrainedUpstream{By: text(maxAuthor), At: at}
	}
	for i := range maxPurgedModels {
		s.Purges.Models[numbered(i, maxModelName)] = 1 << 63
	}
	for i := range maxPurgedKeys {
		s.Purges.Keys[numbered(i, maxPurgeKey)] = KeyPurge{1 << 63, at}
	}
	if err := overBound(s); err != nil {
		t.Fatal(err)
	}
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("without keys and configurations at most %d KiB", len(b)>>10)
	if len(b) > 24<<20 || len(b)+maxBytesForConfig > snapshot-1<<20 {
		t.Errorf("%d bytes are always accepted, beside %d of keys and configurations; a snapshot may have %d", len(b), maxBytesForConfig, snapshot)
	}
}
