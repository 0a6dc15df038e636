package jobs

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/journal"
)

// inBubble runs a node in virtual time.
func inBubble(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.limit, w.poll = 3*time.Hour, 50*time.Millisecond // virtual time
		f(t, w)
		w.stop()
	})
}

func refusing(status int, header http.Header, body string) error {
	return &serving.StatusError{Status: status, Header: header, Body: []byte(body)}
}

func TestRetries(t *testing.T) {
	for _, tc := range []struct {
		name     string
		errs     []error // of the first attempts; the next one succeeds
		want     journal.Status
		attempts uint32
		least    time.Duration // from the first start to the end
		most     time.Duration
		text     string
	}{
		{"at once", nil, journal.Succeeded, 1, 0, time.Second, ""},
		{"5xx twice", []error{refusing(500, nil, ""), refusing(503, nil, "")}, journal.Succeeded, 3, 3 * time.Second, 7 * time.Second, ""},
		{"Retry-After", []error{refusing(429, http.Header{"Retry-After": {"90"}}, "")}, journal.Succeeded, 2, 90 * time.Second, 92 * time.Second, ""},
		{"busy", []error{&serving.BusyError{Err: serving.ErrNoUpstream, RetryAfter: 20 * time.Second}}, journal.Succeeded, 2, 20 * time.Second, 22 * time.Second, ""},
		{"timeout, truncated, failed", []error{serving.ErrTimeout, serving.ErrTruncated, serving.ErrUpstreamFailed}, journal.Succeeded, 4, 7 * time.Second, 16 * time.Second, ""},
		{"4xx", []error{refusing(400, nil, `{"error":{"message":"too long","code":"x"}}`)}, journal.Failed, 1, 0, time.Second, "too long"},
		{"4xx without shape", []error{refusing(422, nil, "no")}, journal.Failed, 1, 0, time.Second, "no"},
		{"model gone", []error{serving.ErrUnknownModel}, journal.Failed, 1, 0, time.Second, "model_not_found"},
		{"too large", []error{errTooLarge}, journal.Failed, 1, 0, time.Second, "result_too_large"},
		{"always 502", slices.Repeat([]error{refusing(502, nil, "bad gateway")}, 9), journal.Failed, 5, 15 * time.Second, 32 * time.Second, "bad gateway"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world) {
				n := 0
				var first time.Time
				w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
					if n++; n == 1 {
						first = time.Now()
					}
					if n <= len(tc.errs) {
						return tc.errs[n-1]
					}
					return answering("{}")(ctx, r, s)
				}
				w.start()
				id := w.submit().ID
				v := w.await(id, tc.want)
				took := v.FinishedAt.Sub(first)
				if v.Attempts != tc.attempts || took < tc.least-time.Second || took > tc.most {
					t.Errorf("%d attempts in %s; want %d in %s to %s", v.Attempts, took, tc.attempts, tc.least, tc.most)
				}
				if !strings.Contains(v.Error, tc.text) || (v.Error == "") != (tc.text == "") {
					t.Errorf("error is %q", v.Error)
				}
			})
		})
	}
}

func TestExpiry(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.spare.Store(0)
		w.start()
		began := time.Now()
		id := w.submit(func(r *Request) { r.ExpiresIn = 10 * time.Second }).ID
		stays := w.submit(func(r *Request) { r.ExpiresIn = 5 * time.Minute }).ID
		v := w.await(id, journal.Expired)
		if took := v.FinishedAt.Sub(began); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("it expired after %s", took)
		}
		if v.Attempts != 0 || v.ExecutedBy != "" {
			t.Errorf("the job is %+v", v)
		}
		if got := w.get(stays).Status; got != journal.Queued {
			t.Errorf("the other job is %s", got)
		}
		// A node without a permit for a job can't end it either.
		w.agreed.lease(false)
		w.until("a new stream", func() bool { s, _, _ := w.streams.current(); return w.streams.island(s) })
		synctest.Wait()
		time.Sleep(10 * time.Minute)
		if got := w.get(stays).Status; got != journal.Queued {
			t.Errorf("without a lease the other job became %s", got)
		}
		w.agreed.lease(true)
		w.await(stays, journal.Expired)
	})
}

