package modelsim

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"
)

// Record is one request that the server received.
type Record struct {
	ID       uint64            `json:"id"` // counts from 1
	At       time.Time         `json:"at"`
	Endpoint string            `json:"endpoint"` // with /v1
	Model    string            `json:"model"`    // with its "@" settings
	Stream   bool              `json:"stream"`
	Header   map[string]string `json:"header"` // those of keptHeaders
	// Body is the request's body, cut at 64 KiB.
	Body   string `json:"body"`
	Status int    `json:"status,omitempty"` // of the answer; 0: none was sent
	Fault  Mode   `json:"fault,omitempty"`
	// Finished: the answer (or the fault) was sent completely. Cancelled: the client
	// disconnected before; CancelledAt is when the server noticed.
	Finished    bool       `json:"finished"`
	Cancelled   bool       `json:"cancelled"`
	CancelledAt *time.Time `json:"cancelled_at,omitempty"`
}

// Stats are counters since the start.
type Stats struct {
	Requests  uint64 `json:"requests"`  // POSTs to model endpoints
	InFlight  int    `json:"in_flight"` // of them, now
	Finished  uint64 `json:"finished"`  // answered, faults included
	Cancelled uint64 `json:"cancelled"` // the client disconnected before
	Faulted   uint64 `json:"faulted"`   // failed by a fault; refused connections are not requests
	Refused   uint64 `json:"refused"`   // connections reset by mode refuse
}

var keptHeaders = []string{
	"Authorization", "Content-Type", "User-Agent", "X-Request-Id", "Accept", "Traceparent", "X-Stainless-Retry-Count",
}

const keptBody = 64 << 10

// recorder keeps the newest requests.
type recorder struct {
	mu    sync.Mutex // guards all below and the contents of every Record in ring
	keep  int
	ring  []*Record // at most keep, oldest overwritten
	stats Stats
}

func (b *recorder) open(r *http.Request, endpoint string, q *query) *Record {
	rec := &Record{
		At: time.Now(), Endpoint: endpoint, Model: q.Model, Stream: q.Stream,
		Header: make(map[string]string, 4), Body: string(q.body[:min(len(q.body), keptBody)]),
	}
	for _, h := range keptHeaders {
		if v := r.Header.Get(h); v != "" {
			rec.Header[h] = v
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stats.Requests++
	b.stats.InFlight++
	rec.ID = b.stats.Requests
	if len(b.ring) < b.keep {
		b.ring = append(b.ring, rec)
	} else {
		b.ring[int((rec.ID-1)%uint64(b.keep))] = rec
	}
	return rec
}

func (b *recorder) close(rec *Record, status int, cancelled bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stats.InFlight--
	rec.Status = status
	if cancelled {
		now := time.Now()
		rec.Cancelled, rec.CancelledAt = true, &now
		b.stats.Cancelled++
		return
	}
	rec.Finished = true
	b.stats.Finished++
}

func (b *recorder) fault(rec *Record, m Mode) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec.Fault = m
	b.stats.Faulted++
}

func (b *recorder) refused() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stats.Refused++
}

// Requests returns the recorded requests, oldest first.
func (s *Server) Requests() []Record {
	b := &s.record
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]Record, 0, len(b.ring))
	start := 0
	if len(b.ring) == b.keep {
		start = int(b.stats.Requests % uint64(b.keep))
	}
	for i := range b.ring {
		if rec := b.ring[(start+i)%len(b.ring)]; rec != nil {
			out = append(out, *rec)
		}
	}
	return out
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	s.record.mu.Lock()
	defer s.record.mu.Unlock()
	return s.record.stats
}

// forget deletes the recorded requests and keeps the counters. The ring keeps its length,
// because a request's ID gives its place in the ring.
func (b *recorder) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.ring)
}

func (s *Server) serveControl(w http.ResponseWriter, r *http.Request) {
	switch r.Method + " " + r.URL.Path {
	case "GET /sim/requests":
		writeJSON(w, http.StatusOK, s.Requests())
	case "DELETE /sim/requests":
		s.record.forget()
		w.WriteHeader(http.StatusNoContent)
	case "GET /sim/stats":
		writeJSON(w, http.StatusOK, s.Stats())
	case "GET /sim/faults":
		writeJSON(w, http.StatusOK, s.faults.get())
	case "POST /sim/faults":
		var f Fault
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10))
		d.DisallowUnknownFields()
		if err := d.Decode(&f); err != nil {
			writeError(w, http.StatusBadRequest, "invalid_request_error", "bad_fault", err.Error())
			return
		}
		if err := s.SetFault(f); err != nil {
			writeError(w, http.StatusBadRequest, "invalid_request_error", "bad_fault", err.Error())
			return
		}
		writeJSON(w, http.StatusOK, f)
	case "DELETE /sim/faults":
		s.ClearFault()
		w.WriteHeader(http.StatusNoContent)
	default:
		writeError(w, http.StatusNotFound, "invalid_request_error", "not_found", "no such control: "+r.Method+" "+r.URL.Path)
	}
}
