package agreed

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"
)

func testKey(seed byte) ed25519.PrivateKey {
	b := make([]byte, ed25519.SeedSize)
	b[0] = seed
	return ed25519.NewKeyFromSeed(b)
}

func public(k ed25519.PrivateKey) []byte { return k.Public().(ed25519.PublicKey) }

func signed(k ed25519.PrivateKey, h Holder, index uint64) *Ticket {
	return &Ticket{Index: index, Signature: ed25519.Sign(k, h.Text(index))}
}

// A ticket proves one admission of one node, to one cluster and generation.
func TestWhoseTicketMakesAMember(t *testing.T) {
	key := testKey(1)
	b2 := Holder{ClusterID: "c", Generation: Generation{Number: 3, ID: "g"}, Node: "b-2", Site: "b"}
	s := &State{
		ClusterID: "c", Generation: Generation{Number: 3, ID: "g"}, ClusterKey: &ClusterKey{Public: public(key)},
		Nodes: map[string]Node{"a-1": {Site: "a"}}, RemovedBefore: 55,
	}
	at := s.Standing(50)
	longer := signed(key, b2, 60)
	longer.Index = 61
	for _, tc := range []struct {
		what       string
		node, site string
		ticket     *Ticket
		member     bool
	}{
		{"a member", "a-1", "a", nil, true},
		{"a member's name at another site", "a-1", "b", nil, false},
		{"no ticket", "b-2", "b", nil, false},
		{"admitted after this state", "b-2", "b", signed(key, b2, 56), true},
		{"removed by this state, of which a snapshot was just restored", "b-2", "b", signed(key, b2, 51), false},
		{"admitted when this state was, and gone", "b-2", "b", signed(key, b2, 50), false},
		{"admitted before, and gone", "b-2", "b", signed(key, b2, 7), false},
		{"the ticket of another node", "b-3", "b", signed(key, b2, 60), false},
		{"for another site", "b-2", "a", signed(key, b2, 60), false},
		{"with another index", "b-2", "b", longer, false},
		{"signed by another key", "b-2", "b", signed(testKey(2), b2, 60), false},
		{"of another cluster", "b-2", "b", signed(key, Holder{ClusterID: "d", Generation: b2.Generation, Node: "b-2", Site: "b"}, 60), false},
		{"of an earlier generation", "b-2", "b", signed(key, Holder{ClusterID: "c", Generation: Generation{Number: 2, ID: "g"}, Node: "b-2", Site: "b"}, 60), false},
		{"of a fork", "b-2", "b", signed(key, Holder{ClusterID: "c", Generation: Generation{Number: 3, ID: "f"}, Node: "b-2", Site: "b"}, 60), false},
		{"without a signature", "b-2", "b", &Ticket{Index: 60}, false},
	} {
		if got := at.Member(tc.node, tc.site, tc.ticket); got != tc.member {
			t.Errorf("%s: member %v, want %v", tc.what, got, tc.member)
		}
	}
	at.PublicKey = nil
	if at.Member("b-2", "b", signed(key, b2, 60)) {
		t.Error("a ticket counts without the cluster's key")
	}
	if string((Holder{Node: "ab", Site: "c"}).Text(1)) == string((Holder{Node: "a", Site: "bc"}).Text(1)) {
		t.Error("two holders have the same text")
	}
}

func TestWhoMayJoin(t *testing.T) {
	h := newRemovalHistory(t, MembershipLevel)
	admit := func(name, site string) {
		h.must(CmdNodePut, NodePut{Node: Node{Name: name, Site: site, Feature: MembershipLevel}, Admit: true})
	}
	admit("b-1", "b")
	for _, gone := range []string{"gone-1", "back-1"} {
		admit(gone, "b")
		h.must(CmdNodeRemove, NodeRemove{Name: gone})
	}
	h.must(CmdNodeAdmit, NodeAdmit{Name: "back-1", By: "ops"})
	h.must(CmdNodeWait, NodeWait{Name: "waits-1", Site: "b"})
	h.must(CmdNodeWait, NodeWait{Name: "let-in-1", Site: "b"})
	h.must(CmdNodeAdmit, NodeAdmit{Name: "let-in-1", By: "ops"})
	for _, tc := range []struct {
		node, site    string
		open, approve Admission
	}{
		{"new-1", "b", Admit, Wait},
		{"b-1", "b", Admit, Admit}, // it lost its disk
		{"waits-1", "b", Admit, Wait},
		{"let-in-1", "b", Admit, Admit},
		{"let-in-1", "a", Admit, Wait}, // another certificate than the operator saw
		{"gone-1", "b", RefusedRemoved, RefusedRemoved},
		{"back-1", "b", Admit, Admit},
		{"back-1", "a", RefusedRemoved, RefusedRemoved},
	} {
		s := h.now()
		if open, approve := s.MayJoin(tc.node, tc.site, false), s.MayJoin(tc.node, tc.site, true); open != tc.open || approve != tc.approve {
			t.Errorf("%s of %s: open %d, approve %d, want %d, %d", tc.node, tc.site, open, approve, tc.open, tc.approve)
		}
		below := *s
		below.FeatureLevel = MembershipLevel - 1
		if below.MayJoin(tc.node, tc.site, true) != Admit {
			t.Errorf("%s of %s may not join below level %d", tc.node, tc.site, MembershipLevel)
		}
	}
}

