package agreed

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Bounds that Apply itself enforces. bounds.go has those of all fields, and of the whole.
const (
	MaxNodes        = 256
	maxAPIKeys      = 10_000
	maxConfigBytes  = 1 << 20
	maxHistory      = 32
	maxHistoryBytes = 4 << 20
	maxDrills       = 50
	maxDrillReport  = 256 << 10
)

// Refusals of Apply and of CheckProposal. They are regular results, the same on every node.
var (
	ErrAlreadyFounded  = errors.New("the cluster is already bootstrapped")
	ErrNotFounded      = errors.New("the cluster is not bootstrapped yet")
	ErrVersionConflict = errors.New("the configuration has changed since it was read")
	ErrUnknownNode     = errors.New("no such node")
	ErrUnknownKey      = errors.New("no such API key")
	ErrStateFull       = errors.New("the agreed state has reached its bound")
	ErrOverBound       = errors.New("the cluster does not accept the value")
	ErrStaleEpoch      = errors.New("stale epoch")
	ErrStaleTerm       = errors.New("decided by a raft leader of another term")
	ErrSwitchover      = errors.New("a switchover is in progress")
	ErrNoSwitchover    = errors.New("that switchover is no longer in progress")
	ErrDrillRunning    = errors.New("another drill is running")
	ErrDrillEnded      = errors.New("that drill has ended")
	ErrLastVoter       = errors.New("the last voter can't be removed")
)

// Apply is the whole state machine. It is a pure function of its two arguments,
// defined for every command, so all nodes get the same result: it uses no clock
// and does not parse the configuration. If it refuses a command, it returns the
// same state pointer. After ErrUnknownCommand the node must stop.
func Apply(s *State, c Command) (*State, error) {
	if c.Type == CmdTick {
		return s, nil
	}
	if c.Type == CmdInit {
		return applyInit(s, c)
	}
	if s.ClusterID == "" {
		return s, ErrNotFounded
	}
	next := *s // the methods below replace fields and never modify shared maps or slices
	var err error
	switch c.Type {
	case CmdNodePut:
		err = with(c, func(d NodePut) error { return next.putNode(d, c) })
	case CmdNodeRemove:
		err = with(c, func(d NodeRemove) error { return next.removeNode(d, c) })
	case CmdNodeAdmit:
		err = with(c, func(d NodeAdmit) error { return next.admitNode(d, c.At) })
	case CmdNodeWait:
		err = with(c, func(d NodeWait) error { return next.wait(d, c.At) })
	case CmdClusterKey:
		err = with(c, func(d ClusterKeySet) error { return next.setClusterKey(d, c.At) })
	case CmdConfigSet:
		err = with(c, func(d ConfigSet) error { return next.setConfig(d, c.At) })
	case CmdAPIKeyPut:
		err = with(c, func(d APIKey) error { return next.putKey(d, c.At) })
	case CmdAPIKeyRevoke:
		err = with(c, func(d APIKeyRevoke) error { return next.revokeKey(d, c.At) })
	case CmdFeatureRaise:
		err = with(c, func(d FeatureRaise) error { return next.raiseFeatures(d, c) })
	case CmdPromote:
		err = with(c, func(d Promote) error { return next.promote(d, c) })
	case CmdSwitchover:
		err = with(c, func(d SwitchoverSet) error { return next.setSwitchover(d, c.At) })
	case CmdFailoverAck:
		err = with(c, next.acknowledge)
	case CmdFailoverMeasured:
		err = with(c, next.measured)
	case CmdFailoverHold:
		err = with(c, func(d FailoverHold) error {
			next.Hold = nil
			if d.Held {
				next.Hold = &Hold{Reason: d.Reason, By: d.By, At: c.At}
			}
			return nil
		})
	case CmdUpstreamDrain:
		err = with(c, func(d UpstreamDrain) error { return next.drainUpstream(d, c.At) })
	case CmdCachePurge:
		err = with(c, func(d CachePurge) error { return next.purgeCache(d, c.At) })
	case CmdStreamOpen:
		err = with(c, func(d StreamOpen) error { return next.openStream(d, c) })
	case CmdStreamOwn:
		err = with(c, func(d StreamOwn) error { return next.ownStream(d, c) })
	case CmdStreamDrop:
		err = with(c, func(d StreamDrop) error { return next.dropStreams(d, c) })
	case CmdStreamInherit:
		err = with(c, func(d StreamInherit) error { return next.inheritStream(d, c) })
	case CmdDrillPut:
		err = with(c, func(d DrillRecord) error { return next.putDrill(d, c.At) })
	case CmdDataKeyAdd, CmdDataKeyConfirm, CmdDataKeyActivate, CmdDataKeyDrop, CmdDataKeyRewrap:
		err = next.applyDataKey(c)
	default:
		err = fmt.Errorf("%w: %q", ErrUnknownCommand, c.Type)
	}
	if err != nil {
		return s, err
	}
	return &next, nil
}

