package agreed

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"reflect"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dsnode/dsnode/cluster/config"
)

// Bounds of the whole state, in bytes of its form for snapshots, of which one has at most
// 64 MiB (storage, and fsm.go). What the cluster needs to go on (nodes, streams, data keys,
// promotions) is always accepted and takes at most 24 MiB by its fields' bounds. API keys
// are refused first, so that the configuration can still be changed.
const (
	MaxBytesForKeys   = 24 << 20
	maxBytesForConfig = 36 << 20
)

// Bounds of single values, in bytes.
const (
	maxName      = config.MaxNameLength // of a cluster, site, node or upstream
	maxID        = 128                  // of what this program names
	maxAddress   = 264                  // host:port, with a host of 253
	maxAuthor    = 256                  // who made a change
	maxReason    = 1024
	maxModelName = 256
	maxTenant    = 256
	maxNote      = 1024
	maxWord      = 32       // a reason that is one word
	maxPassing   = 64 << 10 // a text of a command that the state does not keep
	maxStreamKey = maxName + 1 + 32
	// MaxDrillReport bounds the report in the record of a drill.
	MaxDrillReport = 64 << 10
)

// Bounds of all streams. Those that a node inherits from one that was removed count
// separately: else they could leave no room for those of the members.
const (
	maxInheritedStreams = 4096
	maxStreams          = MaxNodes*MaxStreamsPerNode + maxInheritedStreams
)

// bound is the bound of one field: entries of a map or list; bytes of a text, of each key
// of a map, and of each text in a map or list.
type bound struct{ entries, bytes int }

