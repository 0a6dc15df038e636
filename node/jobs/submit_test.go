package jobs

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/shares"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

func TestDurability(t *testing.T) {
	const node, site, sites, cities = journal.DurableNode, journal.DurableSite, journal.DurableTwoSites, journal.DurableTwoCities
	for _, tc := range []struct {
		name                         string
		want, least                  journal.Durability
		possible, reachable, reached journal.Durability
		later                        journal.Durability // after half a second
		has                          journal.Durability
		err                          error
		took                         time.Duration
	}{
		{"node", node, "", node, node, node, "", node, nil, 0},
		{"node, and more is true", node, "", sites, sites, sites, "", sites, nil, 0},
		{"default, alone", "", "", node, node, node, "", node, nil, 0},
		{"default, others can't be heard", "", "", cities, site, node, "", node, nil, 0},
		{"default, another site has it", "", "", cities, cities, node, sites, sites, nil, 500 * time.Millisecond},
		{"default, another site is slow", "", "", cities, cities, node, "", node, nil, 2 * time.Second},
		{"default with a minimum, others can't be heard", "", site, cities, site, node, site, site, nil, 500 * time.Millisecond},
		{"default with a minimum that fails", "", site, cities, site, node, "", "", &DurabilityError{}, 2 * time.Second},
		{"explicit", sites, "", cities, cities, node, sites, sites, nil, 500 * time.Millisecond},
		{"explicit, not in time", sites, "", cities, cities, site, "", "", &DurabilityError{}, 2 * time.Second},
		{"explicit, no peer heard", sites, "", cities, node, node, "", "", &DurabilityError{}, 2 * time.Second},
		{"explicit with a minimum", cities, site, cities, cities, node, site, site, nil, 2 * time.Second},
		{"explicit with a minimum, no peer heard", cities, node, cities, site, node, "", node, nil, 0},
		{"impossible", cities, "", sites, sites, node, "", "", ErrImpossible, 0},
		{"impossible with a minimum", cities, node, sites, sites, node, "", "", ErrImpossible, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world) {
				w.spare.Store(0)
				w.start()
				w.copies.say(tc.possible, tc.reachable, tc.reached)
				if tc.later != "" {
					later := time.AfterFunc(500*time.Millisecond, func() { w.copies.say(tc.possible, tc.reachable, tc.later) })
					defer later.Stop()
				}
				began := time.Now()
				v, err := w.Submit(t.Context(), request(func(r *Request) { r.Durability, r.MinDurability = tc.want, tc.least }))
				if took := time.Since(began).Truncate(100 * time.Millisecond); took != tc.took {
					t.Errorf("it took %s, want %s", took, tc.took)
				}
				var short *DurabilityError
				switch {
				case tc.err == nil && (err != nil || v.Durability != tc.has):
					t.Errorf("%+v, %v; want %s", v, err, tc.has)
				case errors.As(tc.err, &short):
					if !errors.As(err, &short) {
						t.Errorf("the error is %v", err)
					} else if _, err := w.Get(t.Context(), ann, short.ID); err != nil {
						t.Errorf("the job exists, but: %v", err)
					}
				case tc.err != nil && !errors.Is(err, tc.err):
					t.Errorf("the error is %v, want %v", err, tc.err)
				}
			})
		})
	}
}

// TestResultWaitsForItsDurability: a result is shown when it is as durable as the client
// asked.
func TestResultWaitsForItsDurability(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		all := journal.DurableTwoCities
		w.start()
		w.copies.say(all, all, journal.DurableTwoSites)
		strict := w.submit(func(r *Request) { r.Durability = journal.DurableTwoSites }).ID
		lax := w.submit(func(r *Request) { r.Durability = "" }).ID
		w.copies.say(all, all, journal.DurableNode) // for the next records
		w.until("both have ended", func() bool { return w.counts().Succeeded == 2 })
		if a, b := w.get(strict), w.get(lax); a.Status != journal.Running || a.Result != nil || b.Status != journal.Running {
			t.Errorf("shown too early: %+v, %+v", a, b)
		}
		w.copies.say(all, journal.DurableNode, journal.DurableNode)
		if a, b := w.get(strict).Status, w.get(lax).Status; a != journal.Running || b != journal.Succeeded {
			t.Errorf("after the peers were lost: %s, %s", a, b)
		}
		w.copies.say(all, all, journal.DurableTwoSites)
		w.await(strict, journal.Succeeded)
	})
}

