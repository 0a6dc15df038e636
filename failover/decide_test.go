package failover

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// healthyView has nothing to decide: a is primary, b in its city, c remote.
func healthyView() View {
	site := func(name, city string, priority int) SiteView {
		return SiteView{
			Name: name, City: city, Priority: priority, Ready: 1, UpstreamsHealthy: 1,
			Heard: true, Witnessed: true, Leased: true, StableFor: time.Hour,
		}
	}
	return View{
		Quorum: true, LeadingFor: time.Hour, NewLeaderWait: 1320 * time.Millisecond,
		Patience: 2500 * time.Millisecond, NoLease: 30 * time.Second,
		Primary: "a", Sites: []SiteView{site("a", "shanghai", 1), site("b", "shanghai", 2), site("c", "beijing", 3)},
		Dwell: 10 * time.Second, Penalty: time.Minute,
	}
}

func (v *View) at(name string) *SiteView {
	for i := range v.Sites {
		if v.Sites[i].Name == name {
			return &v.Sites[i]
		}
	}
	return nil
}

func (v *View) lose(name string, silence time.Duration) {
	s := v.at(name)
	s.Ready, s.Heard, s.Leased, s.StableFor = 0, false, false, 0
	s.Silence, s.LeaderSilence, s.NoLeaseFor = silence, silence, silence
}

