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

// reign is the agreed primary with its epoch, one register.
type reign struct {
	site  string
	epoch uint64
}

// reignOp is a read, or a promotion of a site by a switchover or by the cluster
// itself, from an epoch that is known or (0) not.
type reignOp struct {
	read bool
	site string
	from uint64
}

// reignSeen is what came of it. A promotion that was refused changed nothing;
// one that may have been made takes effect at any later time, or never.
type reignSeen struct {
	reign
	refused, maybe bool
}

var reignModel = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{reign{"shanghai-a", 1}} },
	Step: func(state, input, output any) []any {
		is, op, got := state.(reign), input.(reignOp), output.(reignSeen)
		next := reign{op.site, is.epoch + 1}
		fits := op.from == 0 || op.from == is.epoch
		switch {
		case op.read && got.reign == is:
			return []any{is}
		case op.read:
			return nil
		case got.refused:
			return []any{is}
		case got.maybe && fits:
			return []any{is, next}
		case got.maybe:
			return []any{is}
		case fits && got.reign == next:
			return []any{next}
		}
		return nil
	},
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string {
		return fmt.Sprintf("%+v → %+v", in, out)
	},
}).ToModel()

// The model refuses what must not be.
func TestReignModelRefuses(t *testing.T) {
	at := func(call, ret int64, op reignOp, got reignSeen) porcupine.Operation {
		return porcupine.Operation{ClientId: int(call), Input: op, Output: got, Call: call, Return: ret}
	}
	toB, toC := reignOp{site: "b", from: 1}, reignOp{site: "c", from: 1}
	made := func(site string, epoch uint64) reignSeen { return reignSeen{reign: reign{site, epoch}} }
	read := reignOp{read: true}
	for name, c := range map[string]struct {
		ops []porcupine.Operation
		ok  bool
	}{
		"one of two":           {[]porcupine.Operation{at(1, 9, toB, made("b", 2)), at(2, 8, toC, reignSeen{refused: true}), at(10, 11, read, made("b", 2))}, true},
		"two from one epoch":   {[]porcupine.Operation{at(1, 9, toB, made("b", 2)), at(2, 8, toC, made("c", 2))}, false},
		"lost, and made":       {[]porcupine.Operation{at(1, 99, reignOp{site: "b"}, reignSeen{maybe: true}), at(10, 11, read, made("b", 2))}, true},
		"refused, and made":    {[]porcupine.Operation{at(1, 9, toB, reignSeen{refused: true}), at(10, 11, read, made("b", 2))}, false},
		"read of an old epoch": {[]porcupine.Operation{at(1, 2, toB, made("b", 2)), at(3, 4, read, made("shanghai-a", 1))}, false},
		"epoch skipped":        {[]porcupine.Operation{at(1, 2, toB, made("b", 3))}, false},
		"nobody promoted it":   {[]porcupine.Operation{at(1, 2, read, made("c", 2))}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := porcupine.CheckOperations(reignModel, c.ops); got != c.ok {
				t.Errorf("linearizable: %v, want %v", got, c.ok)
			}
		})
	}
}

// Under random faults clients in all sites switch over and read through the log:
// what they see of primary and epoch is one order of events. LAB_SEED repeats
// the faults and the questions.
func TestFailoverIsLinearizable(t *testing.T) {
	lasts := 12 * time.Second // more of it, in virtual time, is in package failover
	if full() {
		lasts = 5 * time.Minute
	}
	s := begin(t, lab.Topology{})
	book := &chronicle{}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i, n := range s.lab.Nodes() {
		seed := s.lab.Random.Uint64()
		wg.Go(func() { book.client(ctx, s.lab, i, n, seed) })
	}
	var faults []string
	var killed []*lab.Site // whose clients, and no others, may have failed
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
	book.addUnplanned(s.lab.Observer.Between(time.Time{}, time.Now()))
	_, epoch, _ := s.primary()
	t.Logf("%s; epoch %d in the end", book.summary(), epoch)
	if res := porcupine.CheckOperationsTimeout(reignModel, book.ops, 2*time.Minute); res != porcupine.Ok {
		t.Errorf("the history of %d operations is %s", len(book.ops), res)
		for _, op := range book.ops {
			t.Logf("%d: %d–%d %s", op.ClientId, op.Call, op.Return, reignModel.DescribeOperation(op.Input, op.Output))
		}
	}
	s.end(killed...)
}