func TestNodesThatWait(t *testing.T) {
	h := newRemovalHistory(t, MembershipLevel)
	first := h.must(CmdNodeWait, NodeWait{Name: "b-1", Site: "b", RPC: "b:1", Version: "1"})
	before := h.now()
	h.must(CmdNodeWait, NodeWait{Name: "b-1", Site: "b", RPC: "b:2", Version: "1"})
	if a, waits := h.now().Applicant("b-1"); !waits || !a.At.Equal(applyTime.Add(time.Duration(first)*time.Second)) || a.RPC != before.Waiting[0].RPC {
		t.Errorf("a second request changed it to %+v", a)
	}
	h.must(CmdNodeAdmit, NodeAdmit{Name: "b-1", By: "ops"})
	if a, _ := h.now().Applicant("b-1"); a.AdmittedAt.IsZero() || a.AdmittedBy != "ops" {
		t.Errorf("admitted: %+v", a)
	}
	if !before.Waiting[0].AdmittedAt.IsZero() {
		t.Error("an earlier state changed")
	}
	h.must(CmdNodePut, NodePut{Node: Node{Name: "b-1", Site: "b"}, Admit: true})
	if _, waits := h.now().Applicant("b-1"); waits {
		t.Error("a member still waits")
	}
	if _, err := h.apply(CmdNodeWait, NodeWait{Name: "b-1", Site: "b"}); !errors.Is(err, ErrStillMember) {
		t.Errorf("a member may wait: %v", err)
	}
	h.must(CmdNodeWait, NodeWait{Name: "c-1", Site: "c"})
	h.must(CmdNodeRemove, NodeRemove{Name: "c-1"})
	if len(h.now().Waiting) != 0 || len(h.now().Removed) != 0 {
		t.Errorf("a node that waits was removed: %+v, %+v", h.now().Waiting, h.now().Removed)
	}
	if _, err := h.apply(CmdNodeWait, NodeWait{Name: "d-1", Site: string(make([]byte, maxApplicantText+1))}); !errors.Is(err, ErrStateFull) {
		t.Errorf("a long name: %v", err)
	}
	for i := range maxWaiting + 3 {
		h.must(CmdNodeWait, NodeWait{Name: fmt.Sprintf("n-%d", i), Site: "c"})
	}
	if w := h.now().Waiting; len(w) != maxWaiting || w[0].Name != "n-3" {
		t.Errorf("%d wait, the first is %s", len(w), w[0].Name)
	}
}

// A removal that comes while a node joins is not undone by the join.
func TestNoAdmissionOvertakesARemoval(t *testing.T) {
	h := newRemovalHistory(t, MembershipLevel)
	put := NodePut{Node: Node{Name: "b-1", Site: "b"}, Admit: true, Empty: true}
	h.must(CmdNodePut, put)
	h.must(CmdStreamOpen, StreamOpen{Origin: "b-1", Incarnation: incarnation(1)})
	h.must(CmdNodeRemove, NodeRemove{Name: "b-1"})
	h.must(CmdStreamDrop, StreamDrop{Owner: "b-1", Streams: []string{StreamKey("b-1", incarnation(1))}})
	if _, err := h.apply(CmdNodePut, put); !errors.Is(err, ErrUnknownNode) {
		t.Fatalf("joined after its removal: %v", err)
	}
	h.must(CmdNodeAdmit, NodeAdmit{Name: "b-1"})
	h.must(CmdNodePut, put)
	if len(h.now().DoneStreams) != 1 {
		t.Error("a node with an empty disk made dropped streams needed again")
	}
}