func with[T any](c Command, f func(T) error) error {
	var d T
	if err := json.Unmarshal(c.Data, &d); err != nil {
		return fmt.Errorf("decode %s: %w", c.Type, err)
	}
	return f(d)
}

func applyInit(s *State, c Command) (*State, error) {
	if s.ClusterID != "" {
		return s, ErrAlreadyFounded
	}
	next := &State{}
	err := with(c, func(d Init) error {
		if len(d.Config.Text) > maxConfigBytes {
			return fmt.Errorf("%w: configuration of %d bytes", ErrStateFull, len(d.Config.Text))
		}
		d.Node.JoinedAt = c.At
		d.Config.Version, d.Config.Time = 1, c.At
		*next = State{
			Format: formatAt(1), FeatureLevel: 1,
			ClusterID: d.ClusterID, Name: d.Name, Generation: d.Generation, CreatedAt: c.At,
			Primary: Primary{Site: d.Node.Site, Epoch: 1, Since: c.At, Reason: "bootstrap"},
			Nodes:   map[string]Node{d.Node.Name: d.Node},
			APIKeys: map[string]APIKey{},
			Config:  d.Config,
		}
		return nil
	})
	if err != nil {
		return s, err
	}
	return next, nil
}

func (s *State) putNode(d NodePut, c Command) error {
	n := d.Node
	old, known := s.Nodes[n.Name]
	if s.FeatureLevel >= removalLevel && !d.Admit && (!known || n.Admitted != old.Admitted) {
		return fmt.Errorf("%w: %s was removed meanwhile", ErrUnknownNode, n.Name)
	}
	if r, removed := s.Removal(n.Name); s.MembersOnly() && !known && removed && r.AdmittedAt.IsZero() {
		return fmt.Errorf("%w: %s was removed meanwhile", ErrUnknownNode, n.Name)
	}
	if !known && len(s.Nodes) >= MaxNodes {
		return fmt.Errorf("%w: %d nodes", ErrStateFull, MaxNodes)
	}
	n.JoinedAt, n.Admitted = c.At, 0
	switch {
	case known:
		n.JoinedAt, n.Admitted = old.JoinedAt, old.Admitted
	case s.FeatureLevel >= removalLevel:
		n.Admitted = c.Index
		s.endRemoval(n.Name, d.Empty && s.MembersOnly())
		if _, waits := s.Applicant(n.Name); waits {
			s.Waiting = s.withoutApplicant(n.Name)
		}
	}
	s.Nodes = maps.Clone(s.Nodes)
	s.Nodes[n.Name] = n
	return nil
}