func TestDecide(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*View)
		action Action
		why    Reason
	}{
		{"healthy", func(*View) {}, stay, PrimaryHealthy},
		{"quarantined", func(v *View) { v.lose("a", time.Hour); v.Quarantined = true }, stay, Quarantined},
		{"no quorum", func(v *View) { v.lose("a", time.Hour); v.Quorum = false }, stay, NoQuorum},
		{"silent, not for long", func(v *View) { v.lose("a", 2499*time.Millisecond) }, stay, StillPatient},
		{"silent for the patience", func(v *View) { v.lose("a", 2500*time.Millisecond) }, Action{Promote, "b"}, PrimaryLost},
		{"silent to the leader, no witness", func(v *View) {
			v.lose("a", 5*time.Second)
			v.at("a").Silence, v.at("a").Witnessed = 0, false
		}, stay, Unwitnessed},
		{"no witness for 30 s", func(v *View) {
			v.lose("a", 30*time.Second)
			v.at("a").Silence, v.at("a").Witnessed = 0, false
		}, Action{Promote, "b"}, PrimaryNoLease},
		{"silent to the leader, heard elsewhere", func(v *View) { v.at("a").LeaderSilence = time.Minute }, stay, PrimaryHeard},
		{"heard, no lease for 29 s", func(v *View) {
			v.at("a").Leased, v.at("a").NoLeaseFor = false, 29*time.Second
		}, stay, PrimaryUnleased},
		{"heard, no lease for 30 s", func(v *View) {
			v.at("a").Leased, v.at("a").NoLeaseFor = false, 30*time.Second
		}, Action{Promote, "b"}, PrimaryNoLease},
		{"paused by an operator", func(v *View) { v.lose("a", time.Minute); v.Held = true }, stay, Paused},
		{"paused, but nothing to do", func(v *View) { v.Held = true }, stay, PrimaryHealthy},
		{"a new leader waits", func(v *View) { v.lose("a", time.Minute); v.LeadingFor = 1319 * time.Millisecond }, stay, NewLeaderWait},
		{"dwell", func(v *View) {
			v.lose("a", time.Minute)
			v.Last = LastPromotion{From: "b", Ago: 9 * time.Second}
		}, stay, Dwelling},
		{"dwell ended by an acknowledgement", func(v *View) {
			v.lose("a", time.Minute)
			v.Last = LastPromotion{From: "b", Ago: time.Second, Acknowledged: true}
		}, Action{Promote, "b"}, PrimaryLost},
		{"a site that was just replaced comes last", func(v *View) {
			v.lose("a", time.Minute)
			v.Last = LastPromotion{From: "b", Ago: 20 * time.Second}
		}, Action{Promote, "c"}, PrimaryLost},
		{"the only candidate was just replaced and is steady", func(v *View) {
			v.lose("a", time.Minute)
			v.lose("c", time.Minute)
			v.Last = LastPromotion{From: "b", Ago: 20 * time.Second}
		}, Action{Promote, "b"}, PrimaryLost},
		{"the only candidate was just replaced and flaps", func(v *View) {
			v.lose("a", time.Minute)
			v.lose("c", time.Minute)
			v.at("b").StableFor = 9 * time.Second
			v.Last = LastPromotion{From: "b", Ago: 20 * time.Second}
		}, stay, NoCandidate},
		{"same city lost: remote", func(v *View) { v.lose("a", time.Minute); v.lose("b", time.Minute) }, Action{Promote, "c"}, PrimaryLost},
		{"all sites lost", func(v *View) {
			v.lose("a", time.Minute)
			v.lose("b", time.Minute)
			v.lose("c", time.Minute)
		}, stay, NoCandidate},
		{"candidate drains", func(v *View) { v.lose("a", time.Minute); v.at("b").Ready = 0 }, Action{Promote, "c"}, PrimaryLost},
		{"candidate without a lease", func(v *View) { v.lose("a", time.Minute); v.at("b").Leased = false }, Action{Promote, "c"}, PrimaryLost},
		{"candidate without upstreams", func(v *View) { v.lose("a", time.Minute); v.at("b").UpstreamsHealthy = 0 }, Action{Promote, "c"}, PrimaryLost},
		{"no upstream anywhere: city first", func(v *View) {
			v.lose("a", time.Minute)
			v.at("b").UpstreamsHealthy, v.at("c").UpstreamsHealthy = 0, 0
		}, Action{Promote, "b"}, PrimaryLost},
		{"city before freshness", func(v *View) {
			v.lose("a", time.Minute)
			v.at("b").Behind, v.at("c").Behind = ptr(int64(9)), ptr(int64(0))
		}, Action{Promote, "b"}, PrimaryLost},
		{"freshest of equals", func(v *View) {
			v.Primary = "c"
			v.lose("c", time.Minute)
			v.at("a").Behind, v.at("b").Behind = ptr(int64(9)), ptr(int64(3))
		}, Action{Promote, "b"}, PrimaryLost},
		{"an unknown lag comes after a known one", func(v *View) {
			v.Primary = "c"
			v.lose("c", time.Minute)
			v.at("b").Behind = ptr(int64(300))
		}, Action{Promote, "b"}, PrimaryLost},
		{"then priority", func(v *View) { v.Primary = "c"; v.lose("c", time.Minute) }, Action{Promote, "a"}, PrimaryLost},
		{"idle for 7 s", func(v *View) { v.at("a").IdleFor = 7400 * time.Millisecond }, stay, PrimaryHealthy},
		{"idle for 7.5 s", func(v *View) { v.at("a").IdleFor = 7500 * time.Millisecond }, Action{Promote, "b"}, PrimaryIdle},
		{"idle, and silent just now", func(v *View) {
			v.at("a").IdleFor, v.at("a").Heard, v.at("a").LeaderSilence = 10*time.Second, false, time.Second
		}, Action{Promote, "b"}, PrimaryIdle},
		{"idle during a switchover", func(v *View) { v.at("a").IdleFor, v.Switchover = time.Minute, SwitchoverRunning }, stay, SwitchoverInProgress},
		{"idle, paused by an operator", func(v *View) { v.at("a").IdleFor, v.Held = time.Minute, true }, stay, Paused},
		{"idle, dwell", func(v *View) {
			v.at("a").IdleFor, v.Last = time.Minute, LastPromotion{From: "b", Ago: 9 * time.Second}
		}, stay, Dwelling},
		{"its disks slow for 59 s", func(v *View) { v.at("a").SlowFor = 59 * time.Second }, stay, PrimaryHealthy},
		{"its disks slow for a minute", func(v *View) { v.at("a").SlowFor = time.Minute }, Action{Promote, "b"}, PrimarySlow},
		{"all disks slow", func(v *View) {
			v.at("a").SlowFor, v.at("b").SlowFor, v.at("c").SlowFor = time.Minute, time.Minute, time.Second
		}, stay, PrimaryHealthy},
		{"its disks slow, those of the other city not", func(v *View) {
			v.at("a").SlowFor, v.at("b").SlowFor = time.Minute, time.Second
		}, Action{Promote, "c"}, PrimarySlow},
		{"its disks slow, and the candidate not steady", func(v *View) {
			v.at("a").SlowFor, v.at("b").StableFor = time.Minute, 59*time.Second
		}, stay, PrimaryHealthy},
		{"its disks slow, and no upstream elsewhere", func(v *View) {
			v.at("a").SlowFor, v.at("b").UpstreamsHealthy, v.at("c").UpstreamsHealthy = time.Minute, 0, 0
		}, stay, PrimaryHealthy},
		{"its disks slow during a switchover", func(v *View) {
			v.at("a").SlowFor, v.Switchover = time.Minute, SwitchoverRunning
		}, stay, SwitchoverInProgress},
		{"its disks slow, paused by an operator", func(v *View) { v.at("a").SlowFor, v.Held = time.Minute, true }, stay, Paused},
		{"its disks slow, dwell", func(v *View) {
			v.at("a").SlowFor, v.Last = time.Minute, LastPromotion{From: "b", Ago: 9 * time.Second}
		}, stay, Dwelling},
		{"lost, and the city's other disks slow", func(v *View) {
			v.lose("a", time.Minute)
			v.at("b").SlowFor = time.Second
		}, Action{Promote, "c"}, PrimaryLost},
		{"lost, and all other disks slow", func(v *View) {
			v.lose("a", time.Minute)
			v.at("b").SlowFor, v.at("c").SlowFor = time.Second, time.Second
		}, Action{Promote, "b"}, PrimaryLost},
		{"switchover under way", func(v *View) { v.Switchover = SwitchoverRunning }, stay, SwitchoverInProgress},
		{"the primary is lost during a switchover", func(v *View) {
			v.Switchover = SwitchoverRunning
			v.lose("a", time.Minute)
		}, Action{Promote, "b"}, PrimaryLost},
		{"switchover abandoned", func(v *View) { v.Switchover = SwitchoverExpired }, Action{Kind: ExpireSwitchover}, SwitchoverOverdue},
		{"abandoned without a quorum", func(v *View) { v.Switchover, v.Quorum = SwitchoverExpired, false }, stay, NoQuorum},
		{"the primary's site left the configuration", func(v *View) { v.Primary = "z" }, Action{Promote, "a"}, PrimaryRemoved},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := healthyView()
			c.change(&v)
			if action, why := Decide(v); action != c.action || why != c.why {
				t.Errorf("got %v (%s), want %v (%s)", action, why, c.action, c.why)
			}
		})
	}
}

