package journal

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// modelStream is the expected content of a stream.
type modelStream struct {
	first uint64   // the stream was trimmed up to here at most
	acked []Record // from seq 1, including trimmed ones
	maybe []Record // written after acked, and not acknowledged
	own   bool
}

type model struct {
	t       *rapid.T
	o       Options
	d       *faultDisk
	l       *Log
	streams map[Stream]*modelStream
	source  *Log // where copies come from
	next    byte
}

// TestModel makes random calls, with crashes of the process and of the machine and
// with failing syncs, and compares the log with the model.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "journal-model-")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		m := &model{t: t, o: testOptions(dir), d: newFaultDisk(), streams: map[Stream]*modelStream{}}
		m.o.SegmentBytes, m.o.TailBytes = 2000, 1000
		m.o.Logger = nil
		m.o = withLogger(m.o)
		sourceDir := filepath.Join(dir, "source")
		m.source = m.openLog(func() Options { o := testOptions(sourceDir); return o }(), newFaultDisk())
		defer func() { _ = m.source.Close() }()
		m.open()
		defer func() { _ = m.l.Close() }()
		t.Repeat(map[string]func(*rapid.T){
			"create":  func(*rapid.T) { m.create() },
			"append":  func(*rapid.T) { m.append() },
			"receive": func(*rapid.T) { m.receive() },
			"trim":    func(*rapid.T) { m.trim() },
			"drop":    func(*rapid.T) { m.drop() },
			"reopen":  func(*rapid.T) { m.reopen(rapid.SampledFrom([]string{"close", "kill", "power"}).Draw(m.t, "end")) },
			"fault":   func(*rapid.T) { m.fault() },
			"":        func(*rapid.T) { m.check() },
		})
	})
}

func withLogger(o Options) Options {
	o.Logger = testOptions("").Logger
	return o
}

func (m *model) openLog(o Options, d disk) *Log {
	o.Registerer = testOptions("").Registerer
	l, err := open(o, d)
	if err != nil {
		m.t.Fatalf("open: %v", err)
	}
	return l
}

func (m *model) open() { m.l = m.openLog(m.o, m.d) }

func (m *model) pick(own bool) (Stream, *modelStream) {
	var ids []Stream
	for n := range m.next + 1 {
		if s := m.streams[streamOf(n)]; s != nil && s.own == own {
			ids = append(ids, streamOf(n))
		}
	}
	if len(ids) == 0 {
		m.t.Skip("no stream")
	}
	id := rapid.SampledFrom(ids).Draw(m.t, "stream")
	return id, m.streams[id]
}

func (m *model) create() {
	if m.next > 20 {
		m.t.Skip("enough")
	}
	m.next++
	id := streamOf(m.next)
	if err := m.l.Create(context.Background(), id); err != nil {
		m.t.Fatal(err)
	}
	m.streams[id] = &modelStream{first: 1, own: true}
}

func (m *model) records() []Record {
	n := rapid.IntRange(1, 5).Draw(m.t, "n")
	var records []Record
	for range n {
		size := rapid.SampledFrom([]int{0, 1, 10, 200, 1500}).Draw(m.t, "size")
		records = append(records, started(byte(len(records)), string(bytes.Repeat([]byte{'x'}, size))))
	}
	return records
}

func (m *model) append() {
	id, s := m.pick(true)
	records := m.records()
	last, err := m.l.Append(context.Background(), id, records)
	if err != nil {
		m.t.Fatal(err)
	}
	s.acked = append(s.acked, records...)
	if last != uint64(len(s.acked)) {
		m.t.Fatalf("last seq %d, want %d", last, len(s.acked))
	}
}

// receive appends to a stream of the source and copies a part of it.
func (m *model) receive() {
	var id Stream
	if m.next > 0 && rapid.Bool().Draw(m.t, "known") {
		id, _ = m.pick(false)
	} else {
		m.next++
		id = streamOf(m.next)
		m.streams[id] = &modelStream{first: 1}
	}
	s := m.streams[id]
	e, held := m.source.End(id)
	if !held {
		if len(s.acked) > 0 {
			m.t.Skip("an own stream of before")
		}
		if err := m.source.Create(context.Background(), id); err != nil {
			m.t.Fatal(err)
		}
	}
	if _, err := m.source.Append(context.Background(), id, m.records()); err != nil {
		m.t.Fatal(err)
	}
	from := uint64(1)
	if e, held = m.l.End(id); held {
		from = max(e.First, e.Durable+1-min(e.Durable, uint64(rapid.IntRange(0, 3).Draw(m.t, "overlap"))))
	}
	frames, next, err := m.source.Read(id, from, 3000)
	if err != nil {
		m.t.Fatal(err)
	}
	durable, err := m.l.Receive(context.Background(), id, frames)
	if err != nil || durable != max(next-1, e.Durable) {
		m.t.Fatalf("durable %d, want %d: %v", durable, next-1, err)
	}
	for len(frames) > 0 {
		var r Record
		if r, frames, err = NextFrame(frames); err != nil {
			m.t.Fatal(err)
		}
		if r.Seq == uint64(len(s.acked))+1 {
			s.acked = append(s.acked, r)
		}
	}
}

