package sim

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"time"
)

// secret is in every prompt, so that the prompt can be found where it may not be.
const secret = "canary-7q1x"

// secrets must not be on a disk or between two nodes in clear.
var secrets = []string{secret, adminToken}

const streamTokens = 40

func ask(model string, stream bool, question string) string {
	return fmt.Sprintf(`{"model":%q,"stream":%t,"messages":[{"role":"user","content":%q}]}`, model, stream, question)
}

// chat asks a node a question, as a client that waits for the answer.
func (w *World) chat(ctx context.Context, m *Machine) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var out struct {
		Choices []json.RawMessage `json:"choices"`
	}
	if _, err := w.call(ctx, m, http.MethodPost, m.at(portAPI)+"/v1/chat/completions", ask(modelName, false, "hello "+secret), &out); err != nil {
		return err
	}
	if len(out.Choices) != 1 {
		return fmt.Errorf("%d choices", len(out.Choices))
	}
	return nil
}

// chats asks a node for an answer every other second. Its own site has a model server, so a
// process that has answered once must go on, whatever happens elsewhere, while that server
// works. One that is about to end by itself, as a removed node does, refuses connections
// first.
func (r *run) chats(ctx context.Context, m *Machine) {
	const ending = 5 * time.Second
	var answered *process
	for sleep(ctx, 2*time.Second) == nil {
		p := m.current()
		if p == nil {
			continue
		}
		err := r.w.chat(ctx, m)
		site := r.w.modelFault.Load()
		switch {
		case err == nil:
			answered = p
		case site != nil && *site == m.Site:
		case answered == p && sleep(ctx, ending) == nil && m.current() == p && !p.stopping.Load():
			r.laws.broken(6, "%s did not answer a chat request %s ago: %s", m.Name, ending, err)
		}
	}
}

// streams asks for streamed answers. What comes must be the beginning of the answer, and all
// of it where the stream says that it is complete.
func (r *run) streams(ctx context.Context, m *Machine) {
	for n := 0; sleep(ctx, 3*time.Second) == nil; n++ {
		if m.current() == nil {
			continue
		}
		question := fmt.Sprintf("stream %d of %s %s", n, m.Name, secret)
		got, err := r.w.stream(ctx, m, streamModel, question)
		if err != nil && got.text == "" {
			continue // it was refused, or has said that it failed
		}
		want, oracleErr := r.w.answer(question)
		switch {
		case oracleErr != nil:
			r.laws.broken(9, "the model server does not answer: %s", oracleErr)
		case err == nil && !got.done:
			r.laws.broken(9, "%s ended a stream without [DONE] and without an error", m.Name)
		case !strings.HasPrefix(want, got.text):
			r.laws.broken(9, "%s sent a stream with a gap or a repeat: %q of %q", m.Name, got.text, want)
		case got.done && got.text != want:
			r.laws.broken(9, "%s sent [DONE] after %q of %q", m.Name, got.text, want)
		}
	}
}

// answer is what a model server without a fault answers.
func (w *World) answer(question string) (string, error) {
	rec := httptest.NewRecorder()
	w.oracle.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/v1/chat/completions", strings.NewReader(ask("m", false, question))))
	var out struct {
		Choices []struct {
			Message struct {
				Content string `json:"content"`
			} `json:"message"`
		} `json:"choices"`
	}
	if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil || len(out.Choices) != 1 {
		return "", fmt.Errorf("%d choices: %w", len(out.Choices), err)
	}
	return out.Choices[0].Message.Content, nil
}

type streamed struct {
	text string
	done bool // [DONE] came
}

// stream reads a streamed answer to its end. An error says that it is not complete: of the
// connection, or sent as an event.
func (w *World) stream(ctx context.Context, m *Machine, model, question string) (streamed, error) {
	var s streamed
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+m.at(portAPI)+"/v1/chat/completions", strings.NewReader(ask(model, true, question)))
	if err != nil {
		return s, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := w.clients[m.Site].Do(req)
	if err != nil {
		return s, err
	}
	defer func() { _ = resp.Body.Close() }() // it was read, or its end does not matter
	if resp.StatusCode != http.StatusOK {
		return s, fmt.Errorf("status %d", resp.StatusCode)
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		data, is := strings.CutPrefix(lines.Text(), "data: ")
		switch {
		case !is:
			continue
		case data == "[DONE]":
			s.done = true
			continue
		}
		var event struct {
			Error   json.RawMessage `json:"error"`
			Choices []struct {
				Delta struct {
					Content string `json:"content"`
				} `json:"delta"`
			} `json:"choices"`
		}
		if err := json.Unmarshal([]byte(data), &event); err != nil {
			return s, fmt.Errorf("an event that is not JSON: %w", err)
		}
		if event.Error != nil {
			return s, errors.New("an error event")
		}
		for _, c := range event.Choices {
			s.text += c.Delta.Content
		}
	}
	return s, lines.Err()
}

// leaves starts streams of eight minutes and leaves soon. No model server may work on. What
// runs in the way may have been cut off or lost power meanwhile: its peers learn of that
// when their packets stay unanswered.
func (r *run) leaves(ctx context.Context, m *Machine) {
	for n := 0; sleep(ctx, 7*time.Second) == nil; n++ {
		if m.current() == nil {
			continue
		}
		question := fmt.Sprintf("slow %d of %s.", n, m.Name)
		troubled, before := r.w.net.faulty(), r.w.running()
		patient, leave := context.WithTimeout(ctx, time.Second+time.Duration(r.ledger.draw(2000))*time.Millisecond)
		_, _ = r.w.stream(patient, m, slowModel, question) // it can't be complete
		leave()
		if sleep(ctx, time.Second) != nil {
			return
		}
		if r.w.worksOn(question) != "" && (troubled || r.w.net.faulty() || !slices.Equal(before, r.w.running())) {
			if sleep(ctx, userTimeout+5*time.Second) != nil {
				return
			}
		}
		if site := r.w.worksOn(question); site != "" {
			r.laws.broken(8, "the model server of %s works on for a client of %s that has gone", site, m.Name)
		}
	}
}

// running is the process of each machine, nil for one that is off.
func (w *World) running() []*process {
	var all []*process
	for _, m := range w.machines {
		all = append(all, m.current())
	}
	return all
}

// worksOn is the site whose model server is answering this question, empty if none is.
func (w *World) worksOn(question string) string {
	for site, server := range w.models {
		for _, rec := range server.Requests() {
			if !rec.Finished && !rec.Cancelled && strings.Contains(rec.Body, question) {
				return site
			}
		}
	}
	return ""
}
