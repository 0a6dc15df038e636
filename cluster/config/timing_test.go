package config

import (
	"testing"
	"time"
)

func TestTimingIsConsistent(t *testing.T) {
	for _, hb := range []time.Duration{0, 100 * time.Millisecond, 800 * time.Millisecond, 2 * time.Second, 10 * time.Second} {
		if err := TimingFrom(hb).Check(); err != nil {
			t.Errorf("heartbeat %s: %v", hb, err)
		}
	}
	bad := TimingFrom(0)
	bad.Lease = bad.Patience
	if bad.Check() == nil {
		t.Error("Check accepts a lease as long as the patience")
	}
}
