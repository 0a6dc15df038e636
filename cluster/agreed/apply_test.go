package agreed

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var applyTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func command(t testing.TB, typ CommandType, at time.Time, data any) Command {
	t.Helper()
	c, err := NewCommand(typ, at, data)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// founded is a state with a primary site and one node.
func founded(t testing.TB) *State {
	t.Helper()
	s, err := Apply(&State{}, command(t, CmdInit, applyTime, Init{
		ClusterID: "c1", Name: "dev", Generation: Generation{Number: 1, ID: "g1"},
		Node:   Node{Name: "a-1", Site: "a", Feature: 1, Instance: "i1"},
		Config: ConfigVersion{Text: "one", Hash: "h1", Author: "me"},
	}))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestApplyRefuses(t *testing.T) {
	switching := func(s *State) *State {
		next, err := Apply(s, command(t, CmdSwitchover, applyTime, SwitchoverSet{
			Next: &Switchover{ID: "w1", From: "a", To: "b", Deadline: applyTime.Add(time.Minute)},
		}))
		if err != nil {
			t.Fatal(err)
		}
		return next
	}
	same := func(s *State) *State { return s }
	for _, tc := range []struct {
		name  string
		given func(*State) *State
		typ   CommandType
		at    time.Duration
		data  any
		want  error
	}{
		{"a second founding", same, CmdInit, 0, Init{}, ErrAlreadyFounded},
		{"configuration of another version", same, CmdConfigSet, 0, ConfigSet{Expect: 7}, ErrVersionConflict},
		{"a huge configuration", same, CmdConfigSet, 0, ConfigSet{Expect: 1, Text: strings.Repeat("x", maxConfigBytes+1)}, ErrStateFull},
		{"removing an unknown node", same, CmdNodeRemove, 0, NodeRemove{Name: "z"}, ErrUnknownNode},
		{"revoking an unknown key", same, CmdAPIKeyRevoke, 0, APIKeyRevoke{ID: "z"}, ErrUnknownKey},
		{"promotion with an old epoch", same, CmdPromote, 0, Promote{Site: "b", ExpectEpoch: 0, Generation: 1}, ErrStaleEpoch},
		{"promotion decided in another term", same, CmdPromote, 0, Promote{Site: "b", ExpectEpoch: 1, Generation: 1, Kind: FailoverUnplanned, Term: 3}, ErrStaleTerm},
		{"promotion of another generation", same, CmdPromote, 0, Promote{Site: "b", ExpectEpoch: 1, Generation: 2}, ErrStaleEpoch},
		{"planned promotion without its switchover", same, CmdPromote, 0, Promote{Site: "b", ExpectEpoch: 1, Generation: 1, Kind: FailoverPlanned, SwitchoverID: "w1"}, ErrNoSwitchover},
		{"planned promotion after its deadline", switching, CmdPromote, 2 * time.Minute, Promote{Site: "b", ExpectEpoch: 1, Generation: 1, Kind: FailoverPlanned, SwitchoverID: "w1"}, ErrNoSwitchover},
		{"planned promotion of a third site during a switchover", switching, CmdPromote, 0, Promote{Site: "c", ExpectEpoch: 1, Generation: 1, Kind: FailoverPlanned}, ErrSwitchover},
		{"a second switchover", switching, CmdSwitchover, 0, SwitchoverSet{Next: &Switchover{ID: "w2", From: "a"}}, ErrSwitchover},
		{"a switchover from another site", same, CmdSwitchover, 0, SwitchoverSet{Next: &Switchover{ID: "w2", From: "b"}}, ErrStaleEpoch},
		{"ending an unknown switchover", same, CmdSwitchover, 0, SwitchoverSet{Expect: "w1"}, ErrNoSwitchover},
		{"acknowledging an unknown failover", same, CmdFailoverAck, 0, FailoverAck{Epoch: 1}, ErrStaleEpoch},
		{"a measurement of an earlier failover", same, CmdFailoverMeasured, 0, FailoverMeasured{Epoch: 1, RTOSeconds: 1}, ErrStaleEpoch},
		{"a huge drill report", same, CmdDrillPut, 0, DrillRecord{ID: "d", Report: make([]byte, maxDrillReport+1)}, ErrStateFull},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := tc.given(founded(t))
			got, err := Apply(s, command(t, tc.typ, applyTime.Add(tc.at), tc.data))
			if !errors.Is(err, tc.want) {
				t.Fatalf("error %v, want %v", err, tc.want)
			}
			if got != s {
				t.Error("a refused command changed the state")
			}
		})
	}
}

