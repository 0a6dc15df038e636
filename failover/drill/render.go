package drill

import (
	"bytes"
	"encoding/json"
	"fmt"
	htmltemplate "html/template"
	"strconv"
	"strings"
	"text/template"
	"time"
)

// Formats are the formats of Render.
func Formats() []string { return []string{"markdown", "json", "html"} }

// Render writes a report in one of Formats.
func (r Report) Render(format string) ([]byte, error) {
	var out bytes.Buffer
	var err error
	switch format {
	case "json":
		var text []byte
		text, err = json.MarshalIndent(r, "", "  ")
		out.Write(append(text, '\n'))
	case "markdown":
		err = markdown.Execute(&out, r)
	case "html":
		err = page.Execute(&out, r)
	default:
		return nil, fmt.Errorf("%w: format %q: use one of %s", ErrInvalid, format, strings.Join(Formats(), ", "))
	}
	if err != nil {
		return nil, fmt.Errorf("render the drill's report: %w", err)
	}
	return out.Bytes(), nil
}

var functions = map[string]any{
	"seconds": func(f *float64) string {
		if f == nil {
			return "not measured"
		}
		return strconv.FormatFloat(*f, 'f', 2, 64) + " s"
	},
	"count": func(n *int64) string {
		if n == nil {
			return "not measured"
		}
		return strconv.FormatInt(*n, 10)
	},
	"short": func(f float64) string { return strconv.FormatFloat(f, 'f', 2, 64) },
	"when":  func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05.000") },
	"at":    func(t *time.Time) time.Time { return *t },
	"clock": func(t time.Time) string { return t.UTC().Format("15:04:05.000") },
	"mark":  func(ok bool) string { return either(ok, "ok", "NO") },
	"waived": func(c Precheck) string {
		return either(c.WaivedBy != "", "waived by "+c.WaivedBy, either(c.OK, "ok", "NO"))
	},
	"verdict": func(v Verdict) string { return either(v == "", "running", string(v)) },
	// cell escapes text of peers so that it can't break a table or be markup.
	"cell": func(s string) string {
		return strings.NewReplacer("|", `\|`, "\n", " ", "<", "&lt;", "`", "'").Replace(s)
	},
}

var markdown = template.Must(template.New("markdown").Funcs(functions).Parse(`# Drill {{.ID}}: {{verdict .Verdict}}

{{cell .Rehearsed}}.
{{- if .Why}}

**Why not pass:** {{cell .Why}}
{{- end}}

| | |
| --- | --- |
| kind | {{.Kind}} of {{.Site}} |
| asked for by | {{cell .By}} |
| run by | {{.Runner}} |
| started | {{when .StartedAt}} UTC |
{{- if .EndedAt}}
| ended | {{when (at .EndedAt)}} UTC |
{{- end}}
| primary | {{.Primary.From}} (epoch {{.Primary.FromEpoch}}) to {{.Primary.To}} (epoch {{.Primary.ToEpoch}}) |
| RTO | {{seconds .RTO.Achieved}}, target {{seconds .RTO.Target}} |
| RPO | {{seconds .RPO.Achieved}}, target {{seconds .RPO.Target}} |
| role idle | {{seconds .IdleSeconds}} |
| site in its place after the cut | {{seconds .InPlaceSeconds}} |
| records at risk | {{count .RecordsAtRisk}} |
| jobs lost | {{count .JobsLost}} |
| client requests | {{.Requests}}, {{.Errors}} failed |
{{- if .Criteria}}

## Verdict
| criterion | | |
| --- | --- | --- |
{{- range .Criteria}}
| {{.Name}} | {{mark .OK}} | {{cell .Detail}} |
{{- end}}
{{- end}}

## What clients saw
| site | counts | requests | failed | refused (no key) | slowest |
| --- | --- | --- | --- | --- | --- |
{{- range .Clients}}
| {{.Site}} | {{if .Judged}}yes{{else}}no{{end}} | {{.Requests}} | {{.Errors}} | {{.Refused}} | {{short .Slowest}} s |
{{- end}}
{{- range .Clients}}{{range .Samples}}
- {{clock .At}} {{.Node}}: {{.Asked}}: {{cell .Error}}
{{- end}}{{end}}

## Timeline
| after | time | what | |
| --- | --- | --- | --- |
{{- range .Timeline}}
| {{short .After}} s | {{clock .At}} | {{cell .What}} | {{cell .Detail}} |
{{- end}}

## Prechecks
| check | | |
| --- | --- | --- |
{{- range .Checks}}
| {{.Name}} | {{waived .}} | {{cell .Detail}} |
{{- end}}
`))

var page = htmltemplate.Must(htmltemplate.New("page").Funcs(functions).Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Drill {{.ID}}: {{verdict .Verdict}}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{border-bottom:1px solid #ddd;padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top}
.pass{color:#067a2b}.fail,.NO{color:#b00020}.aborted,.skipped{color:#8a5a00}
</style></head><body>
<h1>Drill {{.ID}}: <span class="{{.Verdict}}">{{verdict .Verdict}}</span></h1>
<p>{{.Rehearsed}}.</p>
{{if .Why}}<p><b>Why not pass:</b> {{.Why}}</p>{{end}}
<table>
<tr><td>kind<td>{{.Kind}} of {{.Site}}
<tr><td>asked for by<td>{{.By}}
<tr><td>run by<td>{{.Runner}}
<tr><td>started<td>{{when .StartedAt}} UTC
{{if .EndedAt}}<tr><td>ended<td>{{when (at .EndedAt)}} UTC{{end}}
<tr><td>primary<td>{{.Primary.From}} (epoch {{.Primary.FromEpoch}}) to {{.Primary.To}} (epoch {{.Primary.ToEpoch}})
<tr><td>RTO<td>{{seconds .RTO.Achieved}}, target {{seconds .RTO.Target}}
<tr><td>RPO<td>{{seconds .RPO.Achieved}}, target {{seconds .RPO.Target}}
<tr><td>role idle<td>{{seconds .IdleSeconds}}
<tr><td>site in its place after the cut<td>{{seconds .InPlaceSeconds}}
<tr><td>records at risk<td>{{count .RecordsAtRisk}}
<tr><td>jobs lost<td>{{count .JobsLost}}
<tr><td>client requests<td>{{.Requests}}, {{.Errors}} failed
</table>
{{if .Criteria}}<h2>Verdict</h2><table>
{{range .Criteria}}<tr><td>{{.Name}}<td class="{{mark .OK}}">{{mark .OK}}<td>{{.Detail}}
{{end}}</table>{{end}}
<h2>What clients saw</h2><table><tr><th>site<th>counts<th>requests<th>failed<th>refused (no key)<th>slowest
{{range .Clients}}<tr><td>{{.Site}}<td>{{if .Judged}}yes{{else}}no{{end}}<td>{{.Requests}}<td>{{.Errors}}<td>{{.Refused}}<td>{{short .Slowest}} s
{{end}}</table>
{{range .Clients}}{{range .Samples}}<p>{{clock .At}} {{.Node}}: {{.Asked}}: {{.Error}}</p>{{end}}{{end}}
<h2>Timeline</h2><table>
{{range .Timeline}}<tr><td>{{short .After}} s<td>{{clock .At}}<td>{{.What}}<td>{{.Detail}}
{{end}}</table>
<h2>Prechecks</h2><table>
{{range .Checks}}<tr><td>{{.Name}}<td>{{waived .}}<td>{{.Detail}}
{{end}}</table>
</body></html>
`))
