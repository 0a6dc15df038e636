package openai

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

// cut reads all events of a stream: raw, data and kind of each.
func cut(r io.Reader) (list [][3]string, err error) {
	e := NewEventReader(r, nil)
	defer e.Release()
	for {
		ev, err := e.Next()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return list, err
		}
		data := "-"
		if ev.HasData {
			data = string(ev.Data)
		}
		list = append(list, [3]string{string(ev.Raw), data, string(ev.Kind)})
	}
}

func TestEvents(t *testing.T) {
	for _, c := range []struct {
		name, stream string
		want         [][3]string
	}{
		{"none", "", nil},
		{"blank lines", "\n\n\r\n\r", nil},
		{"lf", "data: a\n\ndata: b\n\n", [][3]string{{"data: a\n\n", "a", ""}, {"data: b\n\n", "b", ""}}},
		{"crlf", "data: a\r\n\r\ndata: b\r\n\r\n", [][3]string{{"data: a\r\n\r\n", "a", ""}, {"data: b\r\n\r\n", "b", ""}}},
		{"cr", "data: a\r\rdata: b\r\r", [][3]string{{"data: a\r\r", "a", ""}, {"data: b\r\r", "b", ""}}},
		{"mixed", "data: a\n\r\ndata: b\r\n\n", [][3]string{{"data: a\n\r", "a", ""}, {"data: b\r\n\n", "b", ""}}},
		{"no space", "data:a\n\n", [][3]string{{"data:a\n\n", "a", ""}}},
		{"two spaces", "data:  a\n\n", [][3]string{{"data:  a\n\n", " a", ""}}},
		{"lines", "data: a\ndata: b\ndata\n\n", [][3]string{{"data: a\ndata: b\ndata\n\n", "a\nb\n", ""}}},
		{"comment", ": hi\n\n", [][3]string{{": hi\n\n", "-", ""}}},
		{"comment within", ": hi\ndata: a\n\n", [][3]string{{": hi\ndata: a\n\n", "a", ""}}},
		{"kind", "event: error\nid: 7\ndata: a\n\n", [][3]string{{"event: error\nid: 7\ndata: a\n\n", "a", "error"}}},
		{"byte order mark", "\xef\xbb\xbfdata: a\n\n", [][3]string{{"data: a\n\n", "a", ""}}},
		{"last one is open", "data: a\n\ndata: b\n", [][3]string{{"data: a\n\n", "a", ""}, {"data: b\n\n", "b", ""}}},
		{"last line is open", "data: a\n\ndata: b", [][3]string{{"data: a\n\n", "a", ""}, {"data: b\n\n", "b", ""}}},
		{"colons", "data: {\"a\": 1}\n\n", [][3]string{{"data: {\"a\": 1}\n\n", `{"a": 1}`, ""}}},
	} {
		for how, r := range map[string]io.Reader{
			"at once": strings.NewReader(c.stream), "by bytes": iotest.OneByteReader(strings.NewReader(c.stream)),
			"by halves": iotest.HalfReader(strings.NewReader(c.stream)), "end with data": iotest.DataErrReader(strings.NewReader(c.stream)),
		} {
			got, err := cut(r)
			if err != nil || len(got) != len(c.want) {
				t.Errorf("%s %s: %q, %v", c.name, how, got, err)
				continue
			}
			for i := range got {
				if got[i] != c.want[i] {
					t.Errorf("%s %s: %q, want %q", c.name, how, got[i], c.want[i])
				}
			}
		}
	}
}

// TestEventAtOnce: an event is returned when its last byte has come, not when the next
// event comes.
func TestEventAtOnce(t *testing.T) {
	for _, end := range []string{"\n\n", "\r\n\r\n", "\r\r"} {
		r, w := io.Pipe()
		go func() {
			_, _ = io.WriteString(w, "data: a"+end)
		}()
		e := NewEventReader(r, nil)
		ev, err := e.Next()
		if err != nil || string(ev.Data) != "a" {
			t.Errorf("%q: %v", end, err)
		}
		e.Release()
		_ = r.Close()
	}
}

