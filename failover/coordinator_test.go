package failover

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// play runs a story in virtual time and checks the laws at its end.
func play(t *testing.T, w func(t *testing.T) *world, story func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := w(t)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			w.run(ctx)
		}()
		defer func() {
			stop()
			<-done
			for _, b := range w.breaches {
				t.Error(b)
			}
			epoch := uint64(0)
			for _, s := range w.states {
				if s.Primary.Epoch < epoch {
					t.Errorf("the epoch fell from %d to %d", epoch, s.Primary.Epoch)
				}
				epoch = s.Primary.Epoch
			}
		}()
		w.until("a acts as primary", 20*time.Second, func() bool { return slices.Equal(w.acting(), []string{"a"}) })
		story(t, w)
	})
}

func ones(seed uint64) func(*testing.T) *world {
	return func(t *testing.T) *world { return newWorld(t, seed, [3]int{1, 1, 1}, [3]int{1, 1, 1}) }
}

func twos(seed uint64) func(*testing.T) *world {
	return func(t *testing.T) *world { return newWorld(t, seed, [3]int{2, 2, 1}, [3]int{2, 2, 1}) }
}

// lead puts the raft leadership somewhere.
func (w *world) lead(name string) {
	w.t.Helper()
	if err := w.nodes[name].TransferLeadership(w.t.Context(), name); err != nil {
		w.t.Fatal(err)
	}
	w.until("leader in "+name, 5*time.Second, func() bool { return w.leaderSite() == name[:1] })
}

func (w *world) pass(d time.Duration) {
	w.t.Helper()
	if err := wait(w.t.Context(), d); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) wantPrimary(site string, epoch uint64) {
	w.t.Helper()
	if p := w.agreed().Primary; p.Site != site || p.Epoch != epoch {
		w.t.Fatalf("primary is %s in epoch %d (%s), want %s in %d", p.Site, p.Epoch, p.Reason, site, epoch)
	}
}

func (w *world) primaryIs(site string) func() bool {
	return func() bool { return w.agreed().Primary.Site == site }
}

var leaders = []string{"a1", "b1", "c1"}

// Killed, with the leader in each site: b is primary within 7 s, the leader
// moves there, and a returns without taking the role.
func TestPrimaryKilled(t *testing.T) {
	for _, leader := range leaders {
		for _, shape := range []func(uint64) func(*testing.T) *world{ones, twos} {
			var took []time.Duration
			for seed := range uint64(4) {
				play(t, shape(seed), func(t *testing.T, w *world) {
					w.lead(leader)
					w.pass(3 * time.Second)
					gone := w.siteNodes("a")
					w.kill(gone...)
					took = append(took, w.until("b is primary", 7*time.Second, w.primaryIs("b")))
					w.wantPrimary("b", 2)
					w.until("b acts", 3*time.Second, func() bool { return slices.Equal(w.acting(), []string{"b"}) })
					w.until("leader in b", 5*time.Second, func() bool { return w.leaderSite() == "b" })
					f := w.agreed().LastFailover
					if f.From != "a" || f.Kind != agreed.FailoverUnplanned || f.Acknowledged || f.RTOSeconds == nil ||
						*f.RTOSeconds < 2.5 || *f.RTOSeconds > 7 || f.RPOSeconds != nil || f.RecordsAtRisk != nil {
						t.Errorf("failover record %+v", f)
					}
					w.restart(gone...)
					w.pass(20 * time.Second)
					w.wantPrimary("b", 2)
				})
			}
			slices.Sort(took)
			t.Logf("leader %s: median %s, worst %s", leader, took[len(took)/2], took[len(took)-1])
			if took[len(took)/2] > 4500*time.Millisecond {
				t.Errorf("leader %s: median %s", leader, took[len(took)/2])
			}
		}
	}
}

func (w *world) siteNodes(site string) []string {
	var names []string
	for _, n := range w.names {
		if w.nodes[n].site == site {
			names = append(names, n)
		}
	}
	return names
}

