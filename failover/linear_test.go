package failover

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// register is the agreed primary as one register: (site, epoch). A promotion expects an
// epoch. Its answer may be lost: then it was made or not.
type register struct {
	site  string
	epoch uint64
}

type primaryOp struct {
	read   bool
	site   string // to promote
	expect uint64
}

type primaryAnswer struct {
	register       // of a read
	refused, maybe bool
}

var primaryModel = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{register{"a", 1}} },
	Step: func(state, input, output any) []any {
		is, op, got := state.(register), input.(primaryOp), output.(primaryAnswer)
		next := register{op.site, op.expect + 1}
		switch {
		case op.read && got.maybe:
			return []any{is}
		case op.read && got.register == is:
			return []any{is}
		case op.read:
			return nil
		case got.maybe && op.expect == is.epoch:
			return []any{is, next}
		case got.maybe:
			return []any{is}
		case got.refused && op.expect != is.epoch:
			return []any{is}
		case !got.refused && op.expect == is.epoch:
			return []any{next}
		}
		return nil
	},
	Equal:             func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string { return fmt.Sprintf("%+v → %+v", in, out) },
}).ToModel()

// history records the operations of the clients.
type history struct {
	mu  sync.Mutex // guards ops
	ops []porcupine.Operation
}

func (c *history) add(client int, op primaryOp, from time.Time, got primaryAnswer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	end := time.Now()
	if got.maybe {
		end = end.Add(24 * time.Hour) // it may take effect at any later time
	}
	c.ops = append(c.ops, porcupine.Operation{
		ClientId: client, Input: op, Output: got, Call: from.UnixNano(), Return: end.UnixNano(),
	})
}

func TestPrimaryIsLinearizableUnderFaults(t *testing.T) {
	for seed := range uint64(5) {
		simulate(t, twos(100+seed), func(t *testing.T, w *world) {
			var h history
			h.add(0, primaryOp{read: true}, time.Now(), primaryAnswer{register: register{"a", 1}})
			w.mu.Lock()
			w.forget = 0.2
			w.mu.Unlock()
			ctx, stop := context.WithCancel(t.Context())
			var clients sync.WaitGroup
			// The coordinators promote too. Their entries are added below as promotions of
			// clients whose answers are lost.
			for i, name := range w.names {
				clients.Go(func() { w.client(ctx, &h, i+1, name) })
			}
			for i := range 12 {
				switch w.pick(4) {
				case 0:
					site := []string{"a", "b", "c"}[w.pick(3)]
					w.kill(w.siteNodes(site)...)
					w.pass(time.Duration(2+w.pick(8)) * time.Second)
					w.restart(w.siteNodes(site)...)
				case 1:
					w.sever(true, "a>b", "b>a", "a>c", "c>a")
					w.pass(time.Duration(1+w.pick(8)) * time.Second)
					w.sever(false, "a>b", "b>a", "a>c", "c>a")
				case 2:
					name := w.names[w.pick(len(w.names))]
					w.pause(name)
					w.pass(time.Duration(1+w.pick(8)) * time.Second)
					w.resume(name)
				case 3:
					w.sever(true, "b>c")
					w.pass(time.Duration(1+w.pick(8)) * time.Second)
					w.sever(false, "b>c")
				}
				w.pass(time.Duration(i%4) * time.Second)
			}
			stop()
			clients.Wait()
			w.mu.Lock()
			for i, s := range w.states[1:] {
				if f := s.LastFailover; s.Primary != w.states[i].Primary && f.Kind == agreed.FailoverUnplanned {
					h.ops = append(h.ops, porcupine.Operation{
						ClientId: 50 + i, Input: primaryOp{site: f.To, expect: f.Epoch - 1}, Output: primaryAnswer{maybe: true},
						Call: f.At.Add(-time.Second).UnixNano(), Return: time.Now().Add(24 * time.Hour).UnixNano(),
					})
				}
			}
			w.mu.Unlock()
			t.Logf("%d operations, epoch %d in the end", len(h.ops), w.agreed().Primary.Epoch)
			if res := porcupine.CheckOperationsTimeout(primaryModel, h.ops, time.Minute); res != porcupine.Ok {
				t.Errorf("the history of %d operations is %s", len(h.ops), res)
			}
		})
	}
}

