package replication

import (
	"bytes"
	"errors"
	"maps"
	"sync"
	"testing"
)

// Every item reaches every other node and does not return to its sender. It arrives once,
// unless a call broke with unacknowledged items: those are sent again.
func TestFeedReachesEveryNode(t *testing.T) {
	w := newWorld(t, "a1", "a2", "b1", "b2", "c1")
	got, mu := w.collect()
	w.start()
	feed := w.nodes["a1"].repl.feed
	eventually(t, "a1 has outboxes for a neighbour and two sites", func() bool {
		feed.mu.Lock()
		defer feed.mu.Unlock()
		return len(feed.outboxes) == 3
	})
	for _, name := range []string{"b1", "b2"} {
		other := w.nodes[name].repl.feed
		eventually(t, "b can forward", func() bool {
			other.mu.Lock()
			defer other.mu.Unlock()
			return len(other.outboxes) == 3
		})
	}
	want := map[byte]bool{}
	for i := range byte(20) {
		if err := w.nodes["a1"].repl.Offer(bytes.Repeat([]byte{i}, 100_000)); err != nil {
			t.Fatal(err)
		}
		want[i] = true
	}
	for _, name := range []string{"a2", "b1", "b2", "c1"} {
		eventually(t, name+" has all items", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return maps.Equal(got[name], want)
		})
	}
	if n := len(got["a1"]); n != 0 {
		t.Errorf("%d items returned to their sender", n)
	}
	if err := w.nodes["a1"].repl.Offer(make([]byte, MaxFeedItem+1)); !errors.Is(err, ErrFeedItem) {
		t.Errorf("offering an item that is too large: %v", err)
	}
}

// collect records the items delivered to each node, by their first byte; the lock guards
// the result. Call it before the nodes start.
func (w *world) collect() (map[string]map[byte]bool, *sync.Mutex) {
	var mu sync.Mutex
	got := map[string]map[byte]bool{}
	w.tune = func(n *node) {
		got[n.name] = map[byte]bool{}
		n.deliver = func(item []byte) {
			mu.Lock()
			defer mu.Unlock()
			got[n.name][item[0]] = true
		}
	}
	return got, &mu
}

// Items offered while a site is away wait for it, within the limit, and items that were
// unacknowledged when it left are sent again.
func TestFeedWaitsForASiteThatIsAway(t *testing.T) {
	w := newWorld(t, "a1", "b1", "c1")
	got, mu := w.collect()
	w.start()
	feed := w.nodes["a1"].repl.feed
	sendsTo := func(site string) string {
		feed.mu.Lock()
		defer feed.mu.Unlock()
		if l := feed.outboxes[feedTarget{site: site}]; l != nil {
			return l.to
		}
		return ""
	}
	to := w.nodes["c1"].site
	eventually(t, "a1 sends to the site", func() bool { return sendsTo(to) == "c1" })
	w.isolate(to, true)
	for i := range byte(200) {
		if err := w.nodes["a1"].repl.Offer(bytes.Repeat([]byte{i}, 5000)); err != nil {
			t.Fatal(err)
		}
	}
	all := func(name string) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(got[name]) == 200
		}
	}
	eventually(t, "the other site has all items", all("b1"))
	eventually(t, "a1 knows that the site is away", func() bool { return sendsTo(to) == "" })
	w.isolate(to, false)
	eventually(t, "the site that was away has all items", all("c1"))
}

// Requeued items go before new ones, oldest first; without space for all, the oldest are
// dropped.
func TestRequeue(t *testing.T) {
	l := &outbox{wake: make(chan struct{}, 1)}
	item := func(n byte, size int) feedItem { return feedItem{data: bytes.Repeat([]byte{n}, size)} }
	l.push(item(4, feedQueue-2000))
	if n := l.requeue([]feedItem{item(1, 1000), item(2, 1000), item(3, 1000)}); n != 1 {
		t.Errorf("%d items were dropped", n)
	}
	for _, want := range []byte{2, 3, 4} {
		if got, ok := l.pop(); !ok || got.data[0] != want {
			t.Errorf("got %v, want %d", got.data[:1], want)
		}
	}
	if _, ok := l.pop(); ok || l.bytes != 0 {
		t.Errorf("%d bytes are left", l.bytes)
	}
}

func TestOutboxDropsTheOldest(t *testing.T) {
	l := &outbox{wake: make(chan struct{}, 1)}
	dropped := 0
	const items = feedQueue/(1<<20) + 5
	for i := range items {
		dropped += l.push(feedItem{data: bytes.Repeat([]byte{byte(i)}, 1<<20)})
	}
	if dropped != 5 || l.bytes != feedQueue {
		t.Fatalf("%d dropped, %d bytes left", dropped, l.bytes)
	}
	for i := 5; i < items; i++ {
		if item, ok := l.pop(); !ok || item.data[0] != byte(i) {
			t.Fatalf("item %d is in the wrong place", i)
		}
	}
	for range feedItems + 7 {
		dropped += l.push(feedItem{data: []byte{1}})
	}
	if dropped != 5+7 || len(l.items) != feedItems {
		t.Errorf("%d dropped, %d left", dropped, len(l.items))
	}
}
