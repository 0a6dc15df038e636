package sim

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/dsnode/dsnode/node/modelsim"
)

// Plan is one simulation: a cluster, its load and its faults. The seed is also that of the
// network's and the clients' random choices.
type Plan struct {
	Seed  uint64
	Nodes []int         // of each site
	Every time.Duration // between two submissions of a site's clients
	Body  int           // bytes of the largest question; the smallest has half of that
	Sites []string      `json:",omitempty"` // that have clients; empty: all
	// Upgrade: every node was restarted once, one after the other, before the first fault. Then
	// there are streams that have ended, as in any cluster that has run for a while.
	Upgrade bool
	Faults  []Fault
}

// Kind is a kind of fault.
type Kind string

// The kinds. All end by themselves after Fault.For.
const (
	Packets     Kind = "packets"      // Rules hold
	Crash       Kind = "crash"        // processes are killed, or machines lose power, and start again
	Wipe        Kind = "wipe"         // a crash, and the disk is empty afterwards
	Restore     Kind = "restore"      // a crash, and the disk is as it was earlier
	DiskHang    Kind = "disk hangs"   // writes block
	DiskFail    Kind = "disk fails"   // writes return an error
	DiskFull    Kind = "disk full"    // Free bytes are left; with 0 writes return ENOSPC
	DiskSlow    Kind = "disk slow"    // Writes a second
	Restart     Kind = "restart"      // in order
	Switchover  Kind = "switchover"   // an operator's, to Site
	ModelServer Kind = "model server" // Site's fails as Mode says
	Remove      Kind = "remove node"  // the node is cut off, removed by an operator, and heard again; later it is wiped and joins
)

// Fault is one fault.
type Fault struct {
	Kind  Kind
	At    time.Duration // after the cluster was healthy for the first time
	For   time.Duration
	Nodes []string `json:",omitempty"`
	Site  string   `json:",omitempty"`
	Rules []Rule   `json:",omitempty"`
	// Resets: the processes are killed and their peers learn of it; otherwise power fails.
	Resets bool  `json:",omitempty"`
	Writes int   `json:",omitempty"`
	Free   int64 `json:",omitempty"`
	// Mode of the model server: a Share of the requests fails, streams after some tokens.
	Mode  modelsim.Mode `json:",omitempty"`
	After int           `json:",omitempty"`
	Share float64       `json:",omitempty"`
	// Await: not before every node says that the cluster is healthy. An operator who wipes
	// disks in a row does the same. If it doesn't within a minute, the fault is left out.
	Await bool `json:",omitempty"`
}

func (f Fault) String() string {
	s := fmt.Sprintf("at %s for %s: %s", f.At, f.For, f.Kind)
	if len(f.Nodes) > 0 {
		s += " " + strings.Join(f.Nodes, " and ")
	}
	if f.Site != "" {
		s += " " + f.Site
	}
	for i := range f.Rules {
		s += "; " + f.Rules[i].String()
	}
	if f.Kind == DiskFull {
		s += fmt.Sprintf(" %d MiB left", f.Free>>20)
	}
	if f.Kind == ModelServer {
		s += fmt.Sprintf(" %s after %d tokens, %.0f %%", f.Mode, f.After, 100*f.Share)
	}
	if f.Writes > 0 {
		s += fmt.Sprintf(" %d writes/s", f.Writes)
	}
	if f.Await {
		s += " (when healthy)"
	}
	return s
}

func (p *Plan) String() string {
	s := fmt.Sprintf("seed %d, nodes %v, a job of up to %d bytes each %s at each site", p.Seed, p.Nodes, p.Body, p.Every)
	if len(p.Sites) > 0 {
		s += " of " + strings.Join(p.Sites, " and ")
	}
	if p.Upgrade {
		s += ", after a rolling restart"
	}
	for _, f := range p.Faults {
		s += "\n  " + f.String()
	}
	return s
}

// losesDisk reports whether what only this node had may be gone afterwards.
func (f Fault) losesDisk() bool { return f.Kind == Wipe || f.Kind == Restore || f.Kind == Remove }

const (
	faultsBegin = 5 * time.Second
	faultsEnd   = 75 * time.Second
	longest     = 45 * time.Second
)

// newPlan makes a plan from a seed.
func newPlan(seed uint64) *Plan {
	r := rand.New(rand.NewPCG(seed, 0x5eed))
	p := &Plan{Seed: seed, Nodes: []int{1, 1, 1}, Every: time.Duration(100+r.IntN(900)) * time.Millisecond, Body: 200 << r.IntN(6), Upgrade: r.IntN(2) == 0}
	if r.IntN(3) == 0 {
		p.Nodes = []int{2, 2, 2}
	}
	g := generator{r, p}
	if r.IntN(3) > 0 { // the load is not the same everywhere
		for _, i := range r.Perm(len(p.Nodes))[:1+r.IntN(2)] {
			p.Sites = append(p.Sites, siteNames[i].name)
		}
	}
	switch n := 1 + r.IntN(4); {
	case r.IntN(4) == 0:
		p.Faults = g.series()
	default:
		for range n {
			p.Faults = append(p.Faults, g.fault())
		}
	}
	if f, has := modelFault(seed); has {
		p.Faults = append(p.Faults, f)
	}
	slices.SortStableFunc(p.Faults, func(a, b Fault) int { return cmp.Compare(a.At, b.At) })
	return p
}