// TestCursorOfADeletedJob: a list goes on after a job that was deleted between two pages.
func TestCursorOfADeletedJob(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.start()
		var ids []journal.JobID
		for range 3 {
			id := w.submit().ID
			w.await(id, journal.Succeeded)
			ids = append(ids, id)
		}
		if err := w.Delete(t.Context(), ann, ids[1]); err != nil {
			t.Fatal(err)
		}
		for _, q := range []Query{{Limit: 10, After: ids[1]}, {Limit: 10, Before: ids[1]}} {
			page, err := w.List(t.Context(), ann, q)
			if err != nil || len(page.Jobs) != 1 {
				t.Fatalf("%+v, %v", page, err)
			}
			if got, want := page.Jobs[0].ID, ids[map[bool]int{true: 0, false: 2}[q.After != journal.JobID{}]]; got != want {
				t.Errorf("the list goes on with %s, want %s", got, want)
			}
		}
		if _, err := w.List(t.Context(), ann, Query{Limit: 10, After: newID(time.Now())}); !errors.Is(err, ErrBadCursor) {
			t.Errorf("an unknown cursor: %v", err)
		}
	})
}

// TestRepeatWhileTheCopyArrives: a client repeats a submission at another node, at the moment
// at which the job's record arrives there. It is the same job, wherever between the look-ups
// the record arrives.
func TestRepeatWhileTheCopyArrives(t *testing.T) {
	for _, at := range []string{"FindKey", "Get"} {
		synctest.Test(t, func(t *testing.T) {
			a, b := newWorld(t), newWorld(t)
			b.node, b.ring, b.agreed = "here-2", a.ring, a.agreed
			defer func() { a.stop(); b.stop() }()
			a.spare.Store(0)
			b.spare.Store(0)
			keyed := func(r *Request) { r.IdempotencyKey = "k" }
			a.start()
			first := a.submit(keyed)
			b.open()
			b.o.Table = &interrupted{Table: b.table, at: at, do: func() { deliver(t, a, b) }}
			b.launch()
			again, err := b.Submit(t.Context(), request(keyed))
			if err != nil || again.ID != first.ID {
				t.Errorf("the record arrives before %s: the repeat got %+v, %v, want job %s", at, again, err, first.ID)
			}
		})
	}
}

// interrupted does something once, before one of its look-ups.
type interrupted struct {
	*jobtable.Table
	at string
	do func()
}

func (i *interrupted) before(name string) {
	if do := i.do; name == i.at && do != nil {
		i.do = nil
		do()
	}
}

func (i *interrupted) FindKey(hash string) ([]journal.JobID, error) {
	i.before("FindKey")
	return i.Table.FindKey(hash)
}

func (i *interrupted) Get(id journal.JobID) (jobtable.Row, bool, error) {
	i.before("Get")
	return i.Table.Get(id)
}

