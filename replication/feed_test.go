package replication

import (
	"bytes"
	"errors"
	"maps"
	"sync"
	"testing"
)

// Every item reaches every node and comes back to none. It comes once, unless a
// call broke with items on their way: those are sent again.
func TestFeedReachesEveryNode(t *testing.T) {
	w := newWorld(t, "a1", "a2", "b1", "b2", "c1")
	got, mu := w.collect()
	w.start()
	feed := w.nodes["a1"].repl.feed
	eventually(t, "there are lanes to a neighbour and two sites", func() bool {
		feed.mu.Lock()
		defer feed.mu.Unlock()
		return len(feed.lanes) == 3
	})
	for _, name := range []string{"b1", "b2"} {
		other := w.nodes[name].repl.feed
		eventually(t, "b can pass on", func() bool {
			other.mu.Lock()
			defer other.mu.Unlock()
			return len(other.lanes) == 3
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
		eventually(t, name+" has all", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return maps.Equal(got[name], want)
		})
	}
	if n := len(got["a1"]); n != 0 {
		t.Errorf("%d items came back", n)
	}
	if err := w.nodes["a1"].repl.Offer(make([]byte, MaxFeedItem+1)); !errors.Is(err, ErrFeedItem) {
		t.Errorf("too large: %v", err)
	}
}

// collect notes what is delivered to each node, by the first byte; the lock guards
// it. The nodes start afterwards.
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

// TestFeedOfASiteThatWasAway: what was offered meanwhile waits for it, within the
// bound, and what was on its way when it went is sent again.
func TestFeedOfASiteThatWasAway(t *testing.T) {
	w := newWorld(t, "a1", "b1", "c1")
	got, mu := w.collect()
	w.start()
	feed := w.nodes["a1"].repl.feed
	sendsTo := func(site string) string {
		feed.mu.Lock()
		defer feed.mu.Unlock()
		if l := feed.lanes[receiver{site: site}]; l != nil {
			return l.to
		}
		return ""
	}
	to := w.nodes["c1"].site
	eventually(t, "the site is sent to", func() bool { return sendsTo(to) == "c1" })
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
	eventually(t, "the other site has all", all("b1"))
	eventually(t, "it is known to be away", func() bool { return sendsTo(to) == "" })
	w.isolate(to, false)
	eventually(t, "the site that was away has all", all("c1"))
}

// TestWhatDidNotArrive goes before what is new, oldest first; without room for all
// the oldest are lost.
func TestWhatDidNotArrive(t *testing.T) {
	l := &lane{wake: make(chan struct{}, 1)}
	item := func(n byte, size int) feedItem { return feedItem{data: bytes.Repeat([]byte{n}, size)} }
	l.push(item(4, feedQueue-2000))
	if n := l.back([]feedItem{item(1, 1000), item(2, 1000), item(3, 1000)}); n != 1 {
		t.Errorf("%d lost", n)
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

func TestLaneDropsTheOldest(t *testing.T) {
	l := &lane{wake: make(chan struct{}, 1)}
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
			t.Fatalf("item %d is not where it belongs", i)
		}
	}
	for range feedItems + 7 {
		dropped += l.push(feedItem{data: []byte{1}})
	}
	if dropped != 5+7 || len(l.items) != feedItems {
		t.Errorf("%d dropped, %d left", dropped, len(l.items))
	}
}