// client promotes and reads through the log of one node until ctx ends.
func (w *world) client(ctx context.Context, h *history, id int, name string) {
	n := w.nodes[name]
	for ctx.Err() == nil {
		if wait(ctx, time.Duration(500+w.pick(2000))*time.Millisecond) != nil {
			return
		}
		w.mu.Lock()
		alive := n.runs()
		known := w.states[n.applied].Primary.Epoch
		w.mu.Unlock()
		if !alive {
			continue
		}
		began := time.Now()
		pctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		if w.pick(3) > 0 {
			got := n.readThroughLog(pctx)
			h.add(id, primaryOp{read: true}, began, got)
		} else {
			op := primaryOp{site: []string{"a", "b", "c"}[w.pick(3)], expect: known}
			_, err := n.Propose(pctx, agreed.CmdPromote, agreed.Promote{
				Site: op.site, ExpectEpoch: op.expect, Generation: 1, Kind: agreed.FailoverPlanned,
			})
			h.add(id, op, began, primaryAnswer{
				refused: errors.Is(err, agreed.ErrStaleEpoch),
				maybe:   err != nil && !errors.Is(err, agreed.ErrStaleEpoch),
			})
		}
		cancel()
	}
}

// readThroughLog commits an entry that changes nothing and reads what this node has
// applied by then.
func (n *node) readThroughLog(ctx context.Context) primaryAnswer {
	if _, err := n.Propose(ctx, agreed.CmdTick, nil); err != nil {
		return primaryAnswer{maybe: true}
	}
	p := n.State().Primary
	return primaryAnswer{register: register{p.Site, p.Epoch}}
}

func (w *world) pick(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rng.IntN(n)
}

// The model refuses two promotions of one epoch, an epoch that falls, and a read of a
// primary that was never promoted.
func TestPrimaryModelRefuses(t *testing.T) {
	at := func(call, ret int64, op primaryOp, got primaryAnswer) porcupine.Operation {
		return porcupine.Operation{ClientId: int(call), Input: op, Output: got, Call: call, Return: ret}
	}
	toB, toC := primaryOp{site: "b", expect: 1}, primaryOp{site: "c", expect: 1}
	read := primaryOp{read: true}
	saw := func(site string, epoch uint64) primaryAnswer { return primaryAnswer{register: register{site, epoch}} }
	for name, c := range map[string]struct {
		ops []porcupine.Operation
		ok  bool
	}{
		"one of two promotions is made": {[]porcupine.Operation{
			at(1, 9, toB, primaryAnswer{}), at(2, 8, toC, primaryAnswer{refused: true}), at(10, 11, read, saw("b", 2)),
		}, true},
		"two promotions of one epoch": {[]porcupine.Operation{at(1, 9, toB, primaryAnswer{}), at(2, 8, toC, primaryAnswer{})}, false},
		"lost, but made":              {[]porcupine.Operation{at(1, 99, toB, primaryAnswer{maybe: true}), at(10, 11, read, saw("b", 2))}, true},
		"lost, made later":            {[]porcupine.Operation{at(1, 99, toB, primaryAnswer{maybe: true}), at(10, 11, read, saw("a", 1)), at(12, 13, read, saw("b", 2))}, true},
		"an old epoch read":           {[]porcupine.Operation{at(1, 2, toB, primaryAnswer{}), at(3, 4, read, saw("a", 1))}, false},
		"refused without a cause":     {[]porcupine.Operation{at(1, 2, toB, primaryAnswer{refused: true})}, false},
		"read, but never promoted":    {[]porcupine.Operation{at(1, 2, read, saw("c", 2))}, false},
		"epoch skipped":               {[]porcupine.Operation{at(1, 2, toB, primaryAnswer{}), at(3, 4, read, saw("b", 3))}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := porcupine.CheckOperations(primaryModel, c.ops); got != c.ok {
				t.Errorf("linearizable: %v, want %v", got, c.ok)
			}
		})
	}
}