// TestUnreadableRequest: a request that this version can't read fails, with the reason.
func TestUnreadableRequest(t *testing.T) {
	w := newWorld(t)
	w.start()
	for want, change := range map[string]func(*Request){
		"unknown endpoint /v1/gone":      func(r *Request) { r.Endpoint = "/v1/gone" },
		"the body must be a JSON object": func(r *Request) { r.Body = []byte("7") },
	} {
		id := w.submit(change).ID
		w.await(id, journal.Failed)
		if got := string(w.get(id).Error); !strings.Contains(got, want) || !strings.Contains(got, "invalid_body") {
			t.Errorf("error %s, want %q", got, want)
		}
	}
}

// TestOrder: by priority, then tenants in turn, then the oldest first.
func TestOrder(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.configure(func(j *config.Jobs) { j.Concurrency = 1 })
		w.spare.Store(0)
		var mu sync.Mutex
		var order []string
		w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
			mu.Lock()
			order = append(order, strings.TrimSuffix(strings.TrimPrefix(string(r.Body), `{"model":"m","user":"`), `"}`))
			mu.Unlock()
			return answering("{}")(ctx, r, s)
		}
		w.start()
		for _, j := range []struct {
			body, tenant string
			priority     int
		}{
			{"a1", "a", 5}, {"a2", "a", 5}, {"a3", "a", 5}, {"b1", "b", 5}, {"low", "b", 0}, {"b2", "b", 5}, {"high", "a", 9},
		} {
			w.submit(func(r *Request) { r.Body, r.Who.Tenant, r.Priority = marked(j.body), j.tenant, j.priority })
			time.Sleep(5 * time.Millisecond)
		}
		w.spare.Store(1000)
		w.until("all have run", func() bool { return w.counts().Succeeded == 7 })
		if got, want := strings.Join(order, " "), "high a1 b1 a2 b2 a3 low"; got != want {
			t.Errorf("order is %s, want %s", got, want)
		}
	})
}

// TestLowPriorityIsNotStarved: while jobs of the highest priority keep all places busy, one
// start of eight is of the job that has waited longest, if that is more than a minute.
func TestLowPriorityIsNotStarved(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.configure(func(j *config.Jobs) { j.Concurrency = 1 })
		low, high := 0, 0
		var mu sync.Mutex
		w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
			time.Sleep(time.Second)
			mu.Lock()
			defer mu.Unlock()
			if strings.Contains(string(r.Body), "low") {
				low++
			} else {
				high++
			}
			return answering("{}")(ctx, r, s)
		}
		w.start()
		for range 5 {
			w.submit(func(r *Request) { r.Body, r.Priority = marked("low"), 0 })
		}
		waited := time.Now()
		for second := range 300 {
			w.submit(func(r *Request) { r.Body, r.Priority = marked(fmt.Sprint(second)), 9 })
			time.Sleep(time.Second)
			mu.Lock()
			if low == 1 && time.Since(waited) < agedAfter { // the first job found the node idle
				low, high = 0, 0
			}
			mu.Unlock()
		}
		mu.Lock()
		defer mu.Unlock()
		if low != 4 || high < 250 {
			t.Errorf("in five minutes %d jobs of priority 0 and %d of priority 9 ran", low, high)
		}
	})
}

// TestUnpausedAtOnce: a change of the configuration lets waiting jobs start at once.
func TestUnpausedAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.configure(func(j *config.Jobs) { j.Paused = true })
		w.start()
		id := w.submit().ID
		time.Sleep(5 * time.Second)
		if got := w.get(id).Status; got != journal.Queued {
			t.Fatalf("while jobs are paused, one is %s", got)
		}
		w.agreed.configure(func(j *config.Jobs) { j.Paused = false })
		unpaused := time.Now()
		w.await(id, journal.Succeeded)
		if took := time.Since(unpaused); took > time.Second {
			t.Errorf("it ran %s later", took)
		}
	})
}

