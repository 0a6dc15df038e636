package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// Boottime reads CLOCK_BOOTTIME: monotonic, and it goes on while the machine is
// suspended, which Go's own monotonic clock does not. A lease counted on the
// latter would still be "valid" after an hour of suspend.
func Boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// Since Linux 2.6.39 it can't fail; a lease without a clock is no lease.
		panic("CLOCK_BOOTTIME: " + err.Error())
	}
	return time.Duration(ts.Nano())
}
