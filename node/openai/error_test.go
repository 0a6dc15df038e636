package openai

import "testing"

func TestError(t *testing.T) {
	e := Error{Message: `a "b" <c>`, Type: ServerError, Code: "x"}
	if got, want := string(e.Body()), `{"error":{"message":"a \"b\" \u003cc\u003e","type":"server_error","param":null,"code":"x"}}`; got != want {
		t.Errorf("%s", got)
	}
	e.Param = "body.model"
	if got, ok := ErrorObject(e.Body()); !ok || string(got) != string(e.Object()) {
		t.Errorf("%s", got)
	}
	for _, body := range []string{``, `{`, `[]`, `{}`, `{"error":null}`, `{"error":"x"}`, `<html>`} {
		if got, ok := ErrorObject([]byte(body)); ok {
			t.Errorf("%s: %s", body, got)
		}
	}
}

func TestErrorKind(t *testing.T) {
	for object, want := range map[string][2]string{
		`{"type":"a","code":400}`:   {"a", "400"},
		`{"type":"a","code":"400"}`: {"a", "400"},
		`{"code":null}`:             {"", "null"},
		`{"message":"x"}`:           {"", ""},
		`"boom"`:                    {"", ""},
	} {
		if kind, code := ErrorKind([]byte(object)); kind != want[0] || code != want[1] {
			t.Errorf("%s: %q, %q", object, kind, code)
		}
	}
}
