package failover

import (
	"testing"
	"time"
)

func TestGoHome(t *testing.T) {
	view := func(change func(*HomingView)) HomingView {
		v := HomingView{
			Healthy: true, LeaderSite: "b", Primary: "a", LeadingFor: time.Hour,
			Voters: []HomingVoter{{"a1", time.Minute, true}, {"a2", time.Minute, true}},
		}
		change(&v)
		return v
	}
	for _, c := range []struct {
		name   string
		change func(*HomingView)
		to     string
		why    HomingReason
	}{
		{"calm", func(*HomingView) {}, "a1", HomingCalmVoter},
		{"it is there", func(v *HomingView) { v.LeaderSite = "a" }, "", HomingAtHome},
		{"the primary is not well", func(v *HomingView) { v.Healthy = false }, "", HomingUnwell},
		{"a switchover or a drill", func(v *HomingView) { v.Busy = true }, "", HomingBusy},
		{"just elected", func(v *HomingView) { v.LeadingFor = homingCalm - 1 }, "", HomingWait},
		{"just long enough", func(v *HomingView) { v.LeadingFor, v.Elected = homingCalm, 1 }, "a1", HomingCalmVoter},
		{"driven out before", func(v *HomingView) { v.LeadingFor, v.Elected = 2*homingCalm-1, 2 }, "", HomingWait},
		{"driven out three times", func(v *HomingView) { v.LeadingFor, v.Elected = 8*homingCalm-1, 4 }, "", HomingWait},
		{"at last", func(v *HomingView) { v.LeadingFor, v.Elected = 8*homingCalm, 4 }, "a1", HomingCalmVoter},
		{"driven out for ever", func(v *HomingView) { v.LeadingFor, v.Elected = homingCalm<<homingDoublings, 99 }, "a1", HomingCalmVoter},
		{"just tried", func(v *HomingView) { v.Tried, v.LastTry = 1, homingAgain-1 }, "", HomingTried},
		{"tried some time ago", func(v *HomingView) { v.Tried, v.LastTry = 1, homingAgain }, "a1", HomingCalmVoter},
		{"tried thrice", func(v *HomingView) { v.Tried, v.LastTry = 3, 4*homingAgain-1 }, "", HomingTried},
		{"no voter", func(v *HomingView) { v.Voters = nil }, "", HomingNoVoter},
		{"it was not calm", func(v *HomingView) { v.Voters[0].CalmFor = homingCalm - 1 }, "a2", HomingCalmVoter},
		{"it is behind", func(v *HomingView) { v.Voters[0].CaughtUp = false }, "a2", HomingCalmVoter},
		{"neither", func(v *HomingView) { v.Voters[0].CalmFor, v.Voters[1].CaughtUp = 0, false }, "", HomingNoVoter},
	} {
		if to, why := GoHome(view(c.change)); to != c.to || why != c.why {
			t.Errorf("%s: to %q because of %s, want %q because of %s", c.name, to, why, c.to, c.why)
		}
	}
}

// Elected elsewhere, the leader comes back within a minute, and the role never
// rests.
func TestLeaderGoesHome(t *testing.T) {
	for _, shape := range []func(uint64) func(*testing.T) *world{ones, twos} {
		for _, away := range []string{"b1", "c1"} {
			play(t, shape(31), func(t *testing.T, w *world) {
				w.lead("a1")
				w.pass(time.Minute)
				w.lead(away)
				w.pass(homingCalm - time.Second)
				if w.leaderSite() != away[:1] {
					t.Error("it left before it was calm for long enough")
				}
				rested := 0
				w.until("the leader is in a", 5*time.Second, func() bool {
					if len(w.acting()) != 1 {
						rested++
					}
					return w.leaderSite() == "a"
				})
				if rested > 0 {
					t.Errorf("nobody acted at %d looks", rested)
				}
				w.wantPrimary("a", 1)
			})
		}
	}
}

// Driven out of a again and again, it goes back more and more seldom.
func TestLeaderDoesNotFlap(t *testing.T) {
	play(t, ones(32), func(t *testing.T, w *world) {
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
		// 30 s, 1, 2, 4, 8 and 16 min; the next is after 16 min more.
		if returns < 5 || returns > 7 {
			t.Errorf("it returned %d times in %s", returns, long)
		}
		w.wantPrimary("a", 1)
	})
}

// A lossy link to the primary's site is no calm: the leader stays where it is.
func TestLeaderStaysAwayInBadWeather(t *testing.T) {
	play(t, ones(33), func(t *testing.T, w *world) {
		w.lead("c1")
		for range 300 {
			w.pause("a1")
			w.pass(300 * time.Millisecond)
			w.resume("a1")
			w.pass(700 * time.Millisecond)
			if w.leaderSite() == "a" {
				t.Fatal("it went to a node that stands still three tenths of the time")
			}
		}
		w.wantPrimary("a", 1)
	})
}
