package replication

import (
	"slices"

	"github.com/dsnode/dsnode/storage/journal"
)

// Bounds of what is on its way to one puller.
const (
	liveBatch  = 256 << 10
	bulkBatch  = 512 << 10
	liveWindow = 4 << 20 // sent and not acknowledged, of streams that keep up
	bulkWindow = 2 << 20 // the same, of streams that catch up
	// A stream that needs more than this many batches in a row catches up.
	liveBatches = 4
)

// outflow decides what goes to one puller next. Streams that keep up go before
// those that catch up, each class in turns, and each class has a window of its
// own: so what is new waits for no backlog. It is no more than bookkeeping.
type outflow struct {
	cursors map[journal.Stream]*cursor
	live    []*cursor // have something to send, in turn
	bulk    []*cursor
	out     [2]int // bytes in flight: live, bulk
}

type cursor struct {
	stream journal.Stream
	next   uint64 // to send
	end    uint64 // that can be sent
	flight []flight
	run    int  // batches in a row without reaching the end
	bulk   bool // catches up
	queued bool // in live or bulk
	parked bool // the records are trimmed: waits for the snapshot
}

// flight is a batch that was sent and not acknowledged.
type flight struct {
	last  uint64
	bytes int
	class int
}

func newOutflow() *outflow { return &outflow{cursors: map[journal.Stream]*cursor{}} }

// add begins, or begins again, with the record after held.
func (o *outflow) add(s journal.Stream, held, end uint64) {
	o.remove(s)
	c := &cursor{stream: s, next: held + 1, end: end}
	if c.next == 0 {
		c.next = held // the largest number: never
	}
	o.cursors[s] = c
	o.queue(c)
}

// advance says how far a stream goes now.
func (o *outflow) advance(s journal.Stream, end uint64) {
	if c := o.cursors[s]; c != nil && end > c.end {
		c.end = end
		o.queue(c)
	}
}

func (o *outflow) queue(c *cursor) {
	if c.queued || c.parked || c.next > c.end {
		return
	}
	c.queued = true
	if c.bulk {
		o.bulk = append(o.bulk, c)
	} else {
		o.live = append(o.live, c)
	}
}

// remove forgets a stream and what is in flight of it.
func (o *outflow) remove(s journal.Stream) {
	c := o.cursors[s]
	if c == nil {
		return
	}
	for _, f := range c.flight {
		o.out[f.class] -= f.bytes
	}
	delete(o.cursors, s)
	is := func(x *cursor) bool { return x == c }
	o.live, o.bulk = slices.DeleteFunc(o.live, is), slices.DeleteFunc(o.bulk, is)
}

// choose gives the stream to send of next, nil for none now. It is out of the
// queue then: sent or park follows.
func (o *outflow) choose(bulkToo bool) *cursor {
	if len(o.live) > 0 && o.out[0] < liveWindow {
		c := o.live[0]
		o.live = slices.Delete(o.live, 0, 1)
		c.queued = false
		return c
	}
	if bulkToo && len(o.bulk) > 0 && o.out[1] < bulkWindow {
		c := o.bulk[0]
		o.bulk = slices.Delete(o.bulk, 0, 1)
		c.queued = false
		return c
	}
	return nil
}

// sent notes that the records up to next, without it, are on their way.
func (o *outflow) sent(c *cursor, next uint64, bytes int) {
	class := boolean(c.bulk)
	if next > c.next {
		c.flight = append(c.flight, flight{last: next - 1, bytes: bytes, class: class})
		o.out[class] += bytes
		c.next = next
	}
	if c.next > c.end {
		c.run, c.bulk = 0, false
		return
	}
	if c.run++; c.run >= liveBatches {
		c.bulk = true
	}
	o.queue(c)
}

// park stops a stream whose records are not here any more.
func (o *outflow) park(c *cursor) { c.parked = true }

// covered goes on with parked streams after the records that a snapshot covers,
// and gives up to where each is covered.
func (o *outflow) covered(applied map[journal.Stream]uint64) map[journal.Stream]uint64 {
	out := map[journal.Stream]uint64{}
	for s, c := range o.cursors {
		if c.parked && applied[s] >= c.next {
			c.parked = false
			c.next = applied[s] + 1
			out[s] = applied[s]
			o.queue(c)
		}
	}
	return out
}

// acked takes what the puller holds of a stream out of the flight.
func (o *outflow) acked(s journal.Stream, held uint64) {
	c := o.cursors[s]
	if c == nil {
		return
	}
	n := 0
	for n < len(c.flight) && c.flight[n].last <= held {
		o.out[c.flight[n].class] -= c.flight[n].bytes
		n++
	}
	c.flight = slices.Delete(c.flight, 0, n)
}

// want leaves only the streams of these origins.
func (o *outflow) want(origins map[string]bool) {
	for s := range o.cursors {
		if !origins[s.Origin] {
			o.remove(s)
		}
	}
}

// waiting reports whether a stream waits for a snapshot.
func (o *outflow) waiting() bool {
	for _, c := range o.cursors {
		if c.parked {
			return true
		}
	}
	return false
}