func TestIdempotencyKey(t *testing.T) {
	w := newWorld(t)
	w.start()
	keyed := func(key, tenant, body string) *Request {
		return request(func(r *Request) { r.IdempotencyKey, r.Who.Tenant, r.Body = key, tenant, marked(body) })
	}
	first, err := w.Submit(t.Context(), keyed("k", "ann", "1"))
	if err != nil {
		t.Fatal(err)
	}
	w.await(first.ID, journal.Succeeded)
	again, err := w.Submit(t.Context(), keyed("k", "ann", "1"))
	if err != nil || again.ID != first.ID || again.Status != journal.Succeeded {
		t.Errorf("a repeat gives %+v, %v", again, err)
	}
	if _, err := w.Submit(t.Context(), keyed("k", "ann", "2")); !errors.Is(err, ErrKeyReused) {
		t.Errorf("another body gives %v", err)
	}
	for _, r := range []*Request{keyed("k", "bob", "1"), keyed("k2", "ann", "1")} {
		if v, err := w.Submit(t.Context(), r); err != nil || v.ID == first.ID {
			t.Errorf("another tenant or key gives %+v, %v", v, err)
		}
	}
	var same sync.WaitGroup
	seen := make(chan journal.JobID, 20)
	for range cap(seen) {
		same.Go(func() {
			v, err := w.Submit(t.Context(), keyed("k3", "ann", "1"))
			if err != nil {
				t.Error(err)
				return
			}
			seen <- v.ID
		})
	}
	same.Wait()
	close(seen)
	one := <-seen
	for id := range seen {
		if id != one {
			t.Fatalf("jobs %s and %s of one key", one, id)
		}
	}
	// A record with the id of a deleted job is never executed: a 202 would be a lost job.
	gone, err := w.Submit(t.Context(), keyed("k4", "ann", "1"))
	if err != nil {
		t.Fatal(err)
	}
	w.await(gone.ID, journal.Succeeded)
	if err := w.Delete(t.Context(), ann, gone.ID); err != nil {
		t.Fatal(err)
	}
	if v, err := w.Submit(t.Context(), keyed("k4", "ann", "1")); !errors.Is(err, ErrKeyReused) {
		t.Errorf("a repeat after the deletion gives %+v, %v", v, err)
	}
	w.restart()
	if again, err = w.Submit(t.Context(), keyed("k", "ann", "1")); err != nil || again.ID != first.ID {
		t.Errorf("after a restart a repeat gives %+v, %v", again, err)
	}
	if c := w.counts(); c.Succeeded+c.Queued+c.Running != 4 {
		t.Errorf("counts are %+v", c)
	}
}

// TestKeyInTwoSites: one key is used with two bodies in sites that can't reach each other.
// Both jobs run and are flagged. With the same body it is the same job, and one result counts.
func TestKeyInTwoSites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := twoNodes(t)
		defer func() { a.stop(); b.stop() }()
		a.server = answering(`{"by":"a"}`)
		keyed := func(body string) func(*Request) {
			return func(r *Request) { r.IdempotencyKey, r.Body = "k", marked(body) }
		}
		one, two := a.submit(keyed("1")), b.submit(keyed("2"))
		a.await(one.ID, journal.Succeeded)
		b.await(two.ID, journal.Succeeded)
		deliver(t, a, b)
		deliver(t, b, a)
		for _, w := range []*world{a, b} {
			for _, id := range []journal.JobID{one.ID, two.ID} {
				if v := w.get(id); !v.Conflict || v.Status != journal.Succeeded {
					t.Errorf("at %s job %s is %+v", w.node, id, v)
				}
			}
		}
		same := func(r *Request) { r.IdempotencyKey, r.Body = "k2", marked("1") }
		x, y := a.submit(same), b.submit(same)
		if x.ID != y.ID {
			t.Fatalf("one key and body make %s and %s", x.ID, y.ID)
		}
		a.await(x.ID, journal.Succeeded)
		b.await(x.ID, journal.Succeeded)
		deliver(t, a, b)
		deliver(t, b, a)
		va, vb := a.get(x.ID), b.get(x.ID)
		if string(va.Result) != string(vb.Result) || va.Conflict {
			t.Errorf("the sites differ: %+v, %+v", va, vb)
		}
	})
}