// bounds has every text, list and map of State and of the commands' data, by type and
// field. Numbers, times and flags have a bound by their type. A test checks that none is
// missing, and that DESIGN.md has those of State.
var bounds = map[string]bound{
	"State.ClusterID": {0, maxID}, "State.Name": {0, maxName},
	"State.Nodes": {MaxNodes, maxName}, "State.Removed": {maxRemovals, 0}, "State.APIKeys": {maxAPIKeys, maxID}, "State.Waiting": {maxWaiting, 0},
	"State.Drained": {config.MaxUpstreams, maxName}, "State.Streams": {maxStreams, maxStreamKey}, "State.DoneStreams": {maxDoneStreams, maxStreamKey},
	"State.DataKeys": {maxDataKeys, 0}, "State.Drills": {maxDrills, 0}, "State.History": {maxHistory, 0},
	"Generation.ID": {0, maxID},
	"Primary.Site":  {0, maxName}, "Primary.Reason": {0, maxReason},
	"Node.Name": {0, maxName}, "Node.Site": {0, maxName}, "Node.RPC": {0, maxAddress}, "Node.Gossip": {0, maxAddress},
	"Node.API": {0, maxAddress}, "Node.Admin": {0, maxAddress}, "Node.Version": {0, maxID}, "Node.Instance": {0, maxID},
	"Node.OperatorKey": {0, maxDataKeyName}, "Node.OperatorKeyPrevious": {0, maxDataKeyName},
	"ClusterKey.Public": {0, ed25519.PublicKeySize}, "ClusterKey.Sealed": {0, maxSealedKey}, "ClusterKey.OperatorKey": {0, maxDataKeyName},
	"Applicant.Name": {0, maxName}, "Applicant.Site": {0, maxName}, "Applicant.RPC": {0, maxAddress}, "Applicant.Version": {0, maxID}, "Applicant.AdmittedBy": {0, maxAuthor},
	"ConfigVersion.Hash": {0, maxID}, "ConfigVersion.Author": {0, maxAuthor}, "ConfigVersion.Text": {0, maxConfigBytes},
	"APIKey.ID": {0, maxID}, "APIKey.Hash": {0, maxID}, "APIKey.Tenant": {0, maxTenant}, "APIKey.Note": {0, maxNote},
	"APIKey.Models":       {config.MaxModels, maxModelName},
	"FailoverRecord.From": {0, maxName}, "FailoverRecord.To": {0, maxName}, "FailoverRecord.Kind": {0, maxID}, "FailoverRecord.Reason": {0, maxReason},
	"Switchover.ID": {0, maxID}, "Switchover.From": {0, maxName}, "Switchover.To": {0, maxName}, "Switchover.Kind": {0, maxID}, "Switchover.By": {0, maxAuthor},
	"Hold.Reason": {0, maxReason}, "Hold.By": {0, maxAuthor},
	"DrillRecord.ID": {0, maxID}, "DrillRecord.Kind": {0, maxID}, "DrillRecord.Site": {0, maxName}, "DrillRecord.By": {0, maxAuthor},
	"DrillRecord.Verdict": {0, maxID}, "DrillRecord.Report": {0, MaxDrillReport},
	"Removal.Name": {0, maxName}, "Removal.Site": {0, maxName}, "Removal.By": {0, maxAuthor}, "Removal.AdmittedBy": {0, maxAuthor},
	"DrainedUpstream.By": {0, maxAuthor},
	"CachePurges.Models": {maxPurgedModels, maxModelName}, "CachePurges.Keys": {maxPurgedKeys, maxPurgeKey},
	"JobStream.Origin": {0, maxName}, "JobStream.Incarnation": {0, 32}, "JobStream.Site": {0, maxName}, "JobStream.Owner": {0, maxName},
	"JobStream.Before": {0, maxName}, "JobStream.Reason": {0, maxWord},
	"DataKey.ID": {0, dataKeyIDSize}, "DataKey.Kind": {0, maxID}, "DataKey.Wrapped": {0, maxWrappedKey}, "DataKey.OperatorKey": {0, maxDataKeyName},
	"DataKey.CreatedBy": {0, maxDataKeyName}, "DataKey.Confirmed": {MaxNodes, maxName},

	"Init.ClusterID": {0, maxID}, "Init.Name": {0, maxName},
	"ClusterKeySet.Expect": {0, ed25519.PublicKeySize}, "ClusterKeySet.Public": {0, ed25519.PublicKeySize}, "ClusterKeySet.Sealed": {0, maxSealedKey},
	"ClusterKeySet.OperatorKey": {0, maxDataKeyName},
	"NodeWait.Name":             {0, maxName}, "NodeWait.Site": {0, maxName}, "NodeWait.RPC": {0, maxAddress}, "NodeWait.Version": {0, maxID},
	"NodeRemove.Name": {0, maxName}, "NodeRemove.By": {0, maxAuthor}, "NodeAdmit.Name": {0, maxName}, "NodeAdmit.By": {0, maxAuthor},
	"ConfigSet.Text": {0, maxConfigBytes}, "ConfigSet.Hash": {0, maxID}, "ConfigSet.Author": {0, maxAuthor},
	"APIKeyRevoke.ID": {0, maxPassing},
	"Promote.Site":    {0, maxName}, "Promote.Reason": {0, maxReason}, "Promote.Kind": {0, maxID}, "Promote.SwitchoverID": {0, maxID},
	"SwitchoverSet.Expect": {0, maxID}, "SwitchoverSet.Reason": {0, maxPassing}, "FailoverAck.By": {0, maxAuthor},
	"FailoverHold.Reason": {0, maxReason}, "FailoverHold.By": {0, maxAuthor},
	"UpstreamDrain.Name": {0, maxName}, "UpstreamDrain.By": {0, maxAuthor}, "UpstreamDrain.Configured": {config.MaxUpstreams, maxName},
	"CachePurge.Model": {0, maxModelName}, "CachePurge.Key": {0, maxPurgeKey}, "CachePurge.By": {0, maxAuthor},
	"StreamOpen.Origin": {0, maxName}, "StreamOpen.Incarnation": {0, 32},
	"StreamOwn.Stream": {0, maxStreamKey}, "StreamOwn.Owner": {0, maxName}, "StreamOwn.Reason": {0, maxWord},
	"StreamInherit.Origin": {0, maxName}, "StreamInherit.Incarnation": {0, 32}, "StreamInherit.Owner": {0, maxName},
	"StreamDrop.Owner": {0, maxName}, "StreamDrop.Streams": {maxStreams, maxStreamKey},
	"DataKeyAdd.ID": {0, maxID}, "DataKeyAdd.Kind": {0, maxID}, "DataKeyAdd.Wrapped": {0, maxWrappedKey},
	"DataKeyAdd.OperatorKey": {0, maxDataKeyName}, "DataKeyAdd.By": {0, maxDataKeyName},
	"DataKeyConfirm.Node": {0, maxName}, "DataKeyConfirm.IDs": {maxDataKeys, maxID}, "DataKeyConfirm.OperatorKey": {0, maxDataKeyName},
	"DataKeyActivate.ID": {0, maxID}, "DataKeyDrop.ID": {0, maxID}, "DataKeyDrop.Free": {MaxNodes, maxName},
	"DataKeyRewrap.OperatorKey": {0, maxDataKeyName}, "DataKeyRewrap.Wrapped": {maxDataKeys, maxWrappedKey}, "DataKeyRewrap.By": {0, maxAuthor},
}

// commandData makes the data of each command that has some.
var commandData = map[CommandType]func() any{
	CmdInit: data[Init], CmdNodePut: data[NodePut], CmdNodeRemove: data[NodeRemove], CmdNodeAdmit: data[NodeAdmit],
	CmdConfigSet: data[ConfigSet], CmdAPIKeyPut: data[APIKey], CmdAPIKeyRevoke: data[APIKeyRevoke], CmdFeatureRaise: data[FeatureRaise],
	CmdPromote: data[Promote], CmdSwitchover: data[SwitchoverSet], CmdFailoverAck: data[FailoverAck], CmdFailoverHold: data[FailoverHold],
	CmdFailoverMeasured: data[FailoverMeasured], CmdDrillPut: data[DrillRecord], CmdUpstreamDrain: data[UpstreamDrain], CmdCachePurge: data[CachePurge],
	CmdStreamOpen: data[StreamOpen], CmdStreamOwn: data[StreamOwn], CmdStreamDrop: data[StreamDrop], CmdStreamInherit: data[StreamInherit],
	CmdClusterKey: data[ClusterKeySet], CmdNodeWait: data[NodeWait],
	CmdDataKeyAdd: data[DataKeyAdd], CmdDataKeyConfirm: data[DataKeyConfirm], CmdDataKeyActivate: data[DataKeyActivate],
	CmdDataKeyDrop: data[DataKeyDrop], CmdDataKeyRewrap: data[DataKeyRewrap],
}