func TestClusterKeyIsReplacedOnlyIfExpected(t *testing.T) {
	h := newRemovalHistory(t, MembershipLevel)
	first, second := public(testKey(1)), public(testKey(2))
	h.must(CmdClusterKey, ClusterKeySet{Public: first, Sealed: []byte("x"), OperatorKey: "k1"})
	for what, d := range map[string]ClusterKeySet{
		"a second founder's": {Public: second, Sealed: []byte("x")},
		"from an old state":  {Expect: second, Public: second, Sealed: []byte("x")},
	} {
		if _, err := h.apply(CmdClusterKey, d); !errors.Is(err, ErrClusterKeyChange) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, d := range map[string]ClusterKeySet{
		"a short key":      {Expect: first, Public: second[1:], Sealed: []byte("x")},
		"nothing sealed":   {Expect: first, Public: second},
		"too large a text": {Expect: first, Public: second, Sealed: make([]byte, maxSealedKey+1)},
	} {
		if _, err := h.apply(CmdClusterKey, d); !errors.Is(err, ErrDataKeyRefused) {
			t.Errorf("%s: %v", what, err)
		}
	}
	h.must(CmdClusterKey, ClusterKeySet{Expect: first, Public: first, Sealed: []byte("y"), OperatorKey: "k2"})
	if k := h.now().ClusterKey; string(k.Sealed) != "y" || k.OperatorKey != "k2" {
		t.Errorf("sealed again: %+v", k)
	}
}

// Every command that exists has a row here, also for the case that is refused.
func TestWhoMayPropose(t *testing.T) {
	member := Proposer{Node: "b-1", Site: "b"}
	type row struct {
		typ  CommandType
		data any
		want error
	}
	rows := []row{
		{CmdInit, Init{}, ErrStaleTerm},
		{CmdNodePut, NodePut{Node: Node{Name: "b-1"}}, ErrStaleTerm},
		{CmdNodeWait, NodeWait{Name: "b-1"}, ErrStaleTerm},
		{CmdClusterKey, ClusterKeySet{}, ErrStaleTerm},
		{CmdFeatureRaise, FeatureRaise{}, ErrStaleTerm},
		{CmdStreamOwn, StreamOwn{Owner: "b-1"}, ErrStaleTerm},
		{CmdStreamOpen, StreamOpen{Origin: "b-1"}, nil},
		{CmdStreamOpen, StreamOpen{Origin: "a-1"}, ErrForeign},
		{CmdStreamInherit, StreamInherit{Origin: "gone-1", Owner: "b-1"}, nil},
		{CmdStreamInherit, StreamInherit{Origin: "gone-1", Owner: "b-2"}, ErrForeign},
		{CmdStreamDrop, StreamDrop{Owner: "b-1"}, nil},
		{CmdStreamDrop, StreamDrop{Owner: "b-2"}, ErrForeign},
		{CmdDataKeyConfirm, DataKeyConfirm{Node: "b-1"}, nil},
		{CmdDataKeyConfirm, DataKeyConfirm{Node: "a-1"}, ErrForeign},
		{CmdDataKeyActivate, DataKeyActivate{}, ErrStaleTerm},
		{CmdDataKeyDrop, DataKeyDrop{}, ErrStaleTerm},
		{CmdDataKeyAdd, DataKeyAdd{Kind: DataKeySeal}, nil},
		{CmdDataKeyAdd, DataKeyAdd{Kind: DataKeyMAC}, ErrStaleTerm},
		{CmdDataKeyRewrap, DataKeyRewrap{}, nil},
		{CmdPromote, Promote{Site: "b", Kind: FailoverPlanned, SwitchoverID: "s"}, nil},
		{CmdPromote, Promote{Site: "b", Kind: FailoverDrill, SwitchoverID: "s"}, nil},
		{CmdPromote, Promote{Site: "b", Kind: FailoverPlanned}, ErrStaleTerm},
		{CmdPromote, Promote{Site: "b", Kind: FailoverUnplanned}, ErrStaleTerm},
		{CmdPromote, Promote{Site: "b", Kind: FailoverUnplanned, SwitchoverID: "s", Term: 7}, ErrStaleTerm},
		{CmdSwitchover, SwitchoverSet{}, nil},
		{CmdFailoverAck, FailoverAck{}, nil},
		{CmdFailoverHold, FailoverHold{}, nil},
		{CmdFailoverMeasured, FailoverMeasured{}, nil},
		{CmdDrillPut, DrillRecord{Kind: "isolation", Site: "a"}, nil},
		{CmdDrillPut, DrillRecord{Kind: "isolation", Site: "b"}, ErrForeign},
		{CmdDrillPut, DrillRecord{Kind: "isolation", Site: "b", Verdict: "pass"}, nil},
		{CmdNodeRemove, NodeRemove{Name: "a-1"}, nil},
		{CmdNodeRemove, NodeRemove{Name: "b-1"}, ErrForeign},
		{CmdNodeAdmit, NodeAdmit{Name: "c-1"}, nil},
		{CmdConfigSet, ConfigSet{}, nil},
		{CmdAPIKeyPut, APIKey{}, nil},
		{CmdAPIKeyRevoke, APIKeyRevoke{}, nil},
		{CmdUpstreamDrain, UpstreamDrain{}, nil},
		{CmdCachePurge, CachePurge{}, nil},
		{CmdTick, nil, nil},
	}
	for typ := range maps.Keys(commandLevel) {
		if !slices.ContainsFunc(rows, func(r row) bool { return r.typ == typ }) {
			t.Errorf("no row for %s", typ)
		}
	}
	for _, r := range rows {
		c, err := NewCommand(r.typ, applyTime, r.data)
		if err != nil {
			t.Fatal(err)
		}
		if err := MayPropose(member, c); !errors.Is(err, r.want) || (err == nil) != (r.want == nil) {
			t.Errorf("%s %+v: %v, want %v", r.typ, r.data, err, r.want)
		}
	}
	if err := MayPropose(member, Command{Type: "later"}); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("a command of a later version: %v", err)
	}
	if err := MayPropose(member, Command{Type: CmdStreamOpen, Data: json.RawMessage(`[]`)}); err == nil {
		t.Error("a command that can't be read may be proposed")
	}
}