func (s *State) removeNode(d NodeRemove, c Command) error {
	node, known := s.Nodes[d.Name]
	if _, waits := s.Applicant(d.Name); waits && !known {
		s.Waiting = s.withoutApplicant(d.Name) // it may ask again
		return nil
	}
	if !known {
		return fmt.Errorf("%w: %s", ErrUnknownNode, d.Name)
	}
	s.Nodes = maps.Clone(s.Nodes)
	delete(s.Nodes, d.Name)
	s.forgetConfirmations(d.Name)
	if s.FeatureLevel >= removalLevel {
		s.noteRemoval(Removal{Name: d.Name, Site: node.Site, By: d.By, At: c.At, Index: c.Index})
	}
	return nil
}

// raiseFeatures never lowers the level. A build that does not know a level must not
// follow the cluster there.
func (s *State) raiseFeatures(d FeatureRaise, c Command) error {
	if d.Level > MaxFeatureLevel {
		return fmt.Errorf("%w: feature level %d, this version supports up to %d", ErrUnknownCommand, d.Level, MaxFeatureLevel)
	}
	if s.FeatureLevel < removalLevel && d.Level >= removalLevel {
		s.RemovedBefore = c.Index // covers those who were removed before the state noted it
	}
	if s.FeatureLevel < keyCleanupLevel && d.Level >= keyCleanupLevel {
		s.HadKeys = len(s.APIKeys) > 0
	}
	s.FeatureLevel = max(s.FeatureLevel, d.Level)
	s.Format = formatAt(s.FeatureLevel)
	return nil
}

func (s *State) setConfig(d ConfigSet, at time.Time) error {
	if d.Expect != s.Config.Version {
		return fmt.Errorf("%w: it is at version %d, not %d", ErrVersionConflict, s.Config.Version, d.Expect)
	}
	if len(d.Text) > maxConfigBytes {
		return fmt.Errorf("%w: configuration of %d bytes", ErrStateFull, len(d.Text))
	}
	s.History = trimHistory(append(slices.Clone(s.History), s.Config))
	s.Config = ConfigVersion{Version: s.Config.Version + 1, Hash: d.Hash, Author: d.Author, Time: at, Text: d.Text}
	return nil
}

// trimHistory drops the oldest versions beyond either bound.
func trimHistory(h []ConfigVersion) []ConfigVersion {
	size := 0
	for i := len(h) - 1; i >= 0; i-- {
		size += len(h[i].Text)
		if len(h)-i > maxHistory || size > maxHistoryBytes {
			return h[i+1:]
		}
	}
	return h
}

func (s *State) promote(d Promote, c Command) error {
	at := c.At
	if d.Term != 0 && d.Term != c.Term {
		return fmt.Errorf("%w: the promotion of %s was decided in term %d and committed in term %d", ErrStaleTerm, d.Site, d.Term, c.Term)
	}
	if d.Generation != s.Generation.Number || d.ExpectEpoch != s.Primary.Epoch {
		return fmt.Errorf("%w: generation %d epoch %d, expected %d and %d", ErrStaleEpoch,
			s.Generation.Number, s.Primary.Epoch, d.Generation, d.ExpectEpoch)
	}
	if s.Switchover != nil && s.Switchover.ID != d.SwitchoverID && at.Before(s.Switchover.Deadline) && d.Kind != FailoverUnplanned {
		return fmt.Errorf("%w: to %s since %s", ErrSwitchover, s.Switchover.To, s.Switchover.At.Format(time.RFC3339))
	}
	if d.SwitchoverID != "" && (s.Switchover == nil || s.Switchover.ID != d.SwitchoverID || !at.Before(s.Switchover.Deadline)) {
		return ErrNoSwitchover
	}
	s.LastFailover = &FailoverRecord{
		From: s.Primary.Site, To: d.Site, Kind: d.Kind, Epoch: d.ExpectEpoch + 1, At: at,
		Reason: d.Reason, RTOSeconds: d.RTOSeconds, RPOSeconds: d.RPOSeconds, RecordsAtRisk: d.RecordsAtRisk,
		// Only an automatic failover needs an operator's acknowledgement.
		Acknowledged: d.Kind != FailoverUnplanned,
	}
	s.Primary = Primary{Site: d.Site, Epoch: d.ExpectEpoch + 1, Since: at, Reason: d.Reason, Released: d.Released}
	s.Switchover = nil
	return nil
}

