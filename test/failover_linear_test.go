//go:build linux

package test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/dsnode/dsnode/test/lab"
)

// primaryState is the agreed primary and its epoch, as one register.
type primaryState struct {
	site  string
	epoch uint64
}

// primaryOp is a read, or a promotion of a site by a switchover or by the cluster. The
// epoch before the promotion is 0 if it is not known.
type primaryOp struct {
	read bool
	site string
	from uint64
}

// primaryResult is the result of an operation. A refused promotion changed nothing. A
// promotion with an unknown result takes effect at some later time or never.
type primaryResult struct {
	primaryState
	refused, maybe bool
}

var primaryModel = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{primaryState{"shanghai-a", 1}} },
	Step: func(state, input, output any) []any {
		is, op, got := state.(primaryState), input.(primaryOp), output.(primaryResult)
		next := primaryState{op.site, is.epoch + 1}
		fits := op.from == 0 || op.from == is.epoch
		switch {
		case op.read && got.primaryState == is:
			return []any{is}
		case op.read:
			return nil
		case got.refused:
			return []any{is}
		case got.maybe && fits:
			return []any{is, next}
		case got.maybe:
			return []any{is}
		case fits && got.primaryState == next:
			return []any{next}
		}
		return nil
	},
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string {
		return fmt.Sprintf("%+v → %+v", in, out)
	},
}).ToModel()

// The model accepts histories that are linearizable, and no others.
func TestPrimaryModelRefuses(t *testing.T) {
	at := func(call, ret int64, op primaryOp, got primaryResult) porcupine.Operation {
		return porcupine.Operation{ClientId: int(call), Input: op, Output: got, Call: call, Return: ret}
	}
	toB, toC := primaryOp{site: "b", from: 1}, primaryOp{site: "c", from: 1}
	made := func(site string, epoch uint64) primaryResult {
		return primaryResult{primaryState: primaryState{site, epoch}}
	}
	read := primaryOp{read: true}
	for name, c := range map[string]struct {
		ops []porcupine.Operation
		ok  bool
	}{
		"one of two":           {[]porcupine.Operation{at(1, 9, toB, made("b", 2)), at(2, 8, toC, primaryResult{refused: true}), at(10, 11, read, made("b", 2))}, true},
		"two from one epoch":   {[]porcupine.Operation{at(1, 9, toB, made("b", 2)), at(2, 8, toC, made("c", 2))}, false},
		"lost, and made":       {[]porcupine.Operation{at(1, 99, primaryOp{site: "b"}, primaryResult{maybe: true}), at(10, 11, read, made("b", 2))}, true},
		"refused, and made":    {[]porcupine.Operation{at(1, 9, toB, primaryResult{refused: true}), at(10, 11, read, made("b", 2))}, false},
		"read of an old epoch": {[]porcupine.Operation{at(1, 2, toB, made("b", 2)), at(3, 4, read, made("shanghai-a", 1))}, false},
		"epoch skipped":        {[]porcupine.Operation{at(1, 2, toB, made("b", 3))}, false},
		"never promoted":       {[]porcupine.Operation{at(1, 2, read, made("c", 2))}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := porcupine.CheckOperations(primaryModel, c.ops); got != c.ok {
				t.Errorf("linearizable: %v, want %v", got, c.ok)
			}
		})
	}
}

// Under random faults, clients in all sites request switchovers and read through the
// log. What they see of primary and epoch is linearizable. LAB_SEED repeats the faults
// and the requests.
func TestFailoverIsLinearizable(t *testing.T) {
	lasts := 12 * time.Second // package failover tests longer, in virtual time
	if full() {
		lasts = 5 * time.Minute
	}
	s := begin(t, lab.Topology{})
	history := &primaryHistory{}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i, n := range s.lab.Nodes() {
		seed := s.lab.Random.Uint64()
		wg.Go(func() { history.client(ctx, s.lab, i, n, seed) })
	}
	var faults []string
	var killed []*lab.Site // only their clients may fail
	for until := time.Now().Add(lasts); time.Now().Before(until); {
		site, what := s.randomFault()
		if faults = append(faults, what); strings.Contains(what, "killed") {
			killed = append(killed, site)
		}
	}
	stop()
	wg.Wait()
	t.Logf("faults: %s", strings.Join(faults, ", "))
	s.lab.WaitHealthy(within(returns))
	history.addUnplanned(s.lab.Observer.Between(time.Time{}, time.Now()))
	_, epoch, _ := s.primary()
	t.Logf("%s; the last epoch is %d", history.summary(), epoch)
	if res := porcupine.CheckOperationsTimeout(primaryModel, history.ops, 2*time.Minute); res != porcupine.Ok {
		t.Errorf("the history of %d operations is %s", len(history.ops), res)
		for _, op := range history.ops {
			t.Logf("%d: %d–%d %s", op.ClientId, op.Call, op.Return, primaryModel.DescribeOperation(op.Input, op.Output))
		}
	}
	s.end(killed...)
}