func TestBounds(t *testing.T) {
	w := newWorld(t)
	w.spare.Store(0)
	w.agreed.configure(func(j *config.Jobs) { j.MaxQueued, j.MaxQueuedBytes = 3, 100 })
	w.start()
	if now, _, _ := w.streams.current(); !w.exec.has(now) {
		t.Error("jobs are taken before they are counted")
	}
	body := func(n int) func(*Request) {
		return func(r *Request) { r.Body = []byte(strings.Repeat("x", n)) }
	}
	w.submit(body(60))
	if _, err := w.Submit(t.Context(), request(body(41))); !errors.Is(err, ErrBusy) {
		t.Errorf("too many bytes: %v", err)
	}
	w.submit(body(10))
	third := w.submit(body(10)).ID
	if _, err := w.Submit(t.Context(), request(body(1))); !errors.Is(err, ErrBusy) {
		t.Errorf("too many jobs: %v", err)
	}
	if _, err := w.Cancel(t.Context(), ann, third); err != nil {
		t.Fatal(err)
	}
	w.until("a job is accepted again", func() bool {
		_, err := w.Submit(t.Context(), request(body(1)))
		return err == nil
	})
	w.restart()
	w.until("the bounds hold after a restart", func() bool {
		_, err := w.Submit(t.Context(), request(body(1)))
		return errors.Is(err, ErrBusy)
	})
}

// One tenant can't fill the queue, also after a restart: others are accepted meanwhile.
func TestATenantsShareOfTheQueue(t *testing.T) {
	w := newWorld(t)
	w.spare.Store(0)
	w.agreed.configure(func(j *config.Jobs) { j.MaxQueued, j.MaxQueuedBytes = 6, 1000 })
	w.agreed.mu.Lock()
	w.agreed.state.Parsed.Limits.TenantShare = 50
	w.agreed.mu.Unlock()
	w.start()
	of := func(tenant string, bytes int) func(*Request) {
		return func(r *Request) {
			r.Who = serving.Principal{Tenant: tenant, KeyID: "k"}
			r.Body = []byte(strings.Repeat("x", bytes))
		}
	}
	spent := func(tenant string, bytes int, what string) {
		t.Helper()
		_, err := w.Submit(t.Context(), request(of(tenant, bytes)))
		var share *shares.Error
		if !errors.As(err, &share) || share.Tenant != tenant || !strings.Contains(share.Of, what) {
			t.Errorf("a job of %s with %d bytes: %v, want a share of %s", tenant, bytes, err, what)
		}
	}
	w.submit(of("large", 400))
	spent("large", 101, "bytes")
	w.submit(of("large", 1))
	last := w.submit(of("large", 1)).ID
	spent("large", 1, "jobs")
	w.submit(of("small", 1))
	w.submit(of("wide", 590)) // more than its share of the bytes, and its only job
	if _, err := w.Cancel(t.Context(), Caller{Principal: serving.Principal{Tenant: "large", KeyID: "k"}}, last); err != nil {
		t.Fatal(err)
	}
	w.until("a job is accepted again", func() bool {
		_, err := w.Submit(t.Context(), request(of("large", 1)))
		return err == nil
	})
	w.restart()
	w.until("the share holds after a restart", func() bool {
		_, err := w.Submit(t.Context(), request(of("large", 1)))
		var share *shares.Error
		return errors.As(err, &share)
	})
}

func TestNotReady(t *testing.T) {
	w := newWorld(t)
	w.ring = keyring.NewRing()
	w.start()
	if _, err := w.Submit(t.Context(), request()); !errors.Is(err, ErrNotReady) {
		t.Errorf("without a data key: %v", err)
	}
	w.stop()
	if _, err := w.Submit(t.Context(), request()); !errors.Is(err, ErrNotReady) {
		t.Errorf("after Run: %v", err)
	}
}

