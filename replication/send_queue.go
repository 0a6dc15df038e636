package replication

import (
	"slices"

	"github.com/dsnode/dsnode/storage/journal"
)

// Limits of the records in flight to one puller.
const (
	liveBatch  = 256 << 10
	bulkBatch  = 512 << 10
	liveWindow = 4 << 20 // unacknowledged bytes of streams that keep up
	bulkWindow = 2 << 20 // unacknowledged bytes of streams that catch up
	// A stream counts as catching up after this many batches without reaching its end.
	liveBatches = 4
)

// sendQueue selects what is sent to one puller next. Streams that keep up ("live") go
// before those that catch up ("bulk"), round-robin within each class. Each class has its
// own window, so that new records don't wait for a backlog. It does no I/O.
type sendQueue struct {
	cursors  map[journal.Stream]*cursor
	live     []*cursor // streams with something to send, next first
	bulk     []*cursor
	inFlight [2]int // unacknowledged bytes: live, bulk
}

type cursor struct {
	stream   journal.Stream
	next     uint64 // next record to send
	end      uint64 // last record that can be sent
	inFlight []sentBatch
	run      int  // batches in a row without reaching the end
	bulk     bool // catching up
	queued   bool // in live or bulk
	parked   bool // its next records are trimmed: it waits for a snapshot
}

// sentBatch is a batch that is not acknowledged.
type sentBatch struct {
	last  uint64
	bytes int
	class int
}

func newSendQueue() *sendQueue { return &sendQueue{cursors: map[journal.Stream]*cursor{}} }

// add begins a stream, again if necessary, with the record after held.
func (o *sendQueue) add(s journal.Stream, held, end uint64) {
	o.remove(s)
	c := &cursor{stream: s, next: held + 1, end: end}
	if c.next == 0 {
		c.next = held // held is never: don't send anything
	}
	o.cursors[s] = c
	o.queue(c)
}

// advance updates up to where a stream can be sent.
func (o *sendQueue) advance(s journal.Stream, end uint64) {
	if c := o.cursors[s]; c != nil && end > c.end {
		c.end = end
		o.queue(c)
	}
}

func (o *sendQueue) queue(c *cursor) {
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

// remove removes a stream with its unacknowledged batches.
func (o *sendQueue) remove(s journal.Stream) {
	c := o.cursors[s]
	if c == nil {
		return
	}
	for _, f := range c.inFlight {
		o.inFlight[f.class] -= f.bytes
	}
	delete(o.cursors, s)
	is := func(x *cursor) bool { return x == c }
	o.live, o.bulk = slices.DeleteFunc(o.live, is), slices.DeleteFunc(o.bulk, is)
}

// next returns the stream to send from and removes it from the queue; nil if there is none.
// The caller must call sent for it, or set parked.
func (o *sendQueue) next(bulkToo bool) *cursor {
	queue := &o.live
	if len(o.live) == 0 || o.inFlight[0] >= liveWindow {
		if !bulkToo || len(o.bulk) == 0 || o.inFlight[1] >= bulkWindow {
			return nil
		}
		queue = &o.bulk
	}
	c := (*queue)[0]
	*queue = slices.Delete(*queue, 0, 1)
	c.queued = false
	return c
}

// sent records that the records before next are in flight.
func (o *sendQueue) sent(c *cursor, next uint64, bytes int) {
	class := boolean(c.bulk)
	if next > c.next {
		c.inFlight = append(c.inFlight, sentBatch{last: next - 1, bytes: bytes, class: class})
		o.inFlight[class] += bytes
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

// resumeAfter continues parked streams after the records that a snapshot covers, and
// returns up to where each of them is covered.
func (o *sendQueue) resumeAfter(applied map[journal.Stream]uint64) map[journal.Stream]uint64 {
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

// acked removes the batches that the puller has acknowledged. A stream that waits for a
// snapshot goes on if the puller has got what was trimmed otherwise.
func (o *sendQueue) acked(s journal.Stream, held uint64) {
	c := o.cursors[s]
	if c == nil {
		return
	}
	n := 0
	for n < len(c.inFlight) && c.inFlight[n].last <= held {
		o.inFlight[c.inFlight[n].class] -= c.inFlight[n].bytes
		n++
	}
	c.inFlight = slices.Delete(c.inFlight, 0, n)
	if c.parked && held >= c.next {
		c.parked, c.next = false, held+1
		o.queue(c)
	}
}

// keepOrigins removes the streams of all other origins.
func (o *sendQueue) keepOrigins(origins map[string]bool) {
	for s := range o.cursors {
		if !origins[s.Origin] {
			o.remove(s)
		}
	}
}

// anyParked reports whether a stream waits for a snapshot.
func (o *sendQueue) anyParked() bool {
	for _, c := range o.cursors {
		if c.parked {
			return true
		}
	}
	return false
}
