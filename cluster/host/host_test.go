package host

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
)

type fixed struct {
	booted time.Duration
	now    time.Time
}

func (f fixed) Boottime() time.Duration { return f.booted }
func (f fixed) Now() time.Time          { return f.now }

type failing struct{ err error }

func (f failing) Before(Write) error         { return f.err }
func (f failing) Free(string) (int64, error) { return 7, nil }

// A nil Host, and what a Host does not have, is this machine.
func TestThisMachine(t *testing.T) {
	for _, h := range []*Host{nil, {}} {
		if d := h.Boottime() - clock.Boottime(); d > time.Minute || d < -time.Minute {
			t.Errorf("Boottime is %s away from this machine's", d)
		}
		if d := time.Until(h.Now()); d > time.Minute || d < -time.Minute {
			t.Errorf("Now is %s away from this machine's", d)
		}
		if h.BeforeWrite(WriteRaft) != nil || h.FreeBytes() != nil {
			t.Error("a write to this machine's disk is announced to somebody")
		}
		ln, err := h.Listen("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		c, err := h.Dialer(&net.Dialer{Timeout: time.Minute})(t.Context(), "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.Close(), ln.Close()); err != nil {
			t.Error(err)
		}
	}
}

func TestReplacedParts(t *testing.T) {
	full, at := errors.New("full"), time.Unix(1, 0)
	h := &Host{Clocks: fixed{time.Hour, at}, Disk: failing{full}}
	if h.Boottime() != time.Hour || !h.Now().Equal(at) {
		t.Error("the clocks are not those of the host")
	}
	if err := h.BeforeWrite(WriteProbe)(); !errors.Is(err, full) {
		t.Errorf("the write's error is %v", err)
	}
	if free, err := h.FreeBytes()("/"); free != 7 || err != nil {
		t.Errorf("free bytes: %d, %v", free, err)
	}
}