func (s *State) setSwitchover(d SwitchoverSet, at time.Time) error {
	current := ""
	if s.Switchover != nil && at.Before(s.Switchover.Deadline) {
		current = s.Switchover.ID
	}
	if d.Next == nil {
		if s.Switchover == nil || s.Switchover.ID != d.Expect {
			return ErrNoSwitchover
		}
		s.Switchover = nil
		return nil
	}
	if current != d.Expect {
		return fmt.Errorf("%w: to %s", ErrSwitchover, s.Switchover.To)
	}
	w := *d.Next
	if w.From != s.Primary.Site {
		return fmt.Errorf("%w: the primary is %s, not %s", ErrStaleEpoch, s.Primary.Site, w.From)
	}
	s.Switchover = &w
	return nil
}

func (s *State) acknowledge(d FailoverAck) error {
	if s.LastFailover == nil || s.LastFailover.Epoch != d.Epoch {
		return fmt.Errorf("%w: no failover with epoch %d to acknowledge", ErrStaleEpoch, d.Epoch)
	}
	f := *s.LastFailover
	f.Acknowledged = true
	s.LastFailover = &f
	return nil
}

func (s *State) measured(d FailoverMeasured) error {
	if s.LastFailover == nil || s.LastFailover.Epoch != d.Epoch {
		return fmt.Errorf("%w: the last failover is not that of epoch %d", ErrStaleEpoch, d.Epoch)
	}
	f := *s.LastFailover
	f.RTOSeconds = &d.RTOSeconds
	s.LastFailover = &f
	return nil
}

// putDrill begins a drill if no other one is running, or updates or ends one. A
// drill that has ended can't run again.
func (s *State) putDrill(d DrillRecord, at time.Time) error {
	if len(d.Report) > maxDrillReport {
		return fmt.Errorf("%w: drill report of %d bytes", ErrStateFull, len(d.Report))
	}
	for _, o := range s.Drills {
		switch {
		case d.Verdict != "":
		case o.ID == d.ID && o.Verdict != "":
			return fmt.Errorf("%w: %s", ErrDrillEnded, o.ID)
		case o.ID != d.ID && o.Running(at):
			return fmt.Errorf("%w: %s of %s, until %s at the latest", ErrDrillRunning, o.ID, o.Site, o.Deadline.Format(time.RFC3339))
		}
	}
	drills := slices.Clone(s.Drills)
	if i := slices.IndexFunc(drills, func(o DrillRecord) bool { return o.ID == d.ID }); i >= 0 {
		drills[i] = d
	} else {
		drills = append(drills, d)
	}
	s.Drills = drills[max(0, len(drills)-maxDrills):]
	return nil
}

// stateFormat is the newest version of State in a snapshot that this build reads.
const stateFormat = 3

// formatAt is the version of State in the snapshots of a cluster at a feature level.
// Builds of a level read only its format and older ones: one that is started after the
// cluster has gone on refuses its snapshot, instead of dropping the fields that it does
// not know.
func formatAt(level int) int { return min(max(level, 1), stateFormat) }

// Encode returns the state in the form for snapshots.
func (s *State) Encode() ([]byte, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode state: %w", err)
	}
	return b, nil
}

// DecodeState reads the result of Encode. It returns ErrUnknownCommand if a newer
// version wrote it.
func DecodeState(b []byte) (*State, error) {
	s := &State{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	if s.Format > stateFormat {
		return nil, fmt.Errorf("%w: state format %d, this version reads up to %d", ErrUnknownCommand, s.Format, stateFormat)
	}
	if s.FeatureLevel > MaxFeatureLevel {
		return nil, fmt.Errorf("%w: feature level %d, this version supports up to %d", ErrUnknownCommand, s.FeatureLevel, MaxFeatureLevel)
	}
	return s, nil
}