// A promotion's record has what may be lost, and later how long no site acted.
func TestTheRecordOfAFailover(t *testing.T) {
	records, rpo, rto := int64(7), 2.5, 3.0
	s, err := Apply(founded(t), command(t, CmdPromote, applyTime, Promote{
		Site: "b", ExpectEpoch: 1, Generation: 1, Kind: FailoverUnplanned, RTOSeconds: &rto, RPOSeconds: &rpo, RecordsAtRisk: &records,
	}))
	if err != nil {
		t.Fatal(err)
	}
	measured, err := Apply(s, command(t, CmdFailoverMeasured, applyTime, FailoverMeasured{Epoch: 2, RTOSeconds: 4.5}))
	if err != nil {
		t.Fatal(err)
	}
	f := measured.LastFailover
	if *f.RTOSeconds != 4.5 || *f.RPOSeconds != 2.5 || *f.RecordsAtRisk != 7 || f.Epoch != 2 || f.Acknowledged {
		t.Errorf("record %+v", f)
	}
	if *s.LastFailover.RTOSeconds != 3 {
		t.Error("the state before was changed")
	}
	for typ, level := range map[CommandType]int{CmdPromote: 1, CmdFailoverMeasured: LossLevel} {
		if typ.Level() != level {
			t.Errorf("%s needs level %d", typ, typ.Level())
		}
	}
}

// Only one drill runs at a time, and one that has ended can't run again.
func TestOneDrillAtATime(t *testing.T) {
	s := founded(t)
	put := func(at time.Duration, d DrillRecord) error {
		next, err := Apply(s, command(t, CmdDrillPut, applyTime.Add(at), d))
		s = next
		return err
	}
	first := DrillRecord{ID: "d1", Kind: "isolation", Site: "a", Deadline: applyTime.Add(time.Minute), AbandonedAt: applyTime.Add(2 * time.Minute)}
	second := first
	second.ID = "d2"
	if err := put(0, first); err != nil {
		t.Fatal(err)
	}
	for _, at := range []time.Duration{time.Second, 90 * time.Second} { // before and after its Deadline
		if err := put(at, second); !errors.Is(err, ErrDrillRunning) {
			t.Errorf("a second drill after %s: %v", at, err)
		}
	}
	ended := first
	ended.Verdict = "aborted"
	if err := put(time.Second, ended); err != nil {
		t.Fatal(err)
	}
	if err := put(time.Second, first); !errors.Is(err, ErrDrillEnded) {
		t.Errorf("running a drill that has ended: %v, want ErrDrillEnded", err)
	}
	ended.Report = []byte("more") // the runner adds its report to an aborted drill
	if err := put(time.Second, ended); err != nil || string(s.Drills[0].Report) != "more" {
		t.Errorf("adding a report to an ended drill: %v, report %q", err, s.Drills[0].Report)
	}
	if err := put(time.Second, second); err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
	third := second
	third.ID = "d3"
	if err := put(2*time.Minute, third); err != nil {
		t.Errorf("after the second was abandoned: %v", err)
	}
}

func TestApplyNeedsAFoundedCluster(t *testing.T) {
	for typ := range commandLevel {
		if typ == CmdInit || typ == CmdTick {
			continue
		}
		if _, err := Apply(&State{}, Command{Format: 1, Type: typ, Data: []byte("{}")}); !errors.Is(err, ErrNotFounded) {
			t.Errorf("%s: %v, want ErrNotFounded", typ, err)
		}
	}
}

