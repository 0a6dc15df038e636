package agreed

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// commandFormat is the version of Command. Raise it, together with
// MaxFeatureLevel, with a change that an older node would misread.
const commandFormat = 1

// MaxFeatureLevel is the newest command set that this build supports. The leader
// raises State.FeatureLevel to the highest level that every member supports (see
// cluster/upkeep.go), and no node proposes a command above that level.
//
// Level 2 adds what State says about removed nodes, and access.stale_for in the
// configuration. Level 3 adds that ended API keys are cleaned up, the cluster key and the
// nodes that wait to join (see membership.go), and limits.tenant_share and access.join in
// the configuration. A field that only builds of a level know is set only when
// State.FeatureLevel has reached it, also by an older command.
const MaxFeatureLevel = 3

// LossLevel is the feature level from which a failover's record tells what may be lost and
// how long no site acted: below it some member would not keep these figures in its state.
const LossLevel = 2

// CommandType names a command. The names are stored in raft's log: never reuse
// one with another meaning.
type CommandType string

// The commands of feature level 1.
const (
	CmdInit         CommandType = "init"
	CmdNodePut      CommandType = "node_put"
	CmdNodeRemove   CommandType = "node_remove"
	CmdConfigSet    CommandType = "config_set"
	CmdAPIKeyPut    CommandType = "apikey_put"
	CmdAPIKeyRevoke CommandType = "apikey_revoke"
	CmdFeatureRaise CommandType = "feature_raise"
	CmdPromote      CommandType = "promote"
	CmdSwitchover   CommandType = "switchover"
	CmdFailoverAck  CommandType = "failover_ack"
	CmdFailoverHold CommandType = "failover_hold"
	CmdDrillPut     CommandType = "drill_put"
	// CmdUpstreamDrain stops new requests to a model server, or resumes them.
	CmdUpstreamDrain CommandType = "upstream_drain"
	// CmdCachePurge invalidates cached answers on all nodes.
	CmdCachePurge CommandType = "cache_purge"
	// CmdStreamOpen, CmdStreamOwn and CmdStreamDrop change which node executes the
	// jobs of a journal; see stream.go.
	CmdStreamOpen CommandType = "stream_open"
	CmdStreamOwn  CommandType = "stream_own"
	CmdStreamDrop CommandType = "stream_drop"
	// CmdStreamInherit gives a node a stream that its origin never proposed before
	// it was removed.
	CmdStreamInherit CommandType = "stream_inherit"
	// CmdNodeAdmit lets a node join that waits, or one that was removed, also with its data.
	CmdNodeAdmit CommandType = "node_admit"
	// The commands about data keys; see datakey.go.
	CmdDataKeyAdd      CommandType = "datakey_add"
	CmdDataKeyConfirm  CommandType = "datakey_confirm"
	CmdDataKeyActivate CommandType = "datakey_activate"
	CmdDataKeyDrop     CommandType = "datakey_drop"
	CmdDataKeyRewrap   CommandType = "datakey_rewrap"
	// CmdTick changes nothing. A committed tick proves that a quorum was alive
	// after it was proposed; the lease is based on that.
	CmdTick CommandType = "tick"
)

// The commands of feature level 2.
const (
	// CmdFailoverMeasured sets how long no site acted as primary, which is known only
	// some time after the promotion.
	CmdFailoverMeasured CommandType = "failover_measured"
)

// The commands of feature level 3; see membership.go.
const (
	CmdClusterKey CommandType = "cluster_key"
	CmdNodeWait   CommandType = "node_wait"
)

// commandLevel is the feature level that each command needs.
var commandLevel = map[CommandType]int{
	CmdInit: 1, CmdNodePut: 1, CmdNodeRemove: 1, CmdConfigSet: 1, CmdAPIKeyPut: 1,
	CmdAPIKeyRevoke: 1, CmdFeatureRaise: 1, CmdPromote: 1, CmdSwitchover: 1,
	CmdFailoverAck: 1, CmdFailoverHold: 1, CmdDrillPut: 1, CmdTick: 1, CmdUpstreamDrain: 1,
	CmdCachePurge: 1, CmdStreamOpen: 1, CmdStreamOwn: 1, CmdStreamDrop: 1, CmdStreamInherit: 1,
	CmdNodeAdmit:  2,
	CmdDataKeyAdd: 1, CmdDataKeyConfirm: 1, CmdDataKeyActivate: 1, CmdDataKeyDrop: 1, CmdDataKeyRewrap: 1,
	CmdFailoverMeasured: LossLevel,
	CmdClusterKey:       MembershipLevel, CmdNodeWait: MembershipLevel,
}

// Command is one entry of the agreed log.
type Command struct {
	Format int             `json:"f"`
	Type   CommandType     `json:"t"`
	At     time.Time       `json:"at"` // the proposer's wall clock; Apply has no other
	Data   json.RawMessage `json:"d,omitempty"`
	// Term is the term in which a leader appended the entry to the log, Index the
	// entry's index there. They come from the log and are never encoded.
	Term  uint64 `json:"-"`
	Index uint64 `json:"-"`
}

// ErrUnknownCommand must stop a node: if it continued, its state would differ from
// that of the nodes that support the command.
var ErrUnknownCommand = errors.New("the agreed log has a command that this version does not support; upgrade this node")