func TestTenants(t *testing.T) {
	w := newWorld(t)
	w.start()
	hers := w.submit().ID
	his := w.submit(func(r *Request) { r.Who.Tenant = "bob" }).ID
	w.await(hers, journal.Succeeded)
	ctx := t.Context()
	bob, operator := Caller{}, Caller{Operator: true}
	bob.Tenant = "bob"
	for name, err := range map[string]error{
		"get":    second(w.Get(ctx, bob, hers)),
		"cancel": second(w.Cancel(ctx, bob, hers)),
		"retry":  second(w.Retry(ctx, bob, hers)),
		"delete": w.Delete(ctx, bob, hers),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s another tenant's job: %v", name, err)
		}
	}
	if _, err := w.List(ctx, bob, Query{Limit: 10, After: hers}); !errors.Is(err, ErrBadCursor) {
		t.Errorf("another tenant's cursor: %v", err)
	}
	for _, tc := range []struct {
		who  Caller
		q    Query
		want []journal.JobID
	}{
		{ann, Query{Limit: 10}, []journal.JobID{hers}},
		{bob, Query{Limit: 10}, []journal.JobID{his}},
		{operator, Query{Limit: 10}, []journal.JobID{his, hers}},
		{operator, Query{Limit: 10, Tenant: "ann"}, []journal.JobID{hers}},
		{operator, Query{Limit: 1}, []journal.JobID{his}},
		{operator, Query{Limit: 10, After: his}, []journal.JobID{hers}},
		{operator, Query{Limit: 10, Before: hers}, []journal.JobID{his}},
		{operator, Query{Limit: 10, Status: []journal.Status{journal.Failed}}, nil},
	} {
		p, err := w.List(ctx, tc.who, tc.q)
		if err != nil {
			t.Fatal(err)
		}
		var got []journal.JobID
		for _, v := range p.Jobs {
			got = append(got, v.ID)
		}
		if len(got) != len(tc.want) || len(got) > 0 && got[0] != tc.want[0] || p.More != (tc.q.Limit == 1) {
			t.Errorf("%+v lists %v of %+v, want %v", tc.who, got, tc.q, tc.want)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestDeleteAndRetry(t *testing.T) {
	w := newWorld(t)
	w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
		if string(r.Body) == string(marked("bad")) {
			return refusing(400, nil, "no")
		}
		return answering("{}")(ctx, r, s)
	}
	w.start()
	ctx := t.Context()
	good := w.submit().ID
	w.await(good, journal.Succeeded)
	if _, err := w.Retry(ctx, ann, good); !errors.Is(err, ErrNotRetryable) {
		t.Errorf("retry a job that succeeded: %v", err)
	}
	bad := w.submit(func(r *Request) { r.Body, r.Priority = marked("bad"), 7 }).ID
	w.await(bad, journal.Failed)
	v, err := w.Retry(ctx, ann, bad)
	if err != nil || v.ID == bad {
		t.Fatalf("retry: %+v, %v", v, err)
	}
	if v = w.await(v.ID, journal.Failed); v.RetryOf != bad.String() || v.Priority != 7 {
		t.Errorf("the new job is %+v", v)
	}
	if err := w.Delete(ctx, ann, good); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Get(ctx, ann, good); !errors.Is(err, ErrNotFound) {
		t.Errorf("get a deleted job: %v", err)
	}
	w.spare.Store(0)
	waits := w.submit().ID
	if err := w.Delete(ctx, ann, waits); !errors.Is(err, ErrNotFinal) {
		t.Errorf("delete a waiting job: %v", err)
	}
	if _, err := w.Retry(ctx, ann, waits); !errors.Is(err, ErrNotRetryable) {
		t.Errorf("retry a waiting job: %v", err)
	}
	if _, err := w.Cancel(ctx, ann, newID(time.Now())); !errors.Is(err, ErrNotFound) {
		t.Errorf("cancel an unknown job: %v", err)
	}
	w.restart()
	if _, err := w.Get(ctx, ann, good); !errors.Is(err, ErrNotFound) {
		t.Errorf("after a restart, get a deleted job: %v", err)
	}
}