func TestEventSize(t *testing.T) {
	big := "data: " + strings.Repeat("x", MaxEvent-100) + "\n\n"
	got, err := cut(strings.NewReader("data: a\n\n" + big + "data: b\n\n"))
	if err != nil || len(got) != 3 || got[1][0] != big {
		t.Errorf("1 MiB: %d events, %v", len(got), err)
	}
	if _, err = cut(strings.NewReader("data: " + strings.Repeat("x", MaxEvent+100))); !errors.Is(err, ErrEventTooLarge) {
		t.Errorf("more: %v", err)
	}
	broken := io.MultiReader(strings.NewReader("data: a\n\ndata: b\n"), iotest.ErrReader(io.ErrUnexpectedEOF))
	if got, err := cut(broken); !errors.Is(err, io.ErrUnexpectedEOF) || len(got) != 1 {
		t.Errorf("broken: %q, %v", got, err)
	}
}

// chunked returns a text in the given pieces.
type chunked struct {
	rest  []byte
	sizes []int
}

func (c *chunked) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		return 0, io.EOF
	}
	n := len(c.rest)
	if len(c.sizes) > 0 {
		n, c.sizes = c.sizes[0], c.sizes[1:]
	}
	n = copy(p, c.rest[:min(n, len(c.rest))])
	c.rest = c.rest[n:]
	return n, nil
}

// TestAnyChunking: the events depend on the bytes, not on how they are chunked.
func TestAnyChunking(t *testing.T) {
	piece := rapid.SampledFrom([]string{"data: x", "data:", ": c", "event: e", "\n", "\r", "\r\n", "\n\n", "\r\n\r\n", "x", "\xef\xbb\xbf"})
	rapid.Check(t, func(t *rapid.T) {
		text := strings.Join(rapid.SliceOfN(piece, 0, 30).Draw(t, "text"), "")
		sizes := rapid.SliceOf(rapid.IntRange(1, 8)).Draw(t, "sizes")
		want, _ := cut(strings.NewReader(text))
		got, _ := cut(&chunked{[]byte(text), sizes})
		if len(got) != len(want) {
			t.Fatalf("%q in %v: %q, want %q", text, sizes, got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%q in %v: %q, want %q", text, sizes, got[i], want[i])
			}
		}
	})
}

// FuzzEvents: no panic, the same events with any chunking, and each event reads the same
// again.
func FuzzEvents(f *testing.F) {
	for _, s := range []string{chunk + "data: [DONE]\n\n", "data: a\r\n\r\n", "\r\r\n\n", ": c\n\ndata\n\n", "\xef\xbb", "event: x\ndata: y"} {
		f.Add([]byte(s), byte(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, size byte) {
		want, err := cut(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		got, err := cut(&chunked{bytes.Clone(b), slicesOf(int(size%7)+1, len(b))})
		if err != nil || len(got) != len(want) {
			t.Fatalf("%q: %q, want %q (%v)", b, got, want, err)
		}
		for i, ev := range got {
			if ev != want[i] {
				t.Fatalf("%q: %q, want %q", b, ev, want[i])
			}
			again, err := cut(strings.NewReader(ev[0]))
			if err != nil || len(again) != 1 || again[0][1] != ev[1] || again[0][2] != ev[2] {
				t.Fatalf("%q reads as %q (%v)", ev, again, err)
			}
		}
	})
}

func slicesOf(n, total int) []int {
	s := make([]int, total/n+1)
	for i := range s {
		s[i] = n
	}
	return s
}

// TestAppend: an edited event is one event again, on one line of data.
func TestAppend(t *testing.T) {
	for _, c := range []struct{ kind, data, want string }{
		{"", `{"a":1}`, "data: {\"a\":2}\n\n"},
		{"error", "{\"a\":1,\n\r\"b\":0}", "event: error\ndata: {\"a\":2,  \"b\":0}\n\n"},
	} {
		ev := Event{Kind: []byte(c.kind), Data: []byte(c.data)}
		if got := string(ev.Append(nil, Edit{Span{5, 6}, []byte("2")})); got != c.want {
			t.Errorf("%q", got)
		}
	}
}
