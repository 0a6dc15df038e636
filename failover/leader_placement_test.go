package failover

import (
	"slices"
	"testing"
	"time"
)

func TestPlaceLeader(t *testing.T) {
	view := func(change func(*LeaderView)) LeaderView {
		v := LeaderView{
			Healthy: true, LeaderSite: "b", Primary: "a", LeadingFor: time.Hour,
			Voters: []LeaderCandidate{{"a1", time.Minute, true, false}, {"a2", time.Minute, true, false}},
		}
		change(&v)
		return v
	}
	for _, c := range []struct {
		name   string
		change func(*LeaderView)
		to     string
		why    LeaderReason
	}{
		{"a stable voter", func(*LeaderView) {}, "a1", LeaderMoves},
		{"the leader is in the primary's site", func(v *LeaderView) { v.LeaderSite = "a" }, "", LeaderInPlace},
		{"the primary is not healthy", func(v *LeaderView) { v.Healthy = false }, "", LeaderPrimaryUnhealthy},
		{"a switchover or a drill", func(v *LeaderView) { v.Busy = true }, "", LeaderBusy},
		{"just elected", func(v *LeaderView) { v.LeadingFor = leaderStableFor - 1 }, "", LeaderTooNew},
		{"elected long enough ago", func(v *LeaderView) { v.LeadingFor, v.Elected = leaderStableFor, 1 }, "a1", LeaderMoves},
		{"elected away twice", func(v *LeaderView) { v.LeadingFor, v.Elected = 2*leaderStableFor-1, 2 }, "", LeaderTooNew},
		{"elected away four times, too early", func(v *LeaderView) { v.LeadingFor, v.Elected = 8*leaderStableFor-1, 4 }, "", LeaderTooNew},
		{"elected away four times", func(v *LeaderView) { v.LeadingFor, v.Elected = 8*leaderStableFor, 4 }, "a1", LeaderMoves},
		{"the wait is bounded", func(v *LeaderView) { v.LeadingFor, v.Elected = leaderStableFor<<maxDoublings, 99 }, "a1", LeaderMoves},
		{"just tried", func(v *LeaderView) { v.Tried, v.LastTry = 1, moveAgainAfter-1 }, "", LeaderTriedRecently},
		{"tried some time ago", func(v *LeaderView) { v.Tried, v.LastTry = 1, moveAgainAfter }, "a1", LeaderMoves},
		{"tried three times", func(v *LeaderView) { v.Tried, v.LastTry = 3, 4*moveAgainAfter-1 }, "", LeaderTriedRecently},
		{"no voter", func(v *LeaderView) { v.Voters = nil }, "", LeaderNoVoter},
		{"the first voter was not responsive for long enough", func(v *LeaderView) { v.Voters[0].ResponsiveFor = leaderStableFor - 1 }, "a2", LeaderMoves},
		{"the first voter is behind", func(v *LeaderView) { v.Voters[0].CaughtUp = false }, "a2", LeaderMoves},
		{"the first voter's disk is slow", func(v *LeaderView) { v.Voters[0].Slow = true }, "a2", LeaderMoves},
		{"no voter is fit", func(v *LeaderView) { v.Voters[0].ResponsiveFor, v.Voters[1].CaughtUp = 0, false }, "", LeaderNoVoter},
	} {
		if to, why := PlaceLeader(view(c.change)); to != c.to || why != c.why {
			t.Errorf("%s: to %q because of %s, want %q because of %s", c.name, to, why, c.to, c.why)
		}
	}
}

// A leader that was elected in another site moves to the primary's site within a
// minute. The primary acts all the time.
func TestLeaderReturnsToThePrimarySite(t *testing.T) {
	for _, shape := range []func(uint64) func(*testing.T) *world{ones, twos} {
		for _, away := range []string{"b1", "c1"} {
			simulate(t, shape(31), func(t *testing.T, w *world) {
				w.lead("a1")
				w.pass(time.Minute)
				w.lead(away)
				w.pass(leaderStableFor - time.Second)
				if w.leaderSite() != away[:1] {
					t.Error("it moved too early")
				}
				idle := 0
				w.until("the leader is in a", 5*time.Second, func() bool {
					if len(w.acting()) != 1 {
						idle++
					}
					return w.leaderSite() == "a"
				})
				if idle > 0 {
					t.Errorf("no site acted as primary at %d looks", idle)
				}
				w.wantPrimary("a", 1)
			})
		}
	}
}

