package failover

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// simulate runs a test in a world and checks the laws at its end.
func simulate(t *testing.T, w func(t *testing.T) *world, test func(t *testing.T, w *world)) {
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
		test(t, w)
	})
}

func ones(seed uint64) func(*testing.T) *world {
	return func(t *testing.T) *world { return newWorld(t, seed, [3]int{1, 1, 1}, [3]int{1, 1, 1}) }
}

func twos(seed uint64) func(*testing.T) *world {
	return func(t *testing.T) *world { return newWorld(t, seed, [3]int{2, 2, 1}, [3]int{2, 2, 1}) }
}

// lead moves the raft leadership to a node.
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

// The primary's site is killed, with the raft leader in each site: b is primary within
// 7 s, the leader moves there, and a does not become primary again when it is back.
func TestPrimaryKilled(t *testing.T) {
	for _, leader := range leaders {
		for _, shape := range []func(uint64) func(*testing.T) *world{ones, twos} {
			var took []time.Duration
			for seed := range uint64(4) {
				simulate(t, shape(seed), func(t *testing.T, w *world) {
					w.lead(leader)
					w.pass(3 * time.Second)
					lost := w.siteNodes("a")
					killed := time.Now()
					w.kill(lost...)
					took = append(took, w.until("b is primary", 7*time.Second, w.primaryIs("b")))
					w.wantPrimary("b", 2)
					w.until("b acts", 3*time.Second, func() bool { return slices.Equal(w.acting(), []string{"b"}) })
					idle := time.Since(killed)
					w.until("leader in b", 5*time.Second, func() bool { return w.leaderSite() == "b" })
					w.until("the time is measured", 5*time.Second, func() bool {
						s := w.agreed()
						return s.LastFailover.RTOSeconds != nil && *s.LastFailover.RTOSeconds > s.Primary.Since.Sub(killed).Seconds()+0.5
					})
					f := w.agreed().LastFailover
					if f.From != "a" || f.Kind != agreed.FailoverUnplanned || f.Acknowledged || f.RTOSeconds == nil ||
						*f.RTOSeconds < 2.5 || *f.RTOSeconds > 7 || f.RPOSeconds != nil || f.RecordsAtRisk != nil {
						t.Errorf("failover record %+v", f)
					} else if rto := time.Duration(*f.RTOSeconds * float64(time.Second)); rto < idle-100*time.Millisecond || rto > idle+time.Second {
						t.Errorf("the record says that no site acted for %s, it was %s", rto, idle)
					}
					w.restart(lost...)
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

// The primary's processes are stopped for 30 s and continued: b is primary, and a starts
// nothing although its processes noticed no time.
func TestPrimaryStoppedAndBack(t *testing.T) {
	for _, leader := range leaders {
		simulate(t, twos(1), func(t *testing.T, w *world) {
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

// A leader in b or c that was stopped finds all nodes silent when it continues, and
// replaces no primary.
func TestStoppedLeaderReplacesNoPrimary(t *testing.T) {
	for _, leader := range []string{"b1", "c1"} {
		for _, d := range []time.Duration{600 * time.Millisecond, 3 * time.Second, 15 * time.Second} {
			simulate(t, ones(2), func(t *testing.T, w *world) {
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

// The raft leader is killed and the primary is not: an election is no failover.
func TestLeaderKilledIsNoFailover(t *testing.T) {
	for _, leader := range []string{"b1", "c1"} {
		simulate(t, ones(3), func(t *testing.T, w *world) {
			w.lead(leader)
			w.kill(leader)
			w.until("another leader", 5*time.Second, func() bool { s := w.leaderSite(); return s != "" && s != leader[:1] })
			w.pass(time.Minute)
			w.wantPrimary("a", 1)
		})
	}
}

// The primary's site is cut off, in both directions or in one: it is replaced and fenced,
// and stays replaced when it is back.
func TestPrimaryCutOff(t *testing.T) {
	for name, links := range map[string][]string{
		"full":     {"a>b", "b>a", "a>c", "c>a"},
		"outgoing": {"a>b", "a>c"},
		"incoming": {"b>a", "c>a"},
	} {
		for _, leader := range leaders {
			t.Run(name+" "+leader, func(t *testing.T) {
				simulate(t, twos(4), func(t *testing.T, w *world) {
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

// The primary's only node ends soon after each start, as on a full disk, and its supervisor
// starts it again. It is never silent for the patience, and never acts. A node that runs for
// long enough to act most of the time keeps the role.
func TestPrimaryThatEndsAgainAndAgain(t *testing.T) {
	for _, c := range []struct {
		runs, away time.Duration
		primary    string
		epoch      uint64
	}{
		{600 * time.Millisecond, 2200 * time.Millisecond, "b", 2},
		{15 * time.Second, 2200 * time.Millisecond, "a", 1},
	} {
		t.Run(c.runs.String(), func(t *testing.T) {
			simulate(t, ones(6), func(_ *testing.T, w *world) {
				w.lead("b1")
				for range int(20*time.Second/(c.runs+c.away)) + 3 {
					w.kill("a1")
					w.pass(c.away)
					w.restart("a1")
					w.pass(c.runs)
				}
				w.wantPrimary(c.primary, c.epoch)
			})
		})
	}
}

// The link between the leader's site and the primary is cut. The third site hears both
// and hands leases on, so the primary stays.
func TestPrimaryHeardByAnotherSiteStays(t *testing.T) {
	for _, leader := range []string{"b1", "c1"} {
		simulate(t, ones(5), func(t *testing.T, w *world) {
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

// The primary's links go up and down every second or two, which is less than the
// patience.
func TestFlappingLink(t *testing.T) {
	simulate(t, ones(6), func(t *testing.T, w *world) {
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

// The new primary is lost as well, at once: the third site is promoted after the dwell,
// and the site that was just replaced is the last choice.
func TestSecondLossInsideTheDwell(t *testing.T) {
	simulate(t, twos(7), func(t *testing.T, w *world) {
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
	simulate(t, ones(8), func(t *testing.T, w *world) {
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

// Without a quorum no site is promoted and none acts as primary, however long it lasts.
func TestNoQuorumNoPromotion(t *testing.T) {
	simulate(t, ones(9), func(t *testing.T, w *world) {
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

// The primary stays through an hour of 2 % loss, 200 ms jitter and a node that is stopped
// 300 ms of every second (20 minutes each node).
func TestAnHourOfLossAndJitter(t *testing.T) {
	third := 20 * time.Minute
	if testing.Short() || raceDetector {
		third = 2 * time.Minute
	}
	for i, starved := range leaders {
		simulate(t, ones(uint64(10+i)), func(t *testing.T, w *world) {
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

// A decision from before an election is not carried out after it: the proposal would be
// forwarded to the new leader, which has its own wait.
func TestDecisionOfAnEarlierTermIsDropped(t *testing.T) {
	simulate(t, ones(13), func(t *testing.T, w *world) {
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

// Another leader is elected while the promotion is on its way, and gets it forwarded: it
// has no effect, since the new leader has its own wait.
func TestPromotionForwardedToANewLeaderHasNoEffect(t *testing.T) {
	simulate(t, ones(14), func(t *testing.T, w *world) {
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
		synctest.Wait() // it has checked that it leads, and the proposal is on its way
		w.mu.Lock()
		w.term++
		w.elected("b1")
		w.nodes["b1"].firstCommit = w.now()
		w.mu.Unlock()
		<-done
		w.wantPrimary("a", 1)
	})
}

// siteCopies are the figures of each site.
type siteCopies map[string]AtRisk

func (c siteCopies) AtRisk(_, to string) AtRisk { return c[to] }

func (c siteCopies) Ends(context.Context, string, []string) (map[string]uint64, error) {
	return nil, nil
}

func (c siteCopies) Lacking(context.Context, string, map[string]uint64) (map[string]int64, error) {
	return nil, nil
}

// Of two sites that are as near to the lost one, the one that lacks less of its journals is
// promoted, and the record of the failover says what may be lost.
func TestTheFreshestCopyIsPromoted(t *testing.T) {
	lacks := func(n int64, age time.Duration) AtRisk {
		return AtRisk{Known: true, Records: map[string]int64{"c1": n}, Age: age, Unheard: 3}
	}
	for _, c := range []struct {
		name    string
		copies  siteCopies
		to      string
		level   int
		records *int64
		rpo     bool
	}{
		{"b has more", siteCopies{"a": lacks(10, 5*time.Second), "b": lacks(2, 4*time.Second)}, "b", agreed.LossLevel, ptr(int64(5)), true},
		{"as much", siteCopies{"a": lacks(2, 5*time.Second), "b": lacks(2, 4*time.Second)}, "a", agreed.LossLevel, ptr(int64(5)), true},
		{"only b is known", siteCopies{"b": lacks(50, time.Minute)}, "b", agreed.LossLevel, ptr(int64(53)), true},
		{"none is known", siteCopies{}, "a", agreed.LossLevel, nil, false},
		{"an older member", siteCopies{"a": lacks(10, 0), "b": lacks(2, 0)}, "b", agreed.LossLevel - 1, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			simulate(t, ones(37), func(t *testing.T, w *world) {
				if _, err := w.switchover("a1", planned("c")); err != nil {
					t.Fatal(err)
				}
				w.until("c acts", 5*time.Second, func() bool { return slices.Equal(w.acting(), []string{"c"}) })
				w.mu.Lock()
				w.states[len(w.states)-1].FeatureLevel = c.level
				for _, n := range w.nodes {
					n.coord.o.Copies = c.copies
				}
				w.mu.Unlock()
				w.kill("c1")
				w.until("another primary", 20*time.Second, func() bool { return w.agreed().Primary.Epoch == 3 })
				w.wantPrimary(c.to, 3)
				f := w.agreed().LastFailover
				if !equal(f.RecordsAtRisk, c.records) || (f.RPOSeconds != nil) != c.rpo {
					t.Errorf("the record has %s records, %s s", text(f.RecordsAtRisk), text(f.RPOSeconds))
				}
			})
		})
	}
}

func TestLossOf(t *testing.T) {
	const s, tick = time.Second, 250 * time.Millisecond
	for _, c := range []struct {
		name    string
		r       AtRisk
		silence time.Duration
		records *int64
		rpo     *float64
	}{
		{"unknown", AtRisk{Unheard: 5}, 3 * s, nil, nil},
		{"the copy ended when the site did", AtRisk{Known: true, Age: 3 * s}, 3 * s, ptr(int64(0)), ptr(0.5)},
		{"newer than the last ping", AtRisk{Known: true, Age: 2800 * time.Millisecond}, 3 * s, ptr(int64(0)), ptr(0.3)},
		{"it was behind", AtRisk{Known: true, Age: 13 * s, Records: map[string]int64{"x": 4, "y": 5}, Unheard: 2}, 3 * s, ptr(int64(11)), ptr(10.5)},
		{"the site is heard", AtRisk{Known: true, Age: 2 * s}, 0, ptr(int64(0)), ptr(2.0)},
	} {
		records, rpo := lossOf(c.r, c.silence, tick)
		if !equal(records, c.records) || !equal(rpo, c.rpo) {
			t.Errorf("%s: %s records, %s s; want %s, %s", c.name, text(records), text(rpo), text(c.records), text(c.rpo))
		}
	}
}

// lateAgreement lets a promotion through when the coordinator is told to stop, so that the
// measurement of it begins as late as it can.
type lateAgreement struct {
	*node
	asked, measured chan struct{}
	once            sync.Once
}

func (a *lateAgreement) Propose(ctx context.Context, t agreed.CommandType, data any) (uint64, error) {
	if t != agreed.CmdPromote {
		return a.node.Propose(ctx, t, data)
	}
	close(a.asked)
	<-ctx.Done()
	time.Sleep(time.Second) // the goroutines that wait for the measurements are waiting
	return 7, nil
}

func (a *lateAgreement) AwaitActing(context.Context, string, uint64, uint64) error {
	time.Sleep(time.Second)
	a.once.Do(func() { close(a.measured) })
	return nil
}

// A coordinator that is stopped waits for a measurement that its last action began.
func TestRunWaitsForTheLastMeasurement(t *testing.T) {
	simulate(t, ones(38), func(t *testing.T, w *world) {
		w.lead("b1")
		a := &lateAgreement{node: w.nodes["b1"], asked: make(chan struct{}), measured: make(chan struct{})}
		o := w.nodes["b1"].coord.o
		o.Agreement, o.Registerer = a, prometheus.NewRegistry()
		c := NewCoordinator(o)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = c.Run(ctx) // it returns nil
		}()
		w.kill("a1")
		<-a.asked
		stop()
		<-ended
		select {
		case <-a.measured:
		default:
			t.Error("Run has ended before the measurement")
		}
		w.until("another primary", 20*time.Second, func() bool { return w.agreed().Primary.Epoch == 2 })
	})
}
