package agreed

import (
	"encoding/json"
	"errors"
	"fmt"
)

// ErrForeign refuses a command that a node may propose only for itself.
var ErrForeign = errors.New("a node may propose that only for itself")

// Proposer is the member that sends a command to the leader.
type Proposer struct{ Node, Site string }

// proposal says who may send a command to the leader. The leader itself proposes without
// this check.
type proposal func(by Proposer, data json.RawMessage) error

// anyMember: an operator may ask any node's admin port for it, or any node needs it to
// know that its copy of the state is up to date. Apply has the other conditions.
func anyMember(Proposer, json.RawMessage) error { return nil }

// leaderOnly: the leader decides it, or checks something first. One that was just deposed
// may still send it.
func leaderOnly(by Proposer, _ json.RawMessage) error {
	return fmt.Errorf("%w: %s does not lead", ErrStaleTerm, by.Node)
}

// ownName: for the node that own names, which must be the proposer.
func ownName[T any](own func(T) string) proposal {
	return check(func(by Proposer, d T) error {
		if name := own(d); name != by.Node {
			return fmt.Errorf("%w: it is for %q, from %s", ErrForeign, name, by.Node)
		}
		return nil
	})
}

func check[T any](may func(Proposer, T) error) proposal {
	return func(by Proposer, raw json.RawMessage) error {
		var d T
		if err := json.Unmarshal(raw, &d); err != nil {
			return fmt.Errorf("decode a proposal of %s: %w", by.Node, err)
		}
		return may(by, d)
	}
}

// proposers is the whole table.
var proposers = map[CommandType]proposal{
	CmdInit:         leaderOnly, // the founder, before there is another member
	CmdNodePut:      leaderOnly, // Join checks the node first
	CmdNodeWait:     leaderOnly,
	CmdClusterKey:   leaderOnly,
	CmdFeatureRaise: leaderOnly,
	CmdStreamOwn:    leaderOnly,

	CmdStreamOpen:     ownName(func(d StreamOpen) string { return d.Origin }),
	CmdStreamInherit:  ownName(func(d StreamInherit) string { return d.Owner }),
	CmdStreamDrop:     ownName(func(d StreamDrop) string { return d.Owner }),
	CmdDataKeyConfirm: ownName(func(d DataKeyConfirm) string { return d.Node }),

	CmdDataKeyActivate: leaderOnly,
	CmdDataKeyDrop:     leaderOnly, // it has asked every node
	CmdDataKeyAdd: check(func(by Proposer, d DataKeyAdd) error {
		if d.Kind == DataKeySeal {
			return nil // an operator rotates keys at any node
		}
		return leaderOnly(by, nil)
	}),
	CmdDataKeyRewrap: anyMember,

	CmdPromote: check(func(by Proposer, d Promote) error {
		if d.Kind == FailoverUnplanned || d.SwitchoverID == "" || d.Term != 0 {
			return leaderOnly(by, nil)
		}
		return nil // the coordinator of the announced switchover, which may be any node
	}),
	CmdSwitchover:       anyMember,
	CmdFailoverAck:      anyMember,
	CmdFailoverHold:     anyMember,
	CmdFailoverMeasured: anyMember, // the leader that promoted may have handed over
	CmdDrillPut: check(func(by Proposer, d DrillRecord) error {
		if d.Verdict == "" && d.Kind == "isolation" && d.Site == by.Site {
			return fmt.Errorf("%w: %s can't begin to isolate its own site %s", ErrForeign, by.Node, by.Site)
		}
		return nil
	}),

	CmdNodeRemove: check(func(by Proposer, d NodeRemove) error {
		if d.Name == by.Node {
			return fmt.Errorf("%w: %s can't remove itself", ErrForeign, by.Node)
		}
		return nil
	}),
	CmdNodeAdmit:     anyMember,
	CmdConfigSet:     anyMember,
	CmdAPIKeyPut:     anyMember,
	CmdAPIKeyRevoke:  anyMember,
	CmdUpstreamDrain: anyMember,
	CmdCachePurge:    anyMember,
	CmdTick:          anyMember,
}

// MayPropose returns why a member may not send this command to the leader: nobody may
// change more through another node than the node of its site ever needs.
func MayPropose(by Proposer, c Command) error {
	check, known := proposers[c.Type]
	if !known {
		return fmt.Errorf("%w: %q", ErrUnknownCommand, c.Type)
	}
	return check(by, c.Data)
}