// Level is the feature level that the cluster must have for commands of the type.
func (t CommandType) Level() int { return commandLevel[t] }

// NewCommand encodes data as a command of type t.
func NewCommand(t CommandType, at time.Time, data any) (Command, error) {
	if _, known := commandLevel[t]; !known {
		return Command{}, fmt.Errorf("%w: %q", ErrUnknownCommand, t)
	}
	c := Command{Format: commandFormat, Type: t, At: at.UTC()}
	if data == nil {
		return c, nil
	}
	b, err := json.Marshal(data)
	if err != nil {
		return Command{}, fmt.Errorf("encode command %s: %w", t, err)
	}
	c.Data = b
	return c, nil
}

// Encode returns the command in the form for raft's log.
func (c Command) Encode() ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode command %s: %w", c.Type, err)
	}
	return b, nil
}

// DecodeCommand reads the result of Encode. It returns ErrUnknownCommand if a newer
// version wrote it.
func DecodeCommand(b []byte) (Command, error) {
	var c Command
	if err := json.Unmarshal(b, &c); err != nil {
		return Command{}, fmt.Errorf("decode command: %w", err)
	}
	if c.Format != commandFormat {
		return Command{}, fmt.Errorf("%w: command format %d, this version reads %d", ErrUnknownCommand, c.Format, commandFormat)
	}
	if _, known := commandLevel[c.Type]; !known {
		return Command{}, fmt.Errorf("%w: %q", ErrUnknownCommand, c.Type)
	}
	return c, nil
}

// The data of each command.
type (
	// Init founds the cluster. It is refused if there is one already.
	Init struct {
		ClusterID  string        `json:"cluster_id"`
		Name       string        `json:"name"`
		Generation Generation    `json:"generation"`
		Node       Node          `json:"node"`
		Config     ConfigVersion `json:"config"`
	}
	// NodePut makes a node a member, or changes what is known of a member: the one that
	// was admitted by Node.Admitted. Otherwise it was removed since the leader checked it,
	// and at feature level 2 the command is refused.
	NodePut struct {
		Node
		// Admit: the node joins, with an empty disk or because it was admitted again.
		Admit bool `json:"admit,omitempty"`
		// Empty: a removed node joins again with an empty disk, so it has no records of
		// dropped streams. From feature level MembershipLevel on.
		Empty bool `json:"empty,omitempty"`
	}
	// NodeRemove removes a member permanently.
	NodeRemove struct {
		Name string `json:"name"`
		By   string `json:"by,omitempty"`
	}
	// NodeAdmit lets a node join that waits, or one that was removed.
	NodeAdmit struct {
		Name string `json:"name"`
		By   string `json:"by"`
	}
	// ConfigSet replaces the configuration if its current version is Expect.
	ConfigSet struct {
		Expect uint64 `json:"expect"`
		Text   string `json:"text"`
		Hash   string `json:"hash"`
		Author string `json:"author"`
	}
	// APIKeyRevoke revokes a key.
	APIKeyRevoke struct {
		ID string `json:"id"`
	}
	// FeatureRaise raises State.FeatureLevel, which allows newer commands.
	FeatureRaise struct {
		Level int `json:"level"`
	}
	// Promote makes a site the primary if the epoch is still ExpectEpoch.
	Promote struct {
		Site         string       `json:"site"`
		ExpectEpoch  uint64       `json:"expect_epoch"`
		Generation   uint64       `json:"generation"`
		Reason       string       `json:"reason"`
		Kind         FailoverKind `json:"kind"`
		SwitchoverID string       `json:"switchover_id,omitempty"` // of a planned promotion: that of State.Switchover
		RTOSeconds   *float64     `json:"rto_seconds"`
		// RPOSeconds and RecordsAtRisk need feature level LossLevel.
		RPOSeconds    *float64 `json:"rpo_seconds,omitempty"`
		RecordsAtRisk *int64   `json:"records_at_risk,omitempty"`
		// Released says that every node of the old primary has released the role; see
		// Primary.
		Released bool `json:"released,omitempty"`
		// Term is the term in which a leader decided an automatic promotion; 0 for a
		// planned one. The promotion is refused in any other term: a new leader must
		// wait before it promotes, so it must not commit the decision of an earlier
		// leader.
		Term uint64 `json:"term,omitempty"`
	}
	// SwitchoverSet begins or ends a planned change; see State.Switchover.
	SwitchoverSet struct {
		Expect string      `json:"expect"` // id of the switchover in progress, "" for none
		Next   *Switchover `json:"next"`   // nil ends it
		Reason string      `json:"reason,omitempty"`
	}
	// FailoverAck records that an operator has seen the failover of this epoch.
	FailoverAck struct {
		Epoch uint64 `json:"epoch"`
		By    string `json:"by"`
	}
	// FailoverMeasured says how long no site acted as primary before this epoch.
	FailoverMeasured struct {
		Epoch      uint64  `json:"epoch"`
		RTOSeconds float64 `json:"rto_seconds"`
	}
	// FailoverHold stops automatic promotions, or allows them again.
	FailoverHold struct {
		Held   bool   `json:"held"`
		Reason string `json:"reason,omitempty"`
		By     string `json:"by"`
	}
)
