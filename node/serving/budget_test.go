package serving

import (
	"testing"
	"time"
)

func TestBudget(t *testing.T) {
	var b budget
	now := time.Unix(4_000_000, 0)
	take := func() (n int) {
		for b.withdraw(now) {
			n++
		}
		return n
	}
	if got := take(); got != budgetFloor {
		t.Errorf("without traffic %d retries", got)
	}
	now = now.Add(2 * budgetWindow)
	for range 1000 {
		b.deposit(now, false)
		b.deposit(now, true) // a client's own retry
	}
	if got := take(); got != 100 {
		t.Errorf("%d retries for 1000 requests", got)
	}
	now = now.Add(budgetWindow / 2)
	if got := take(); got != 0 {
		t.Errorf("%d more within the window", got)
	}
	now = now.Add(budgetWindow / 2)
	if got := take(); got != budgetFloor {
		t.Errorf("%d after the window", got)
	}
}