// randomFault causes a fault, ends it after some seconds, and describes it.
func (s *scenario) randomFault() (*lab.Site, string) {
	s.t.Helper()
	random, sites := s.lab.Random, s.lab.Sites
	site, other := sites[random.IntN(len(sites))], 0
	for other = random.IntN(len(sites)); other == site.Index; {
		other = random.IntN(len(sites))
	}
	lasts := time.Duration(500+random.IntN(6000)) * time.Millisecond
	rest := time.Duration(random.IntN(4000)) * time.Millisecond
	what := ""
	switch random.IntN(4) {
	case 0:
		what = "killed"
		site.Kill()
		s.waitUntil(time.Now().Add(lasts))
		site.Start()
	case 1:
		what = "stopped"
		site.Stop()
		s.waitUntil(time.Now().Add(lasts))
		site.Continue()
	case 2:
		what = "isolated"
		s.lab.Net.Isolate(site.Index)
		s.waitUntil(time.Now().Add(lasts))
		s.lab.Net.MendAll()
	case 3:
		what = "not heard in " + sites[other].Name
		s.lab.Net.Cut(site.Index, other)
		s.waitUntil(time.Now().Add(lasts))
		s.lab.Net.MendAll()
	}
	s.waitUntil(time.Now().Add(rest))
	return site, fmt.Sprintf("%s %s for %v", site.Name, what, lasts)
}

// primaryHistory records the operations of clients.
type primaryHistory struct {
	mu      sync.Mutex // guards all below
	ops     []porcupine.Operation
	reads   int
	made    int // switchovers that succeeded
	refused int
	maybe   int
	lost    int // promotions by the cluster, after a loss
}

// never is later than the end of any operation.
const never = int64(1) << 62

func (b *primaryHistory) add(client int, op primaryOp, call, end time.Time, got primaryResult) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ret := end.UnixNano()
	switch {
	case op.read:
		b.reads++
	case got.refused:
		b.refused++
	case got.maybe:
		b.maybe++
		ret = never
	default:
		b.made++
	}
	b.ops = append(b.ops, porcupine.Operation{ClientId: client, Input: op, Output: got, Call: call.UnixNano(), Return: ret})
}

// client reads from and requests switchovers of one node until ctx ends.
func (b *primaryHistory) client(ctx context.Context, l *lab.Lab, id int, n *lab.Node, seed uint64) {
	random := rand.New(rand.NewPCG(seed, uint64(id)))
	for round := 0; ctx.Err() == nil; round++ {
		pause := time.NewTimer(time.Duration(200+random.IntN(1200)) * time.Millisecond)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
		// The end of ctx must not cut off a request: its result would be unknown.
		ask, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		if random.IntN(3) > 0 {
			b.read(ask, l, id, n, round)
		} else {
			b.switchOver(ask, id, n, l.Sites[random.IntN(len(l.Sites))].Name)
		}
		cancel()
	}
}

// read reads through the log: a change of the configuration returns once this node has
// applied it, so a status asked for after that is at least as new as the change.
func (b *primaryHistory) read(ctx context.Context, l *lab.Lab, id int, n *lab.Node, round int) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	call := time.Now()
	if err := n.ApplyConfig(ctx, fmt.Sprintf("%s# read at %s, round %d\n", l.ClusterYAML(), n.Name, round)); err != nil {
		return
	}
	status, err := n.Status(ctx)
	if err != nil || status.Primary == nil {
		return
	}
	b.add(id, primaryOp{read: true}, call, time.Now(), primaryResult{primaryState: primaryState{status.Primary.Site, status.Primary.Epoch}})
}

// switchOver requests a switchover. It was made, in the epoch of the answer, or it was
// refused and changed nothing, or its result is unknown.
func (b *primaryHistory) switchOver(ctx context.Context, id int, n *lab.Node, to string) {
	call := time.Now()
	result, err := n.Switchover(ctx, to)
	op := primaryOp{site: to}
	var no *lab.Refused
	switch {
	case err == nil:
		op.from = result.Epoch - 1
		b.add(id, op, call, time.Now(), primaryResult{primaryState: primaryState{to, result.Epoch}})
	case errors.As(err, &no) && (no.Code == "precheck_failed" || no.Code == "rolled_back"):
		b.add(id, op, call, time.Now(), primaryResult{refused: true})
	default:
		b.add(id, op, call, time.Now(), primaryResult{maybe: true})
	}
}

// addUnplanned adds the promotions that no client requested, as operations with an
// unknown result: when they were made is not known, only that they were seen.
func (b *primaryHistory) addUnplanned(seen []lab.Observation) {
	b.mu.Lock()
	defer b.mu.Unlock()
	known := map[primaryState]bool{{"shanghai-a", 1}: true}
	var begun int64
	if len(b.ops) > 0 {
		begun = slices.MinFunc(b.ops, func(x, y porcupine.Operation) int { return cmp.Compare(x.Call, y.Call) }).Call
	}
	for _, op := range b.ops {
		if got := op.Output.(primaryResult); !op.Input.(primaryOp).read && !got.refused && !got.maybe {
			known[got.primaryState] = true
		}
	}
	for _, s := range seen {
		is := primaryState{s.Primary, s.Epoch}
		if s.Err != nil || s.Epoch == 0 || known[is] {
			continue
		}
		known[is] = true
		b.lost++
		b.ops = append(b.ops, porcupine.Operation{
			ClientId: 100 + b.lost, Input: primaryOp{site: is.site, from: is.epoch - 1},
			Output: primaryResult{maybe: true}, Call: begun, Return: never,
		})
	}
}

func (b *primaryHistory) summary() string {
	return fmt.Sprintf("%d reads; switchovers: %d made, %d refused, %d with an unknown result; %d promotions by the cluster", b.reads, b.made, b.refused, b.maybe, b.lost)
}
