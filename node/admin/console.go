package admin

import (
	"embed"
	"net/http"
)

//go:embed console.html console.css console.js
var consoleFiles embed.FS

// The page may only use its own script, its own style sheet and its own origin, and it
// can't be framed.
const consolePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// console serves one file of the page. The files contain no data: the page requests
// /admin/v1/status like any other client.
func console(name, contentType string) http.Handler {
	text, err := consoleFiles.ReadFile(name)
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		h := w.Header()
		h.Set("Content-Type", contentType)
		h.Set("Content-Security-Policy", consolePolicy)
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-cache")
		// The client may have disconnected: the error can't be reported.
		_, _ = w.Write(text)
	})
}