func data[T any]() any { return new(T) }

// CheckProposal refuses a command with a value over its bound, or one that would make the
// whole state too large. The leader calls it before it appends the command, at any feature
// level. Apply does not: what an older version has committed must have the same result on
// all nodes, so a state may be over its bounds, and any command that does not make it
// larger is accepted.
func CheckProposal(s *State, c Command) error {
	fresh := commandData[c.Type]
	if fresh == nil {
		return nil
	}
	d := fresh()
	if err := json.Unmarshal(c.Data, d); err != nil {
		return fmt.Errorf("decode %s: %w", c.Type, err)
	}
	if err := overBound(d); err != nil {
		return err
	}
	switch d := d.(type) {
	case *APIKey:
		if !IsLine(d.Tenant) || !IsLine(d.Note) {
			return fmt.Errorf("%w: the tenant's name and the note must each be one line of text without control characters", ErrOverBound)
		}
		return tooLarge(s, c, MaxBytesForKeys, "revoke API keys that are no longer needed, or write shorter notes and lists of models")
	case *ConfigSet:
		return tooLarge(s, c, maxBytesForConfig, "revoke API keys that are no longer needed, or apply a smaller configuration")
	case *StreamOpen:
		return s.tooManyStreams(StreamKey(d.Origin, d.Incarnation), "")
	case *StreamInherit:
		return s.tooManyStreams(StreamKey(d.Origin, d.Incarnation), d.Origin)
	}
	return nil
}

// tooLarge refuses a command that makes the state larger than a bound.
func tooLarge(s *State, c Command, most int, hint string) error {
	next, err := Apply(s, c)
	if err != nil {
		return err
	}
	after, err := next.Encode()
	if err != nil || len(after) <= most {
		return err
	}
	before, err := s.Encode()
	if err != nil || len(after) <= len(before) {
		return err
	}
	return fmt.Errorf("%w: it has %d KiB, would have %d KiB, and may have %d KiB: %s", ErrStateFull, len(before)>>10, len(after)>>10, most>>10, hint)
}

// tooManyStreams refuses a further stream, of a node that is no member if inherited is
// its name.
func (s *State) tooManyStreams(key, inherited string) error {
	if _, known := s.Streams[key]; known {
		return nil // a repeated proposal
	}
	most, n := maxStreams, len(s.Streams)
	if inherited != "" {
		most, n = maxInheritedStreams, 0
		for _, j := range s.Streams {
			if _, member := s.Nodes[j.Origin]; !member {
				n++
			}
		}
	}
	if n >= most {
		return fmt.Errorf("%w: %d job streams with unfinished jobs", ErrStateFull, n)
	}
	return nil
}

// overBound returns ErrOverBound for a pointer to a struct in which some value is larger
// than its bound.
func overBound(d any) error { return checkStruct(reflect.ValueOf(d).Elem()) }

func checkStruct(v reflect.Value) error {
	t := v.Type()
	for i := range t.NumField() {
		if f := t.Field(i); f.Tag.Get("json") != "-" {
			name := t.Name() + "." + f.Name
			if err := checkValue(name, v.Field(i), bounds[name]); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkValue(name string, v reflect.Value, b bound) error {
	refuse := func(has, most int, what string) error {
		if has <= most {
			return nil
		}
		return fmt.Errorf("%w: %s has %d %s, at most %d are allowed", ErrOverBound, name, has, what, most)
	}
	switch v.Kind() {
	case reflect.String:
		return refuse(v.Len(), b.bytes, "bytes")
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return checkValue(name, v.Elem(), b)
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return nil
		}
		return checkStruct(v)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return refuse(v.Len(), b.bytes, "bytes")
		}
		if err := refuse(v.Len(), b.entries, "entries"); err != nil {
			return err
		}
		for i := range v.Len() {
			if err := checkValue(name, v.Index(i), b); err != nil {
				return err
			}
		}
	case reflect.Map:
		if err := refuse(v.Len(), b.entries, "entries"); err != nil {
			return err
		}
		for each := v.MapRange(); each.Next(); {
			if err := checkValue(name, each.Key(), b); err != nil {
				return err
			}
			if err := checkValue(name, each.Value(), b); err != nil {
				return err
			}
		}
	default: // numbers and flags
	}
	return nil
}

// IsLine reports whether s is one line of text: valid UTF-8 without control characters and
// without the characters that separate lines or turn their direction.
func IsLine(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if unicode.IsControl(r) || unicode.In(r, unicode.Zl, unicode.Zp, unicode.Bidi_Control) {
			return false
		}
	}
	return true
}