func TestCancel(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.spare.Store(0)
		called := make(chan error, 1)
		w.server = func(ctx context.Context, _ serving.Request, _ serving.Sink) error {
			<-ctx.Done()
			called <- context.Cause(ctx)
			return ctx.Err()
		}
		w.start()
		id := w.submit().ID
		v, err := w.Cancel(t.Context(), ann, id)
		if err != nil || v.Status != journal.Cancelled || v.Attempts != 0 {
			t.Fatalf("cancel a waiting job: %+v, %v", v, err)
		}
		again, err := w.Cancel(t.Context(), ann, id)
		if err != nil || again.Status != journal.Cancelled {
			t.Errorf("cancel it twice: %+v, %v", again, err)
		}
		w.spare.Store(10)
		id = w.submit().ID
		w.await(id, journal.Running)
		if v, err = w.Cancel(t.Context(), ann, id); err != nil || v.Status != journal.Cancelled || v.ExecutedBy != "here" {
			t.Errorf("cancel a running job: %+v, %v", v, err)
		}
		if err := <-called; err == nil {
			t.Error("the upstream was not called off")
		}
		if _, err := w.Cancel(t.Context(), Caller{}, id); err == nil {
			t.Error("another tenant can cancel it")
		}
	})
}

// TestLeaseLoss: without a lease a node starts no job of an agreed stream. New jobs go to an
// island stream, which is proposed when there is a lease again.
func TestLeaseLoss(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.start()
		first, _, _ := w.streams.current()
		w.until("the stream is agreed on", func() bool { return w.streams.agreed(first) })
		w.agreed.lease(false)
		held := w.submit()
		time.Sleep(time.Second)
		if got := w.get(held.ID).Status; got != journal.Queued {
			t.Errorf("without a lease the job is %s", got)
		}
		w.until("a new stream", func() bool { s, _, _ := w.streams.current(); return s != first })
		second, token, _ := w.streams.current()
		if token != (journal.Token{Generation: 1}) {
			t.Errorf("the island's token is %v", token)
		}
		own := w.submit()
		w.await(own.ID, journal.Succeeded)
		if got := w.get(held.ID).Status; got != journal.Queued {
			t.Errorf("without a lease the first job is %s", got)
		}
		w.agreed.lease(true)
		w.await(held.ID, journal.Succeeded)
		w.until("the second stream is agreed on", func() bool { return w.streams.agreed(second) })
		w.until("the first one is dropped", func() bool { return !w.streams.agreed(first) })
		if _, token, _ = w.streams.current(); token.Index == 0 {
			t.Errorf("the token is still %v", token)
		}
	})
}

// TestProposedNeedsALease: once a stream was proposed, its jobs need a lease, whether the
// proposal was answered or not, and also after a crash.
func TestProposedNeedsALease(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.leased, w.agreed.refuse = false, cluster.ErrNoQuorum
		w.spare.Store(0)
		w.start()
		island := w.submit().ID
		stream, _, _ := w.streams.current()
		if !w.streams.island(stream) {
			t.Fatal("the first stream is no island")
		}
		w.agreed.lease(true)
		w.until("it is proposed", func() bool { return !w.streams.island(stream) })
		w.agreed.lease(false)
		w.spare.Store(10)
		time.Sleep(time.Second)
		if got := w.get(island).Status; got != journal.Queued {
			t.Errorf("without a lease the job of a proposed stream is %s", got)
		}
		w.crash()
		time.Sleep(time.Second)
		if got := w.get(island).Status; got != journal.Queued {
			t.Errorf("after a crash the job is %s", got)
		}
		w.agreed.mu.Lock()
		w.agreed.refuse, w.agreed.leased = nil, true
		w.agreed.mu.Unlock()
		w.await(island, journal.Succeeded)
	})
}

func TestIslandSurvivesACrash(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.leased = false
		w.spare.Store(0)
		w.start()
		id := w.submit().ID
		w.crash()
		w.spare.Store(10)
		w.await(id, journal.Succeeded)
	})
}