func (m *model) trim() {
	id, s := m.pick(rapid.Bool().Draw(m.t, "own"))
	if len(s.acked) == 0 {
		m.t.Skip("empty")
	}
	to := rapid.Uint64Range(1, uint64(len(s.acked))+1).Draw(m.t, "to")
	if err := m.l.Trim(id, to); err != nil {
		m.t.Fatal(err)
	}
	s.first = max(s.first, to)
}

func (m *model) drop() {
	id, _ := m.pick(rapid.Bool().Draw(m.t, "own"))
	if err := m.l.Drop(id); err != nil {
		m.t.Fatal(err)
	}
	delete(m.streams, id)
	_ = m.source.Drop(id) // most streams are not in the source
}

// reopen ends the process in one of three ways, and opens the log again.
func (m *model) reopen(how string) {
	switch how {
	case "close":
		if err := m.l.Close(); err != nil {
			m.t.Fatal(err)
		}
	default:
		m.kill()
		if how == "power" {
			seed := rapid.Uint64().Draw(m.t, "power")
			m.d.losePower(m.t, rand.New(rand.NewPCG(seed, 1)))
		}
	}
	m.open()
	for id, s := range m.streams {
		s.own = false
		if _, ok := m.l.End(id); !ok {
			m.t.Fatalf("%s is missing after %q", id, how)
		}
	}
}

// kill leaves the files as they are, like a killed process.
func (m *model) kill() {
	m.d.failing(func(call, _ string) error {
		if call == "open" {
			return nil
		}
		return unix.EIO
	})
	_ = m.l.setFailed("be killed", errors.New("killed"))
	_ = m.l.Close()
	m.d.failing(nil)
}

// fault makes a write or sync fail. Nothing may be acknowledged afterwards.
func (m *model) fault() {
	id, s := m.pick(true)
	records := m.records()
	for i := range records {
		records[i].Stream = id
	}
	m.d.failing(failAll(rapid.SampledFrom([]string{"write", "sync"}).Draw(m.t, "call"), unix.EIO))
	if _, err := m.l.Append(context.Background(), id, records); !errors.Is(err, ErrFailed) || !errors.Is(err, unix.EIO) {
		m.t.Fatalf("a failed write returned %v", err)
	}
	m.d.failing(nil)
	select {
	case <-m.l.Failed():
	default:
		m.t.Fatal("Failed was not closed")
	}
	if _, err := m.l.Append(context.Background(), id, records); !errors.Is(err, ErrFailed) {
		m.t.Fatalf("append after a failure: %v", err)
	}
	s.maybe = records
	m.reopen(rapid.SampledFrom([]string{"kill", "power"}).Draw(m.t, "end"))
}

// check compares every stream with the model.
func (m *model) check() {
	ends := m.l.Ends()
	for id, s := range m.streams {
		e, ok := ends[id]
		if !ok || e.Damaged != 0 || e.First > max(s.first, 1) {
			m.t.Fatalf("%s: %+v, want it to begin with %d at most", id, e, s.first)
		}
		extra := int(e.Durable) - len(s.acked)
		if extra < 0 || extra > len(s.maybe) {
			m.t.Fatalf("%s ends with %d; %d records were acknowledged and %d are uncertain", id, e.Durable, len(s.acked), len(s.maybe))
		}
		if e.Own != s.own {
			m.t.Fatalf("%s: own %v", id, e.Own)
		}
		got := recordsOf(m.t, m.l, id, e.First)
		if len(got) != int(e.Durable+1-e.First) {
			m.t.Fatalf("%s: %d records of %+v", id, len(got), e)
		}
		for i := range got {
			at := int(e.First) + i - 1
			if at >= len(s.acked) {
				s.acked = append(s.acked, got[i]) // it must not be lost from now on
				continue
			}
			if !got[i].same(&s.acked[at]) || !bytes.Equal(got[i].Payload, s.acked[at].Payload) {
				m.t.Fatalf("%s at %d is %+v, want %+v", id, at+1, got[i], s.acked[at])
			}
		}
		s.maybe = nil
	}
	if len(ends) != len(m.streams) {
		m.t.Fatalf("%d streams, want %d", len(ends), len(m.streams))
	}
}