func ptr[T any](v T) *T { return &v }

func drawView(t *rapid.T) View {
	v := healthyView()
	d := func(name string, most time.Duration) time.Duration {
		return time.Duration(rapid.Int64Range(0, int64(most)).Draw(t, name))
	}
	often := func(name string) bool { return rapid.IntRange(0, 9).Draw(t, name) > 0 }
	v.Quorum, v.Quarantined, v.Held = often("quorum"), !often("quarantined"), !often("held")
	v.LeadingFor = d("leading", 5*time.Second)
	v.Primary = rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "primary")
	v.Switchover = rapid.SampledFrom([]Progress{"", "", "", SwitchoverRunning, SwitchoverExpired}).Draw(t, "switchover")
	v.Last = LastPromotion{
		From: rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(t, "from"),
		Ago:  d("ago", 2*time.Minute), Acknowledged: !often("acked"),
	}
	for i := range v.Sites {
		s := &v.Sites[i]
		if rapid.Bool().Draw(t, "lost") {
			v.lose(s.Name, d("silence", 40*time.Second))
			if s.Witnessed = rapid.Bool().Draw(t, "witnessed"); !s.Witnessed {
				s.Silence = 0
			}
		} else {
			s.Ready = rapid.IntRange(0, 2).Draw(t, "ready")
			s.UpstreamsHealthy = rapid.IntRange(0, 2).Draw(t, "upstreams")
			s.StableFor = d("stable", time.Minute)
			if !often("fast") {
				s.SlowFor = d("slow", time.Minute)
			}
			if s.Name == v.Primary && !often("acts") {
				s.IdleFor = d("idle", 20*time.Second)
			}
			if s.Leased = often("leased"); !s.Leased {
				s.NoLeaseFor = d("no lease", 40*time.Second)
			}
		}
	}
	return v
}

func TestDecideProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := drawView(t)
		action, why := Decide(v)
		if again, whyAgain := Decide(v); again != action || whyAgain != why {
			t.Fatal("two calls with one view differ")
		}
		if (action.Kind == Promote) != (action.Site != "") {
			t.Fatalf("%v: only a promotion names a site", action)
		}
		p := *v.at(v.Primary)
		if action.Kind == Promote {
			s := v.at(action.Site)
			switch {
			case action.Site == v.Primary:
				t.Fatal("promotes the primary")
			case !s.Heard || !s.Leased || s.Ready == 0:
				t.Fatalf("promotes a site that can't act: %+v", *s)
			case p.Heard && p.Leased && why != PrimaryIdle && why != PrimarySlow:
				t.Fatal("replaces a primary that is heard and holds a lease")
			case why == PrimaryIdle && (p.IdleFor < 3*v.Patience || v.Switchover != NoSwitchover):
				t.Fatalf("%s too early: %+v", why, p)
			case !v.Quorum || v.Quarantined || v.Held || v.LeadingFor < v.NewLeaderWait:
				t.Fatal("promotes without a quorum, in quarantine, while paused, or as a new leader")
			case why == PrimaryLost && p.Silence < v.Patience, why == PrimaryNoLease && p.NoLeaseFor < v.NoLease:
				t.Fatalf("%s too early: %+v", why, p)
			case v.Last.From != "" && !v.Last.Acknowledged && v.Last.Ago < v.Dwell:
				t.Fatal("promotes inside the dwell")
			}
		}
		// More patience never makes it promote.
		w := v
		w.Patience += time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(t, "more patience"))
		if more, _ := Decide(w); more.Kind == Promote && action.Kind != Promote {
			t.Fatal("promotes with more patience, and not with less")
		}
		// A longer silence never makes it stay.
		if action.Kind == Promote && why == PrimaryLost {
			w := v
			w.Sites = append([]SiteView(nil), v.Sites...)
			w.at(v.Primary).Silence += time.Minute
			w.at(v.Primary).LeaderSilence += time.Minute
			if longer, _ := Decide(w); longer != action {
				t.Fatalf("%v after a longer silence, %v before", longer, action)
			}
		}
	})
}

func TestFailbackAvailable(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*View)
		want   string
	}{
		{"the first site is back and steady", func(*View) {}, "a"},
		{"not for long enough", func(v *View) { v.at("a").StableFor = FailbackStable - 1 }, "b"},
		{"without upstreams", func(v *View) { v.at("a").UpstreamsHealthy = 0 }, "b"},
		{"its disks are slow", func(v *View) { v.at("a").SlowFor = time.Second }, "b"},
		{"only better sites count", func(v *View) { v.Primary = "a" }, ""},
		{"no quorum", func(v *View) { v.Quorum = false }, ""},
		{"a switchover is under way", func(v *View) { v.Switchover = SwitchoverRunning }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := healthyView()
			v.Primary = "c"
			c.change(&v)
			if got, ok := FailbackAvailable(v); got != c.want || ok != (c.want != "") {
				t.Errorf("got %q, %v, want %q", got, ok, c.want)
			}
		})
	}
}