// TestCrash: a job that runs when its node crashes is started again, and the interrupted
// attempt counts. A job that has ended does not change.
func TestCrash(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.configure(func(j *config.Jobs) { j.MaxAttempts = 2 })
		hang := true
		w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
			if hang && string(r.Body) == string(marked("hangs")) {
				<-ctx.Done()
				return ctx.Err()
			}
			return answering("{}")(ctx, r, s)
		}
		w.start()
		done := w.submit().ID
		w.await(done, journal.Succeeded)
		running := w.submit(func(r *Request) { r.Body = marked("hangs") }).ID
		killer := w.submit(func(r *Request) { r.Body = marked("hangs") }).ID
		w.await(running, journal.Running)
		w.await(killer, journal.Running)
		w.crash()
		if v := w.get(done); v.Status != journal.Succeeded || v.Attempts != 1 {
			t.Errorf("the job that had ended is %+v", v)
		}
		w.until("both run again", func() bool { return w.get(running).Attempts == 2 && w.get(killer).Attempts == 2 })
		w.crash()
		if v := w.await(killer, journal.Failed); !strings.Contains(v.Error, "attempts_exhausted") {
			t.Errorf("a job that crashes its node is %+v", v)
		}
		w.await(running, journal.Failed)
		if c := w.counts(); c.Succeeded != 1 || c.Failed != 2 || c.Queued+c.Running != 0 {
			t.Errorf("counts are %+v", c)
		}
	})
}

// TestStop: running jobs get the grace period, the others wait for the next start.
func TestStop(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.configure(func(j *config.Jobs) { j.Concurrency = 2 })
		w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
			long := 3 * time.Second // within the grace
			if string(r.Body) == string(marked("long")) {
				long = time.Minute
			}
			if err := clock.Sleep(ctx, long); err != nil {
				return err
			}
			return answering("{}")(ctx, r, s)
		}
		w.start()
		short := w.submit().ID
		long := w.submit(func(r *Request) { r.Body = marked("long") }).ID
		waits := w.submit().ID
		w.await(short, journal.Running)
		w.await(long, journal.Running)
		w.restart()
		if got := w.get(short).Status; got != journal.Succeeded {
			t.Errorf("the short job is %s", got)
		}
		w.until("the long one runs again", func() bool { return w.get(long).Attempts == 2 })
		if v := w.await(waits, journal.Succeeded); v.Attempts != 1 {
			t.Errorf("the job that waited is %+v", v)
		}
		w.await(long, journal.Succeeded)
	})
}

// TestLateStart: if the permit is lost before the request is written, the attempt is cancelled
// and counted, and its result is not used.
func TestLateStart(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.start()
		first, _, _ := w.streams.current()
		w.until("the stream is agreed on", func() bool { return w.streams.agreed(first) })
		calls := 0
		w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
			if calls++; calls == 1 {
				w.agreed.lease(false) // while the connection is made
			}
			httptrace.ContextClientTrace(ctx).GotConn(httptrace.GotConnInfo{})
			if calls == 1 && ctx.Err() == nil {
				t.Error("the start was not called off")
			}
			return answering(`{"late":true}`)(ctx, r, s)
		}
		id := w.submit().ID
		w.until("the late start is counted", func() bool { return testutil.ToFloat64(w.metrics.late) == 1 })
		if v := w.get(id); v.Status.Final() {
			t.Errorf("the job is %+v", v)
		}
		w.agreed.lease(true)
		if v := w.await(id, journal.Succeeded); v.Attempts != 2 {
			t.Errorf("the job is %+v", v)
		}
		if n := testutil.ToFloat64(w.metrics.late); n != 1 {
			t.Errorf("%v late starts", n)
		}
	})
}