// randomFault makes one fault for some seconds, ends it, and names it.
func (s *story) randomFault() (*lab.Site, string) {
	s.t.Helper()
	random, sites := s.lab.Random, s.lab.Sites
	site, other := sites[random.IntN(len(sites))], 0
	for other = random.IntN(len(sites)); other == site.Index; {
		other = random.IntN(len(sites))
	}
	lasts := time.Duration(500+random.IntN(6000)) * time.Millisecond
	calm := time.Duration(random.IntN(4000)) * time.Millisecond
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
	s.waitUntil(time.Now().Add(calm))
	return site, fmt.Sprintf("%s %s for %v", site.Name, what, lasts)
}

// chronicle is the history of what clients did and saw.
type chronicle struct {
	mu      sync.Mutex // guards all below
	ops     []porcupine.Operation
	reads   int
	made    int // switchovers
	refused int
	maybe   int
	lost    int // promotions by the cluster itself
}

// never is later than any operation's end.
const never = int64(1) << 62

func (b *chronicle) add(client int, op reignOp, call, end time.Time, got reignSeen) {
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

// client reads and switches over at one node until ctx ends.
func (b *chronicle) client(ctx context.Context, l *lab.Lab, id int, n *lab.Node, seed uint64) {
	random := rand.New(rand.NewPCG(seed, uint64(id)))
	for round := 0; ctx.Err() == nil; round++ {
		pause := time.NewTimer(time.Duration(200+random.IntN(1200)) * time.Millisecond)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
		// A question that was asked is answered, or its outcome is unknown.
		ask, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		if random.IntN(3) > 0 {
			b.read(ask, l, id, n, round)
		} else {
			b.switchOver(ask, id, n, l.Sites[random.IntN(len(l.Sites))].Name)
		}
		cancel()
	}
}

// read reads through the log: a change returns once this node has applied it,
// so a status after it is as new as the change at least.
func (b *chronicle) read(ctx context.Context, l *lab.Lab, id int, n *lab.Node, round int) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	call := time.Now()
	if err := n.ApplyConfig(ctx, fmt.Sprintf("%s# %s asks for the %dth time\n", l.ClusterYAML(), n.Name, round)); err != nil {
		return
	}
	status, err := n.Status(ctx)
	if err != nil || status.Primary == nil {
		return
	}
	b.add(id, reignOp{read: true}, call, time.Now(), reignSeen{reign: reign{status.Primary.Site, status.Primary.Epoch}})
}

// switchOver asks for another primary. What the answer says must be so: made in
// that epoch, or not at all.
func (b *chronicle) switchOver(ctx context.Context, id int, n *lab.Node, to string) {
	call := time.Now()
	result, err := n.Switchover(ctx, to)
	op := reignOp{site: to}
	var no *lab.Refused
	switch {
	case err == nil:
		op.from = result.Epoch - 1
		b.add(id, op, call, time.Now(), reignSeen{reign: reign{to, result.Epoch}})
	case errors.As(err, &no) && (no.Code == "precheck_failed" || no.Code == "rolled_back"):
		b.add(id, op, call, time.Now(), reignSeen{refused: true})
	default:
		b.add(id, op, call, time.Now(), reignSeen{maybe: true})
	}
}

// addUnplanned adds the promotions that nobody asked for, as operations whose
// outcome is unknown: who saw such an epoch first can't say when it began, only
// that nobody had asked before the one before it was seen.
func (b *chronicle) addUnplanned(seen []lab.Observation) {
	b.mu.Lock()
	defer b.mu.Unlock()
	known := map[reign]bool{{"shanghai-a", 1}: true}
	var begun int64
	if len(b.ops) > 0 {
		begun = slices.MinFunc(b.ops, func(x, y porcupine.Operation) int { return cmp.Compare(x.Call, y.Call) }).Call
	}
	for _, op := range b.ops {
		if got := op.Output.(reignSeen); !op.Input.(reignOp).read && !got.refused && !got.maybe {
			known[got.reign] = true
		}
	}
	for _, s := range seen {
		is := reign{s.Primary, s.Epoch}
		if s.Err != nil || s.Epoch == 0 || known[is] {
			continue
		}
		known[is] = true
		b.lost++
		b.ops = append(b.ops, porcupine.Operation{
			ClientId: 100 + b.lost, Input: reignOp{site: is.site, from: is.epoch - 1},
			Output: reignSeen{maybe: true}, Call: begun, Return: never,
		})
	}
}

func (b *chronicle) summary() string {
	return fmt.Sprintf("%d reads, %d switchovers made, %d refused, %d unknown, %d promotions by the cluster itself", b.reads, b.made, b.refused, b.maybe, b.lost)
}