// Stopped for 30 s and continued: b took over, and a starts nothing when it
// wakes up believing that no time has passed.
func TestPrimaryStoppedAndBack(t *testing.T) {
	for _, leader := range leaders {
		play(t, twos(1), func(t *testing.T, w *world) {
			w.lead(leader)
			w.pause(w.siteNodes("a")...)
			w.until("b is primary", 7*time.Second, w.primaryIs("b"))
			w.pass(25 * time.Second)
			w.resume(w.siteNodes("a")...)
			if slices.Contains(w.acting(), "a") {
				t.Error("a acts as primary right after it was continued")
			}
			w.pass(60 * time.Second)
			w.wantPrimary("b", 2)
		})
	}
}

// A leader in b or c that is stopped finds everybody silent when it wakes up,
// and does nothing about it.
func TestStoppedLeaderAccusesNobody(t *testing.T) {
	for _, leader := range []string{"b1", "c1"} {
		for _, d := range []time.Duration{600 * time.Millisecond, 3 * time.Second, 15 * time.Second} {
			play(t, ones(2), func(t *testing.T, w *world) {
				w.lead(leader)
				for range 4 {
					w.pause(leader)
					w.pass(d)
					w.resume(leader)
					w.pass(4 * time.Second)
				}
				w.wantPrimary("a", 1)
			})
		}
	}
}

// The leader killed, the primary not: an election is no failover.
func TestLeaderKilledIsNoFailover(t *testing.T) {
	for _, leader := range []string{"b1", "c1"} {
		play(t, ones(3), func(t *testing.T, w *world) {
			w.lead(leader)
			w.kill(leader)
			w.until("another leader", 5*time.Second, func() bool { s := w.leaderSite(); return s != "" && s != leader[:1] })
			w.pass(time.Minute)
			w.wantPrimary("a", 1)
		})
	}
}

// Cut off, fully or one way only: replaced, fenced, and back without a fight.
func TestPrimaryCutOff(t *testing.T) {
	for name, links := range map[string][]string{
		"full":     {"a>b", "b>a", "a>c", "c>a"},
		"outgoing": {"a>b", "a>c"},
		"incoming": {"b>a", "c>a"},
	} {
		for _, leader := range leaders {
			t.Run(name+" "+leader, func(t *testing.T) {
				play(t, twos(4), func(t *testing.T, w *world) {
					w.lead(leader)
					w.sever(true, links...)
					w.until("b is primary", 7*time.Second, w.primaryIs("b"))
					w.until("b alone acts", 3*time.Second, func() bool { return slices.Equal(w.acting(), []string{"b"}) })
					w.pass(30 * time.Second)
					w.sever(false, links...)
					w.pass(time.Minute)
					w.wantPrimary("b", 2)
				})
			})
		}
	}
}

// The link between the leader's site and the primary is cut, the third site
// hears both and hands leases on: nothing is wrong.
func TestPrimaryHeardByAnotherSiteStays(t *testing.T) {
	for _, leader := range []string{"b1", "c1"} {
		play(t, ones(5), func(t *testing.T, w *world) {
			w.lead(leader)
			w.sever(true, "a>"+leader[:1], leader[:1]+">a")
			w.pass(2 * time.Minute)
			w.wantPrimary("a", 1)
			if !slices.Equal(w.acting(), []string{"a"}) {
				t.Errorf("acting: %v", w.acting())
			}
		})
	}
}

// A link that is up and down each second or two, with the primary behind it.
func TestFlappingLink(t *testing.T) {
	play(t, ones(6), func(t *testing.T, w *world) {
		w.lead("c1")
		for range 60 {
			w.sever(true, "a>b", "b>a", "a>c", "c>a")
			w.pass(1100 * time.Millisecond)
			w.sever(false, "a>b", "b>a", "a>c", "c>a")
			w.pass(2 * time.Second)
		}
		w.wantPrimary("a", 1)
	})
}

// The new primary is lost as well, at once: the third one follows after the
// dwell, not after minutes; and who was just replaced is the last choice.
func TestSecondLossInsideTheDwell(t *testing.T) {
	play(t, twos(7), func(t *testing.T, w *world) {
		w.lead("c1")
		w.sever(true, "a>b", "b>a", "a>c", "c>a")
		w.until("b is primary", 7*time.Second, w.primaryIs("b"))
		w.sever(false, "a>b", "b>a", "a>c", "c>a")
		w.until("b acts", 5*time.Second, func() bool { return slices.Equal(w.acting(), []string{"b"}) })
		w.pass(2 * time.Second)
		w.kill("b1", "b2")
		took := w.until("c is primary", 20*time.Second, w.primaryIs("c"))
		t.Logf("second promotion after %s", took)
		w.wantPrimary("c", 3)
		if d := w.agreed().Primary.Since.Sub(w.states[1].Primary.Since); d < dwell(w.timing) {
			t.Errorf("only %s between two automatic promotions", d)
		}
	})
}