// TestStartWhileItsStreamIsProposed: a job of an island stream waits while the stream is
// proposed, and goes on when the cluster has agreed on it.
func TestStartWhileItsStreamIsProposed(t *testing.T) {
	for name, fails := range map[string]bool{"agreed on": false, "asked in vain first": true} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world) {
				w.agreed.lease(false)
				w.start()
				first, _, _ := w.streams.current()
				w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
					if !w.streams.agreed(first) { // while the connection is made
						if fails {
							w.agreed.refuseAll(cluster.ErrNoQuorum)
						}
						w.agreed.lease(true)
						w.until("the stream is proposed", func() bool { return !w.streams.island(first) })
						if fails {
							w.agreed.refuseAll(nil)
						} else {
							w.until("it is agreed on", func() bool { return w.streams.agreed(first) })
						}
					}
					httptrace.ContextClientTrace(ctx).GotConn(httptrace.GotConnInfo{})
					if err := ctx.Err(); err != nil {
						return err
					}
					if !w.streams.agreed(first) {
						t.Error("it began while the cluster was being asked")
					}
					return answering(`{"ok":true}`)(ctx, r, s)
				}
				if v := w.await(w.submit().ID, journal.Succeeded); v.Attempts != 1 {
					t.Errorf("it took %d attempts", v.Attempts)
				}
				if n := testutil.ToFloat64(w.metrics.late); n != 0 {
					t.Errorf("%v late starts", n)
				}
			})
		})
	}
}

// deliver copies all records of a node's own streams to another node.
func deliver(t *testing.T, from, to *world) {
	t.Helper()
	for s, end := range from.log.Ends() {
		if s.Origin != from.node || end.Durable == 0 {
			continue
		}
		held, _ := to.log.End(s)
		for next := held.Durable + 1; next <= end.Durable; {
			frames, after, err := from.log.Read(s, next, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := to.log.Receive(t.Context(), s, frames); err != nil {
				t.Fatal(err)
			}
			next = after
		}
	}
}

// twoNodes are two nodes of a site. The jobs of the first one hang.
func twoNodes(t *testing.T) (a, b *world) {
	a, b = newWorld(t), newWorld(t)
	b.node, b.ring, b.agreed = "here-2", a.ring, a.agreed
	a.server = func(ctx context.Context, _ serving.Request, _ serving.Sink) error {
		<-ctx.Done()
		return ctx.Err()
	}
	a.start()
	b.start()
	return a, b
}

// TestAdoption: the new owner of a stream runs its queued and running jobs, once it has all
// records.
func TestAdoption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := twoNodes(t)
		defer func() { a.stop(); b.stop() }()
		stream, _, _ := a.streams.current()
		a.until("the stream is agreed on", func() bool { return a.streams.agreed(stream) })
		running := a.submit().ID
		a.await(running, journal.Running)
		a.spare.Store(0)
		queued := a.submit().ID
		deliver(t, a, b)
		time.Sleep(time.Second)
		if got := b.get(queued).Status; got != journal.Queued {
			t.Errorf("before the adoption the job is %s at the other node", got)
		}
		gate := make(chan struct{})
		b.copies.mu.Lock()
		b.copies.caughtUp = gate
		b.copies.mu.Unlock()
		a.agreed.give(t, stream, b.node)
		late := a.submit().ID // written after the change of owner, before a knows of it
		time.Sleep(5 * time.Second)
		if got := b.get(queued).Status; got != journal.Queued {
			t.Errorf("before all records are here the job is %s", got)
		}
		close(gate)
		v := b.await(queued, journal.Succeeded)
		if v.Attempts != 1 || v.ExecutedBy != "here" {
			t.Errorf("the queued job is %+v", v)
		}
		if v := b.await(running, journal.Succeeded); v.Attempts != 2 {
			t.Errorf("the job that ran is %+v", v)
		}
		// The last records arrive late.
		deliver(t, a, b)
		b.await(late, journal.Succeeded)
	})
}

