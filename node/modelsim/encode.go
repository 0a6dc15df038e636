package modelsim

import (
	"encoding/json"
	"strconv"
)

// encoder writes the JSON of one answer of chat or completions.
type encoder struct {
	chat     bool
	id       string
	created  int64
	model    []byte // JSON string
	question []byte
}

// open begins an event, up to the opening bracket of its choices.
func (v *encoder) open(b []byte) []byte {
	b = append(b, `data: {"id":"`...)
	b = append(b, v.id...)
	b = append(b, `","object":"`...)
	if v.chat {
		b = append(b, "chat.completion.chunk"...)
	} else {
		b = append(b, "text_completion"...)
	}
	b = append(b, `","created":`...)
	b = strconv.AppendInt(b, v.created, 10)
	b = append(b, `,"model":`...)
	b = append(b, v.model...)
	return append(b, `,"choices":[`...)
}

func index(b []byte, i int) []byte {
	return strconv.AppendInt(append(b, `{"index":`...), int64(i), 10)
}

// role is the first chunk of a chat choice, without content. A completion has none.
func (v *encoder) role(b []byte, i int) []byte {
	if !v.chat {
		return b
	}
	b = index(v.open(b), i)
	return append(b, `,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}`+"\n\n"...)
}

// token writes token k of choice i. Words of the vocabulary need no escaping, arguments
// do.
func (v *encoder) token(b []byte, i int, a *answer, k int) []byte {
	t := a.tokens[k]
	b = index(v.open(b), i)
	switch {
	case !v.chat:
		b = append(append(b, `,"text":"`...), t.text...)
		b = append(b, '"')
	case t.field == arguments:
		b = append(b, `,"delta":{"tool_calls":[{"index":0,`...)
		if k == 0 {
			b = append(b, `"id":"call_`...)
			b = append(append(b, v.id...), `","type":"function",`...)
		}
		b = append(b, `"function":{`...)
		if k == 0 {
			b = append(append(b, `"name":`...), mustJSON(a.tool)...)
			b = append(b, ',')
		}
		b = append(append(b, `"arguments":`...), mustJSON(t.text)...)
		b = append(b, `}}]}`...)
	default:
		b = append(append(b, `,"delta":{"`...), t.field...)
		b = append(append(b, `":"`...), t.text...)
		b = append(b, `"}`...)
	}
	return append(b, `,"logprobs":null,"finish_reason":null}]}`+"\n\n"...)
}

func (v *encoder) finish(b []byte, i int, reason string) []byte {
	b = index(v.open(b), i)
	if v.chat {
		b = append(b, `,"delta":{}`...)
	} else {
		b = append(b, `,"text":""`...)
	}
	b = append(append(b, `,"logprobs":null,"finish_reason":"`...), reason...)
	return append(b, `"}]}`+"\n\n"...)
}

func (v *encoder) usage(b []byte, u usage) []byte {
	b = append(append(v.open(b), `],"usage":`...), mustJSON(u)...)
	return append(b, "}\n\n"...)
}

type toolCall struct {
	ID       string `json:"id"`
	Type     string `json:"type"`
	Function struct {
		Name      string `json:"name"`
		Arguments string `json:"arguments"`
	} `json:"function"`
}

type message struct {
	Role      string     `json:"role"`
	Content   *string    `json:"content"`
	Reasoning string     `json:"reasoning_content,omitempty"`
	ToolCalls []toolCall `json:"tool_calls,omitempty"`
}

type choice struct {
	Index   int      `json:"index"`
	Message *message `json:"message,omitempty"`
	Text    *string  `json:"text,omitempty"`
	// Logprobs is always null, as when a request does not ask for them.
	Logprobs *struct{} `json:"logprobs"`
	Finish   *string   `json:"finish_reason"`
}

// whole is the body of a plain answer. A fault may change its finish_reason.
func (v *encoder) whole(answers []*answer, f Fault) []byte {
	body := struct {
		ID      string          `json:"id"`
		Object  string          `json:"object"`
		Created int64           `json:"created"`
		Model   json.RawMessage `json:"model"`
		Choices []choice        `json:"choices"`
		Usage   usage           `json:"usage"`
	}{v.id, "text_completion", v.created, v.model, make([]choice, 0, len(answers)), measure(v.question, answers)}
	if v.chat {
		body.Object = "chat.completion"
	}
	for i, a := range answers {
		text, finish := a.text(content), a.finish
		c := choice{Index: i, Finish: &finish}
		if f.Mode == InsufficientResource {
			finish = string(InsufficientResource)
		}
		if f.Mode == RoleOnlyThenEnd {
			text, c.Finish = "", nil
		}
		if v.chat {
			c.Message = &message{Role: "assistant", Content: &text, Reasoning: a.text(reasoning)}
			if a.tool != "" {
				t := toolCall{ID: "call_" + v.id, Type: "function"}
				t.Function.Name, t.Function.Arguments = a.tool, a.text(arguments)
				c.Message.Content, c.Message.ToolCalls = nil, []toolCall{t}
			}
		} else {
			c.Text = &text
		}
		body.Choices = append(body.Choices, c)
	}
	return mustJSON(body)
}
