//go:build linux

package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"
)

// RoleWatch asks every node for /healthz/primary every few milliseconds, from
// within the node's site, and records when it answered 200. A load balancer sees
// the role in the same way, so the record shows for how long no site acted as
// primary, and whether two did at once.
type RoleWatch struct {
	mu      sync.Mutex // guards all below
	acting  []Acting
	current map[string]int // index in acting of each node's unfinished run
	samples int
	dropped int
}

// Look is one question; its answer describes a moment between the two times.
type Look struct{ Asked, Answered time.Time }

// Acting is an unbroken run of 200 answers by one process in one epoch.
type Acting struct {
	Site, Node string
	PID        int
	Epoch      uint64
	First      Look // the first 200
	Last       Look // the last 200 so far
	Count      int
}

// maxActing bounds the record. A run ends with a change of the role or with a
// question that gets no 200.
const maxActing = 1 << 16

// roleTimeout bounds a question, so that a node is asked again soon after it was
// stopped and continued. The node then answers the pending question first.
const roleTimeout = 250 * time.Millisecond

// WatchRole begins at once and ends with the test, which fails when law 1 was broken.
func (l *Lab) WatchRole(every time.Duration) *RoleWatch {
	l.t.Helper()
	w := &RoleWatch{current: map[string]int{}}
	stop := l.watchNodes(every, w.look)
	l.t.Cleanup(func() {
		stop()
		for _, broken := range w.Laws() {
			l.t.Errorf("a law was broken: %s", broken)
		}
	})
	return w
}

func (w *RoleWatch) look(ctx context.Context, n *Node) {
	if !n.Running() {
		w.end(n)
		return
	}
	look, pid := Look{Asked: time.Now()}, n.PID()
	epoch, acts := askRole(ctx, n)
	look.Answered = time.Now()
	if ctx.Err() == nil {
		w.note(n, pid, epoch, acts, look)
	}
}

// askRole reports whether the node says that it acts as primary, and its epoch.
func askRole(ctx context.Context, n *Node) (epoch uint64, acts bool) {
	ctx, cancel := context.WithTimeout(ctx, roleTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.API()+"/healthz/primary", nil)
	if err != nil {
		return 0, false
	}
	resp, err := n.Site.http.Do(req)
	if err != nil {
		return 0, false
	}
	defer func() { _ = resp.Body.Close() }() // read to its end
	var says struct{ Epoch uint64 }
	if err := json.NewDecoder(resp.Body).Decode(&says); err != nil {
		return 0, false
	}
	return says.Epoch, resp.StatusCode == http.StatusOK
}

func (w *RoleWatch) end(n *Node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.current, n.Name)
}

func (w *RoleWatch) note(n *Node, pid int, epoch uint64, acts bool, look Look) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.samples++
	if !acts {
		delete(w.current, n.Name)
		return
	}
	if i, known := w.current[n.Name]; known && w.acting[i].PID == pid && w.acting[i].Epoch == epoch {
		w.acting[i].Last = look
		w.acting[i].Count++
		return
	}
	if len(w.acting) >= maxActing {
		w.dropped++
		return
	}
	w.current[n.Name] = len(w.acting)
	w.acting = append(w.acting, Acting{Site: n.Site.Name, Node: n.Name, PID: pid, Epoch: epoch, First: look, Last: look, Count: 1})
}

// Runs returns all runs so far in the order of their first answers.
func (w *RoleWatch) Runs() []Acting {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.acting)
}

// Begun returns the first look at which a node acted as the epoch's primary, and
// false while none has.
func (w *RoleWatch) Begun(epoch uint64) (Look, bool) {
	var first Look
	for _, a := range w.Runs() {
		if a.Epoch == epoch && (first.Asked.IsZero() || a.First.Answered.Before(first.Answered)) {
			first = a.First
		}
	}
	return first, !first.Asked.IsZero()
}

// Idle is an upper bound of the time without an acting primary before an epoch: from
// the last question that a primary of an earlier epoch answered with 200 to the
// first such answer in this epoch. It is false when one of the two is missing.
func (w *RoleWatch) Idle(epoch uint64) (time.Duration, bool) {
	begun, ok := w.Begun(epoch)
	if !ok {
		return 0, false
	}
	var last time.Time
	for _, a := range w.Runs() {
		if a.Epoch < epoch && a.Last.Asked.After(last) {
			last = a.Last.Asked
		}
	}
	return begun.Answered.Sub(last), !last.IsZero()
}

// Acted is a lower bound of the time between two moments in which some node acted as
// primary: from the first to the last answer of each run.
func (w *RoleWatch) Acted(from, to time.Time) time.Duration { return acted(w.Runs(), from, to) }

func acted(runs []Acting, from, to time.Time) time.Duration {
	slices.SortFunc(runs, func(a, b Acting) int { return a.First.Answered.Compare(b.First.Answered) })
	sum := time.Duration(0)
	for _, a := range runs {
		begun, ended := a.First.Answered, a.Last.Asked
		if begun.Before(from) {
			begun = from
		}
		if ended.After(to) {
			ended = to
		}
		if ended.After(begun) {
			sum += ended.Sub(begun)
			from = ended
		}
	}
	return sum
}

// ActsSince reports whether a node was asked after a moment and acted as primary then.
func (w *RoleWatch) ActsSince(since time.Time) bool {
	return slices.ContainsFunc(w.Runs(), func(a Acting) bool { return a.Last.Asked.After(since) })
}

// Gap is the longest time in which a site was not seen to act as primary, from its first
// answer that it does to the last one so far.
func (w *RoleWatch) Gap(site *Site) time.Duration {
	var longest time.Duration
	var last time.Time
	for _, a := range w.Runs() {
		if a.Site != site.Name {
			continue
		}
		if !last.IsZero() {
			longest = max(longest, a.First.Answered.Sub(last))
		}
		if a.Last.Asked.After(last) {
			last = a.Last.Asked
		}
	}
	return longest
}

// Laws describes violations of law 1: two sites acted in one epoch, or a site acted
// after another had acted in a higher epoch.
func (w *RoleWatch) Laws() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	broken := twoActed(w.acting)
	if w.dropped > 0 {
		broken = append(broken, fmt.Sprintf("the record of the role was full: %d runs are missing", w.dropped))
	}
	return broken
}

func twoActed(runs []Acting) []string {
	var broken []string
	for _, old := range runs {
		for _, next := range runs {
			switch {
			case old.Epoch == next.Epoch && old.Site < next.Site:
				broken = append(broken, fmt.Sprintf("law 1: %s and %s both acted as primary in epoch %d", old.Node, next.Node, old.Epoch))
			case old.Epoch < next.Epoch && old.Last.Asked.After(next.First.Answered):
				broken = append(broken, fmt.Sprintf("law 1: %s acted in epoch %d when asked %v after %s had acted in epoch %d",
					old.Node, old.Epoch, old.Last.Asked.Sub(next.First.Answered), next.Node, next.Epoch))
			}
			if len(broken) >= maxBroken {
				return broken
			}
		}
	}
	return broken
}