// TestLateResult: a result of the earlier owner that arrives while the adopter runs the job is
// kept.
func TestLateResult(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := twoNodes(t)
		defer func() { a.stop(); b.stop() }()
		finish := make(chan struct{})
		a.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
			<-finish
			return answering(`{"by":"a"}`)(ctx, r, s)
		}
		stopped := make(chan error, 1)
		b.server = func(ctx context.Context, _ serving.Request, _ serving.Sink) error {
			<-ctx.Done()
			stopped <- context.Cause(ctx)
			return ctx.Err()
		}
		stream, _, _ := a.streams.current()
		a.until("the stream is agreed on", func() bool { return a.streams.agreed(stream) })
		id := a.submit().ID
		a.await(id, journal.Running)
		deliver(t, a, b)
		a.agreed.give(t, stream, b.node)
		b.until("the adopter runs it", func() bool { return b.get(id).Attempts == 2 })
		close(finish)
		a.await(id, journal.Succeeded)
		deliver(t, a, b)
		v := b.await(id, journal.Succeeded)
		if string(v.Result) != `{"by":"a"}` {
			t.Errorf("the result is %s", v.Result)
		}
		if err := <-stopped; err == nil {
			t.Error("the adopter was not called off")
		}
		b.until("the adopter has written the result", func() bool {
			row, _, err := b.table.Get(id)
			current, ok := row.Current()
			if err != nil || !ok || current.Stream.Origin != b.node || current.Kind != journal.Finished {
				return false
			}
			out, err := b.o.Sealer.OpenOutcome(&current)
			return err == nil && out.Adopted && string(out.Body) == `{"by":"a"}`
		})
	})
}

// TestSwitchoverPausesStarts: while a switchover takes the primary away from this site, jobs
// are accepted and none starts. Running ones go on. When the switchover is off the agreed
// state, the waiting ones start.
func TestSwitchoverPausesStarts(t *testing.T) {
	for _, tc := range []struct {
		from   string
		pauses bool
	}{{"here", true}, {"there", false}} {
		inBubble(t, func(t *testing.T, w *world) {
			w.agreed.mu.Lock()
			w.agreed.state.Primary.Site = tc.from
			w.agreed.mu.Unlock()
			answer := make(chan struct{})
			w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
				select {
				case <-answer:
				case <-ctx.Done():
					return ctx.Err()
				}
				return answering("{}")(ctx, r, s)
			}
			w.start()
			stream, _, _ := w.streams.current()
			w.until("the stream is agreed on", func() bool { return w.streams.agreed(stream) })
			running := w.submit()
			w.await(running.ID, journal.Running)
			next := &agreed.Switchover{ID: "sw", From: tc.from, To: "elsewhere", Deadline: time.Now().Add(time.Minute)}
			if _, err := w.agreed.Propose(t.Context(), agreed.CmdSwitchover, agreed.SwitchoverSet{Next: next}); err != nil {
				t.Fatal(err)
			}
			if err := w.AwaitStarted(t.Context()); err != nil {
				t.Errorf("the start of a running job is not on disk: %v", err)
			}
			waiting := w.submit()
			time.Sleep(2 * time.Minute) // the deadline does not matter: the raft leader clears the switchover
			want := journal.Running
			if tc.pauses {
				want = journal.Queued
			}
			if got := w.get(waiting.ID).Status; got != want {
				t.Errorf("during a switchover from %s the job is %s, want %s", tc.from, got, want)
			}
			close(answer)
			w.await(running.ID, journal.Succeeded)
			if _, err := w.agreed.Propose(t.Context(), agreed.CmdSwitchover, agreed.SwitchoverSet{Expect: "sw"}); err != nil {
				t.Fatal(err)
			}
			w.await(waiting.ID, journal.Succeeded)
		})
	}
}

// TestAwaitStarted: it waits while the record of a start is being written.
func TestAwaitStarted(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.start()
		w.exec.mu.Lock()
		w.exec.starting++
		w.exec.mu.Unlock()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := w.AwaitStarted(ctx); err == nil {
			t.Error("it did not wait for a start")
		}
		w.exec.mu.Lock()
		w.exec.starting--
		w.exec.mu.Unlock()
		w.await(w.submit().ID, journal.Succeeded)
		if err := w.AwaitStarted(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