func TestHoldStopsPromotions(t *testing.T) {
	play(t, ones(8), func(t *testing.T, w *world) {
		w.lead("c1")
		w.propose("c1", agreed.CmdFailoverHold, agreed.FailoverHold{Held: true, By: "me"})
		w.kill("a1")
		w.pass(30 * time.Second)
		w.wantPrimary("a", 1)
		w.propose("c1", agreed.CmdFailoverHold, agreed.FailoverHold{By: "me"})
		w.until("b is primary", 2*time.Second, w.primaryIs("b"))
	})
}

func (w *world) propose(node string, t agreed.CommandType, data any) {
	w.t.Helper()
	if _, err := w.nodes[node].Propose(w.t.Context(), t, data); err != nil {
		w.t.Fatal(err)
	}
}

// No quorum: nobody is promoted, however long it lasts, and nobody acts.
func TestNoQuorumNoPromotion(t *testing.T) {
	play(t, ones(9), func(t *testing.T, w *world) {
		w.kill("a1", "b1")
		w.pass(2 * time.Minute)
		w.wantPrimary("a", 1)
		if got := w.acting(); len(got) > 0 {
			t.Errorf("%v acts without a quorum", got)
		}
		w.restart("b1")
		w.until("b is primary", 15*time.Second, w.primaryIs("b"))
	})
}

// An hour of 2 % loss, 200 ms jitter and a node that is stopped 300 ms of every
// second (20 minutes each node): the primary stays.
func TestAnHourOfBadWeather(t *testing.T) {
	third := 20 * time.Minute
	if testing.Short() || raceDetector {
		third = 2 * time.Minute
	}
	for i, starved := range leaders {
		play(t, ones(uint64(10+i)), func(t *testing.T, w *world) {
			w.lead(leaders[(i+1)%3])
			w.mu.Lock()
			w.jitter, w.loss = 200*time.Millisecond, 0.02
			w.mu.Unlock()
			for began := time.Now(); time.Since(began) < third; {
				w.pause(starved)
				w.pass(300 * time.Millisecond)
				w.resume(starved)
				w.pass(700 * time.Millisecond)
			}
			w.wantPrimary("a", 1)
		})
	}
}

// A decision taken before an election is not carried out after it: a proposal
// would be passed on to the new leader, which has its own wait.
func TestDecisionOfAnEarlierTermIsDropped(t *testing.T) {
	play(t, ones(13), func(t *testing.T, w *world) {
		w.lead("c1")
		c := w.nodes["c1"].coord
		v, _, _, _ := c.Look()
		l, ok := w.nodes["c1"].Leading()
		if !ok {
			t.Fatal("c1 does not lead")
		}
		c.promote(t.Context(), w.agreed(), "b", PrimaryLost, v, l.Term-1)
		w.wantPrimary("a", 1)
		w.lead("b1")
		c.promote(t.Context(), w.agreed(), "b", PrimaryLost, v, l.Term)
		w.wantPrimary("a", 1)
	})
}

// Another is elected while the promotion is on its way, and is handed it: it has
// no effect, since the new leader has its own wait.
func TestPromotionHandedToANewLeaderHasNoEffect(t *testing.T) {
	play(t, ones(14), func(t *testing.T, w *world) {
		w.lead("c1")
		c := w.nodes["c1"].coord
		v, _, _, _ := c.Look()
		l, ok := w.nodes["c1"].Leading()
		if !ok {
			t.Fatal("c1 does not lead")
		}
		agreed := w.agreed()
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.promote(t.Context(), agreed, "b", PrimaryLost, v, l.Term)
		}()
		synctest.Wait() // it has found itself leading, and is on its way
		w.mu.Lock()
		w.term++
		w.crown("b1")
		w.nodes["b1"].firstCommit = w.now()
		w.mu.Unlock()
		<-done
		w.wantPrimary("a", 1)
	})
}
