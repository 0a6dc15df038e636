package admin

import (
	"embed"
	"net/http"
)

//go:embed console.html console.css console.js
var consoleFiles embed.FS

// The page may run its own script, wear its own style and ask its own origin,
// and nothing else; nobody may frame it.
const consolePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// console serves one file of the page. The files are the same for everybody:
// what the page shows it fetches from /admin/v1/status, like any client.
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
		// The asker may have gone; nobody is left to tell.
		_, _ = w.Write(text)
	})
}