// modelFault draws from numbers of its own, so that it comes on top of what the seed brings.
func modelFault(seed uint64) (Fault, bool) {
	g := generator{Rand: rand.New(rand.NewPCG(seed, 0x30de1))}
	f := Fault{
		Kind: ModelServer, Site: siteNames[g.IntN(len(siteNames))].name, At: faultsBegin + g.lasting(0, faultsEnd-faultsBegin), For: g.lasting(time.Second, 20*time.Second),
		Mode: pick(g.Rand, modelsim.Refuse, modelsim.HTTP500, modelsim.HTTP503, modelsim.ResetBefore, modelsim.ResetAfter, modelsim.ResetAfter,
			modelsim.TruncatedBody, modelsim.ErrorEvent, modelsim.SilentEnd, modelsim.MissingDone),
		After: g.IntN(streamTokens), Share: 0.3 + 0.7*g.Float64(),
	}
	return f, g.IntN(2) == 0
}

type generator struct {
	*rand.Rand
	plan *Plan
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// place is a site's index. The first site, which begins as the primary, comes more often:
// most depends on it.
func (g generator) place() int {
	if g.IntN(3) == 0 {
		return 0
	}
	return g.IntN(len(g.plan.Nodes))
}

func (g generator) site() string { return siteNames[g.place()].name }

func (g generator) node() string {
	i := g.place()
	return nodeName(siteNames[i].name, g.IntN(g.plan.Nodes[i]))
}

func nodeName(site string, number int) string { return fmt.Sprintf("%s-%d", site, number+1) }

// lasting is between the limits, all equally often, for faults that do harm by lasting.
func (g generator) lasting(from, to time.Duration) time.Duration {
	return (from + time.Duration(g.Int64N(int64(to-from)))).Round(100 * time.Millisecond)
}

// duration is between the limits, and short more often than long.
func (g generator) duration(from, to time.Duration) time.Duration {
	x := g.Float64()
	return (from + time.Duration(x*x*float64(to-from))).Round(100 * time.Millisecond)
}

func (g generator) kind() Kind {
	return pick(g.Rand, Packets, Packets, Packets, Packets, Packets, Packets, Packets, Packets, Crash, Crash, Crash, Wipe, Wipe, Wipe, Restore,
		DiskHang, DiskHang, DiskFail, DiskFull, DiskSlow, DiskSlow, Restart, Switchover, Remove)
}

func (g generator) fault() Fault {
	f := g.of(g.kind())
	f.At = faultsBegin + time.Duration(g.Int64N(int64(faultsEnd-faultsBegin))).Round(100*time.Millisecond)
	return f
}

// series is one kind of fault several times, each when the cluster is healthy again.
func (g generator) series() []Fault {
	kind, at := g.kind(), faultsBegin
	faults := []Fault{}
	for range 2 + g.IntN(3) {
		f := g.of(kind)
		f.At, f.Await = at, true
		f.For = min(f.For, 20*time.Second)
		at += f.For + g.duration(2*time.Second, 20*time.Second)
		faults = append(faults, f)
	}
	return faults
}

func (g generator) of(kind Kind) Fault {
	f := Fault{Kind: kind, For: g.duration(500*time.Millisecond, longest)}
	switch kind {
	case Packets:
		f.Rules, f.For = g.rules(), g.lasting(time.Second, 2*longest)
		if g.IntN(4) == 0 { // a wrong MTU lasts until somebody has found out
			r := Rule{From: g.site(), Over: pick(g.Rand, 500, 800, 1100, 1400), Cut: true}
			f.Rules, f.For = g.directions(r), g.lasting(longest, 2*longest)
		}
	case Crash:
		f.Resets = g.IntN(2) == 0
		if g.IntN(3) == 0 {
			f.Site = g.site()
		} else {
			f.Nodes = []string{g.node()}
		}
		f.For = min(f.For, 40*time.Second)
	case Switchover:
		f.Site, f.For = g.site(), 0
	case Wipe, Restore:
		f.Nodes, f.Await = []string{g.node()}, true
		f.For = min(f.For, 20*time.Second)
	case DiskSlow:
		f.Nodes, f.Writes, f.For = []string{g.node()}, 2+g.IntN(10), g.lasting(5*time.Second, longest)
	case Remove:
		f.Nodes, f.For, f.Await = []string{g.node()}, 10*time.Second+min(f.For, 20*time.Second), true
	case DiskHang:
		f.Nodes = []string{g.node()}
		f.For = min(f.For, 20*time.Second)
	case DiskFull:
		f.Nodes, f.Free = []string{g.node()}, pick[int64](g.Rand, 0, 50<<20, 100<<20, 200<<20)
	case DiskFail, Restart:
		f.Nodes = []string{g.node()}
	}
	return f
}

// rules are a fault of the network: which packets of whom, and what happens to them.
func (g generator) rules() []Rule {
	place := g.site
	if g.IntN(2) == 0 {
		place = g.node
	}
	r := Rule{From: place()}
	switch g.IntN(9) {
	case 0:
		r.From = "" // everywhere
	case 1, 2, 3:
		for r.To = place(); r.To == r.From; {
			r.To = place()
		}
	}
	switch g.IntN(8) {
	case 0, 1:
		r.Traffic = pick(g.Rand, "raft", "grpc", "http", GossipUDP, GossipTCP)
	case 2, 3, 4, 5:
		r.Over = pick(g.Rand, 300, 500, 800, 1100, 1400, 4000)
	}
	switch g.IntN(8) {
	case 0:
		r.Loss = 0.01 + 0.3*g.Float64()
	case 1:
		r.Delay, r.Jitter = g.duration(10*time.Millisecond, 500*time.Millisecond), g.duration(time.Millisecond, 500*time.Millisecond)
	default:
		r.Cut = true
	}
	return g.directions(r)
}

// directions are a rule for packets there, back, or both.
func (g generator) directions(r Rule) []Rule {
	back := r
	back.From, back.To = r.To, r.From
	switch g.IntN(4) {
	case 0:
		return []Rule{r}
	case 1:
		return []Rule{back}
	}
	return []Rule{r, back}
}
