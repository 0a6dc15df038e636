package node

import (
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/journal"
)

// The streams of a site are those that a node of it writes, and those of other nodes whose
// jobs it executes, also when the node that wrote them is no member any more.
func TestStreamsOfASite(t *testing.T) {
	stream := func(origin string, n byte) journal.Stream {
		return journal.Stream{Origin: origin, Incarnation: journal.Incarnation{n}}
	}
	own, left, adopted, orphan, other := stream("a-1", 1), stream("a-1", 2), stream("b-1", 3), stream("gone-1", 4), stream("b-1", 5)
	s := &agreed.State{
		Nodes: map[string]agreed.Node{"a-1": {Name: "a-1", Site: "a"}, "b-1": {Name: "b-1", Site: "b"}},
		Streams: map[string]agreed.JobStream{
			keyOf(own): {Owner: "a-1"}, keyOf(left): {Owner: "b-1"}, keyOf(adopted): {Owner: "a-1"}, keyOf(orphan): {Owner: "a-1"}, keyOf(other): {Owner: "b-1"},
		},
	}
	of := streamsOf(s, "a")
	for _, c := range []struct {
		name string
		st   journal.Stream
		want bool
	}{
		{"its own", own, true},
		{"its own, executed elsewhere", left, true},
		{"another's, executed here", adopted, true},
		{"of a removed node, executed here", orphan, true},
		{"another's", other, false},
		{"another's, which is not agreed on", stream("b-1", 9), false},
		{"its own, which is not agreed on", stream("a-1", 9), true},
	} {
		if got := of(c.st); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
		if back, err := readStream(keyOf(c.st)); err != nil || back != c.st {
			t.Errorf("%s: %v was read as %v, %v", c.name, c.st, back, err)
		}
	}
	for _, key := range []string{"", "a-1", "a-1/", "a-1/xyz"} {
		if _, err := readStream(key); err == nil {
			t.Errorf("%q was read as a stream", key)
		}
	}
}

// A node of an older version answers pings and does not tell the end of its journal.
func TestToldOfTheJournal(t *testing.T) {
	for _, c := range []struct {
		name string
		p    cluster.PeerView
		want bool
	}{
		{"never heard", cluster.PeerView{}, false},
		{"an older version", cluster.PeerView{Heard: true}, false},
		{"it tells", cluster.PeerView{Heard: true, Health: cluster.Health{Journal: "a-1/x"}}, true},
		{"it told some time ago", cluster.PeerView{Heard: true, Ago: toldFor + time.Second, Health: cluster.Health{Journal: "a-1/x"}}, false},
	} {
		if got := told(c.p); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}