func TestDecodeReturnsErrUnknownCommand(t *testing.T) {
	for _, text := range []string{`{"f":1,"t":"from_the_future"}`, `{"f":2,"t":"tick"}`} {
		if _, err := DecodeCommand([]byte(text)); !errors.Is(err, ErrUnknownCommand) {
			t.Errorf("%s: %v, want ErrUnknownCommand", text, err)
		}
	}
	if _, err := DecodeState([]byte(`{"format":99}`)); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("state of format 99: %v, want ErrUnknownCommand", err)
	}
}

func TestConfigHistoryIsBounded(t *testing.T) {
	s := founded(t)
	for i := range 3 * maxHistory {
		var err error
		s, err = Apply(s, command(t, CmdConfigSet, applyTime, ConfigSet{
			Expect: s.Config.Version, Text: strings.Repeat("x", 200<<10), Hash: fmt.Sprint(i), Author: "me",
		}))
		if err != nil {
			t.Fatal(err)
		}
	}
	size := 0
	for i, v := range s.History {
		size += len(v.Text)
		if want := s.Config.Version - uint64(len(s.History)-i); v.Version != want {
			t.Errorf("history[%d] is version %d, want %d", i, v.Version, want)
		}
	}
	if len(s.History) == 0 || len(s.History) > maxHistory || size > maxHistoryBytes {
		t.Errorf("history of %d versions and %d bytes, bounds are %d and %d", len(s.History), size, maxHistory, maxHistoryBytes)
	}
}

func TestPlannedPromotion(t *testing.T) {
	s := founded(t)
	for _, c := range []Command{
		command(t, CmdSwitchover, applyTime, SwitchoverSet{Next: &Switchover{ID: "w1", From: "a", To: "b", Deadline: applyTime.Add(time.Minute)}}),
		command(t, CmdPromote, applyTime.Add(time.Second), Promote{Site: "b", ExpectEpoch: 1, Generation: 1, Kind: FailoverPlanned, SwitchoverID: "w1", Reason: "planned"}),
	} {
		var err error
		if s, err = Apply(s, c); err != nil {
			t.Fatal(err)
		}
	}
	want := Primary{Site: "b", Epoch: 2, Since: applyTime.Add(time.Second), Reason: "planned"}
	if diff := cmp.Diff(want, s.Primary); diff != "" {
		t.Errorf("primary (-want +got):\n%s", diff)
	}
	if s.Switchover != nil || s.LastFailover == nil || !s.LastFailover.Acknowledged || s.LastFailover.From != "a" {
		t.Errorf("after the promotion: switchover %v, last failover %+v", s.Switchover, s.LastFailover)
	}
}

