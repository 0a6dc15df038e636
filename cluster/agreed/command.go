package agreed

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// commandFormat is the version of the envelope below. A change that an older
// node would misread raises it, together with MaxFeatureLevel.
const commandFormat = 1

// MaxFeatureLevel is the newest command set that this build understands. The
// agreed level rises to it only when every member supports it (see feature.go),
// and nobody proposes a command above the agreed level.
const MaxFeatureLevel = 1

// CommandType names a command. The names stand in raft's log for ever: never
// reuse one with another meaning.
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
	// CmdUpstreamDrain takes a model server out of use, or back.
	CmdUpstreamDrain CommandType = "upstream_drain"
	// CmdCachePurge makes kept answers unusable everywhere.
	CmdCachePurge CommandType = "cache_purge"
	// CmdStreamOpen, CmdStreamOwn and CmdStreamDrop say who executes the jobs of
	// which journal; see stream.go.
	CmdStreamOpen CommandType = "stream_open"
	CmdStreamOwn  CommandType = "stream_own"
	CmdStreamDrop CommandType = "stream_drop"
	// CmdStreamInherit gives somebody what a removed node never told the cluster of.
	CmdStreamInherit CommandType = "stream_inherit"
	// What is agreed about data keys; see datakey.go.
	CmdDataKeyAdd      CommandType = "datakey_add"
	CmdDataKeyConfirm  CommandType = "datakey_confirm"
	CmdDataKeyActivate CommandType = "datakey_activate"
	CmdDataKeyDrop     CommandType = "datakey_drop"
	CmdDataKeyRewrap   CommandType = "datakey_rewrap"
	// CmdTick changes nothing. Committing one proves that a quorum was alive
	// after it was proposed: the lease stands on it.
	CmdTick CommandType = "tick"
)

// commandLevel is the feature level that each command needs.
var commandLevel = map[CommandType]int{
	CmdInit: 1, CmdNodePut: 1, CmdNodeRemove: 1, CmdConfigSet: 1, CmdAPIKeyPut: 1,
	CmdAPIKeyRevoke: 1, CmdFeatureRaise: 1, CmdPromote: 1, CmdSwitchover: 1,
	CmdFailoverAck: 1, CmdFailoverHold: 1, CmdDrillPut: 1, CmdTick: 1, CmdUpstreamDrain: 1,
	CmdCachePurge: 1, CmdStreamOpen: 1, CmdStreamOwn: 1, CmdStreamDrop: 1, CmdStreamInherit: 1,
	CmdDataKeyAdd: 1, CmdDataKeyConfirm: 1, CmdDataKeyActivate: 1, CmdDataKeyDrop: 1, CmdDataKeyRewrap: 1,
}

// Command is one entry of the agreed log.
type Command struct {
	Format int             `json:"f"`
	Type   CommandType     `json:"t"`
	At     time.Time       `json:"at"` // the proposer's wall clock; Apply has no other
	Data   json.RawMessage `json:"d,omitempty"`
	// Term is that of the leader which took the entry into the log, Index the
	// entry's place in it. They are the log's, never encoded.
	Term  uint64 `json:"-"`
	Index uint64 `json:"-"`
}

// ErrUnknownCommand stops a node: going on would make its state differ from
// that of the nodes which know the command.
var ErrUnknownCommand = errors.New("the agreed log holds a command that this version does not know; upgrade this node")

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

// Encode is the form in raft's log.
func (c Command) Encode() ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode command %s: %w", c.Type, err)
	}
	return b, nil
}

// DecodeCommand reads what Encode wrote. ErrUnknownCommand when it was written
// by a newer version.
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
	// Init founds the cluster; refused on a state that has one.
	Init struct {
		ClusterID  string        `json:"cluster_id"`
		Name       string        `json:"name"`
		Generation Generation    `json:"generation"`
		Node       Node          `json:"node"`
		Config     ConfigVersion `json:"config"`
	}
	// NodeRemove takes a member out for good.
	NodeRemove struct {
		Name string `json:"name"`
	}
	// ConfigSet replaces the configuration if Expect is its version now.
	ConfigSet struct {
		Expect uint64 `json:"expect"`
		Text   string `json:"text"`
		Hash   string `json:"hash"`
		Author string `json:"author"`
	}
	// APIKeyRevoke ends a key.
	APIKeyRevoke struct {
		ID string `json:"id"`
	}
	// FeatureRaise allows newer commands from here on.
	FeatureRaise struct {
		Level int `json:"level"`
	}
	// Promote puts another site in charge if the epoch is still Expect.
	Promote struct {
		Site         string       `json:"site"`
		ExpectEpoch  uint64       `json:"expect_epoch"`
		Generation   uint64       `json:"generation"`
		Reason       string       `json:"reason"`
		Kind         FailoverKind `json:"kind"`
		SwitchoverID string       `json:"switchover_id,omitempty"` // of a planned one: must be the one in progress
		RTOSeconds   *float64     `json:"rto_seconds"`
		// Released: every node of the old primary has let go; see Primary.
		Released bool `json:"released,omitempty"`
		// Term is that of the leader which decided this by itself; 0 of a planned
		// one. It has no effect in another term: a new leader waits before it
		// promotes, so it must not be handed the decision of the one before.
		Term uint64 `json:"term,omitempty"`
	}
	// SwitchoverSet opens or closes a planned change; see State.Switchover.
	SwitchoverSet struct {
		Expect string      `json:"expect"` // id of the one in progress now, "" for none
		Next   *Switchover `json:"next"`   // nil closes it
		Reason string      `json:"reason,omitempty"`
	}
	// FailoverAck says that a person has seen the failover of this epoch.
	FailoverAck struct {
		Epoch uint64 `json:"epoch"`
		By    string `json:"by"`
	}
	// FailoverHold stops automatic promotions until it is lifted.
	FailoverHold struct {
		Held   bool   `json:"held"`
		Reason string `json:"reason,omitempty"`
		By     string `json:"by"`
	}
)