// The role leaves a site whose disks are slow, once, and the leadership does not move to
// such a site. Short slowness changes nothing, and neither does a disk that is slow
// everywhere.
func TestTheRoleLeavesSlowDisks(t *testing.T) {
	simulate(t, twos(34), func(t *testing.T, w *world) {
		w.lead("b1")
		w.slowDisks("a", true)
		w.pass(50 * time.Second)
		w.slowDisks("a", false)
		w.pass(40 * time.Second)
		w.wantPrimary("a", 1)
		for _, site := range []string{"a", "b", "c"} {
			w.slowDisks(site, true)
		}
		w.lead("c1")
		w.pass(2 * time.Minute)
		w.wantPrimary("a", 1)
		if w.leaderSite() != "c" {
			t.Errorf("the leader moved to %s, whose disks are slow", w.leaderSite())
		}
		w.slowDisks("b", false)
		took := w.until("b is the primary", 2*time.Minute, func() bool { return w.agreed().Primary.Site == "b" })
		t.Logf("promoted %v after its disks became fast", took)
		if f := w.agreed().LastFailover; f == nil || f.RTOSeconds != nil {
			t.Errorf("the role was not lost before the promotion, so its time is unknown: %+v", f)
		}
		w.slowDisks("a", false)
		w.pass(3 * time.Minute)
		w.wantPrimary("b", 2)
	})
}

// When elections move the leader away again and again, it returns less and less often.
func TestLeaderDoesNotFlap(t *testing.T) {
	simulate(t, ones(32), func(t *testing.T, w *world) {
		w.lead("c1")
		returns, long := 0, time.Hour
		if testing.Short() || raceDetector {
			long = 25 * time.Minute
		}
		for end := time.Now().Add(long); time.Now().Before(end); {
			if w.leaderSite() == "a" {
				returns++
				w.pass(2 * time.Second)
				w.lead([]string{"b1", "c1"}[returns%2])
			}
			w.pass(time.Second)
		}
		// Returns after 30 s, 1, 2, 4, 8 and 16 min, the next after 16 min more.
		if returns < 5 || returns > 7 {
			t.Errorf("it returned %d times in %s", returns, long)
		}
		w.wantPrimary("a", 1)
	})
}

// The primary's only voter pauses often, so it is not responsive: the leader stays where
// it is.
func TestLeaderDoesNotMoveToAVoterThatPauses(t *testing.T) {
	simulate(t, ones(33), func(t *testing.T, w *world) {
		w.lead("c1")
		for range 300 {
			w.pause("a1")
			w.pass(300 * time.Millisecond)
			w.resume("a1")
			w.pass(700 * time.Millisecond)
			if w.leaderSite() == "a" {
				t.Fatal("it moved to a node that is stopped 300 ms of each second")
			}
		}
		w.wantPrimary("a", 1)
	})
}

// The disk of one of the primary's two voters hangs. The leader moves to the other one, and
// never asks the first to lead: neither after a promotion nor after an election elsewhere.
func TestLeaderDoesNotMoveToANodeWhoseDiskHangs(t *testing.T) {
	t.Run("after a promotion", func(t *testing.T) {
		simulate(t, twos(34), func(t *testing.T, w *world) {
			w.lead("c1")
			w.freeze(true, "b1")
			w.pass(2 * time.Second)
			w.forgetTransfers()
			w.kill("a1", "a2")
			w.until("b is the primary", 20*time.Second, w.primaryIs("b"))
			w.until("the leader is in b", 20*time.Second, func() bool { return w.leaderSite() == "b" })
			w.wantNoTransferTo("b1")
		})
	})
	t.Run("after an election", func(t *testing.T) {
		simulate(t, twos(35), func(t *testing.T, w *world) {
			w.lead("c1")
			w.freeze(true, "a1")
			w.forgetTransfers()
			w.until("the leader is in a", 2*time.Minute, func() bool { return w.leaderSite() == "a" })
			w.wantNoTransferTo("a1")
		})
	})
	t.Run("it is the only voter", func(t *testing.T) {
		simulate(t, ones(36), func(t *testing.T, w *world) {
			w.lead("c1")
			w.freeze(true, "a1")
			w.forgetTransfers()
			w.pass(10 * time.Minute)
			w.wantNoTransferTo("a1")
			w.freeze(false, "a1")
			w.until("the leader is in a", time.Minute, func() bool { return w.leaderSite() == "a" })
		})
	})
}

func (w *world) forgetTransfers() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.transfers = nil
}

func (w *world) wantNoTransferTo(node string) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if slices.Contains(w.transfers, node) {
		w.t.Errorf("leadership was moved to %v, never to %s was right", w.transfers, node)
	}
}