// For any commands in any order: epochs only rise, by one, the input state is never
// changed, and the same commands give the same state.
func TestApplyProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sites := rapid.SampledFrom([]string{"a", "b", "c"})
		s, twin := &State{}, &State{}
		for i := range rapid.IntRange(1, 40).Draw(t, "commands") {
			at := applyTime.Add(time.Duration(i) * time.Second)
			typ := rapid.SampledFrom([]CommandType{CmdInit, CmdNodePut, CmdNodeRemove, CmdConfigSet, CmdAPIKeyPut, CmdAPIKeyRevoke, CmdPromote, CmdSwitchover, CmdFailoverAck, CmdFailoverHold, CmdDrillPut, CmdFeatureRaise}).Draw(t, "type")
			var data any
			name := sites.Draw(t, "name")
			switch typ {
			case CmdInit:
				data = Init{ClusterID: "c", Node: Node{Name: name, Site: name}, Generation: Generation{Number: 1}}
			case CmdNodePut:
				data = Node{Name: name, Site: name, Feature: 1}
			case CmdNodeRemove:
				data = NodeRemove{Name: name}
			case CmdConfigSet:
				data = ConfigSet{Expect: uint64(rapid.IntRange(0, 5).Draw(t, "expect")), Text: name}
			case CmdAPIKeyPut:
				data = APIKey{ID: name}
			case CmdAPIKeyRevoke:
				data = APIKeyRevoke{ID: name}
			case CmdPromote:
				data = Promote{Site: name, ExpectEpoch: uint64(rapid.IntRange(0, 5).Draw(t, "epoch")), Generation: 1, Kind: FailoverUnplanned}
			case CmdSwitchover:
				data = SwitchoverSet{Next: &Switchover{ID: name, From: sites.Draw(t, "from"), To: name, Deadline: at.Add(3 * time.Second)}}
			case CmdFailoverAck:
				data = FailoverAck{Epoch: uint64(rapid.IntRange(0, 5).Draw(t, "ack"))}
			case CmdFailoverHold:
				data = FailoverHold{Held: rapid.Bool().Draw(t, "held")}
			case CmdDrillPut:
				data = DrillRecord{ID: name}
			case CmdFeatureRaise:
				data = FeatureRaise{Level: rapid.IntRange(1, MaxFeatureLevel+1).Draw(t, "level")}
			}
			raw, err := json.Marshal(data)
			if err != nil {
				t.Fatal(err)
			}
			c := Command{Format: commandFormat, Type: typ, At: at, Data: raw}
			before, err := s.Encode()
			if err != nil {
				t.Fatal(err)
			}
			next, err := Apply(s, c)
			after, encErr := s.Encode()
			if encErr != nil || string(before) != string(after) {
				t.Fatalf("%s changed the state it was given", typ)
			}
			if err == nil && next.Primary.Epoch != s.Primary.Epoch && next.Primary.Epoch != s.Primary.Epoch+1 {
				t.Fatalf("%s took the epoch from %d to %d", typ, s.Primary.Epoch, next.Primary.Epoch)
			}
			if err != nil && next != s {
				t.Fatalf("%s was refused (%v) and changed the state", typ, err)
			}
			// The twin is encoded and decoded before each command, as in a snapshot.
			b, err := twin.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if twin, err = DecodeState(b); err != nil {
				t.Fatal(err)
			}
			twin, _ = Apply(twin, c) // a refusal leaves it unchanged, as it does s
			s = next
			x, err := s.Encode()
			if err != nil {
				t.Fatal(err)
			}
			y, err := twin.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if string(x) != string(y) {
				t.Fatalf("after %s the state of a restored node differs:\n%s\n%s", typ, x, y)
			}
		}
	})
}

// The level only rises. Builds of a lower level refuse the snapshots, and this
// build refuses to follow a cluster to a level that it does not know.
func TestFeatureLevels(t *testing.T) {
	s := founded(t)
	for _, step := range []struct{ raise, level, format int }{{1, 1, 1}, {2, 2, 2}, {1, 2, 2}, {3, 3, 3}, {2, 3, 3}} {
		s = applied(t, s, CmdFeatureRaise, FeatureRaise{Level: step.raise})
		if s.FeatureLevel != step.level || s.Format != step.format {
			t.Fatalf("after raising to %d: level %d in format %d, want %d in %d", step.raise, s.FeatureLevel, s.Format, step.level, step.format)
		}
	}
	c, err := NewCommand(CmdFeatureRaise, applyTime, FeatureRaise{Level: MaxFeatureLevel + 1})
	if err != nil {
		t.Fatal(err)
	}
	if next, err := Apply(s, c); !errors.Is(err, ErrUnknownCommand) || next != s {
		t.Errorf("raised to an unknown level: %v, want ErrUnknownCommand", err)
	}
	later := *s
	later.FeatureLevel++
	b, err := later.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeState(b); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("read a snapshot of an unknown level: %v, want ErrUnknownCommand", err)
	}
}

func FuzzDecodeCommand(f *testing.F) {
	f.Add([]byte(`{"f":1,"t":"tick","at":"2026-01-01T00:00:00Z"}`))
	f.Add([]byte(`{"f":1,"t":"promote","d":{"site":"b","expect_epoch":1}}`))
	f.Add([]byte(`{"f":1,"t":"config_set","d":{"expect":1,"text":"x"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := DecodeCommand(b)
		if err != nil {
			return
		}
		s := founded(t)
		if next, err := Apply(s, c); err != nil && next != s {
			t.Fatalf("refused with %v, but changed the state", err)
		}
	})
}

func FuzzDecodeState(f *testing.F) {
	b, err := founded(f).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := DecodeState(b); err == nil {
			if _, err := s.Encode(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
