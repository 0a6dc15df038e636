package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// summarize prints what runs where and what to try. It writes once, so that a reader
// of a pipe gets all of it or nothing.
func (p *devPlan) summarize(w io.Writer, exe string, children *devChildren, status admin.Status, took time.Duration) {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }

	if status.Healthy {
		say("%d sites are up after %.1f s.", len(p.sites), took.Seconds())
	} else {
		say("%d sites run, but the cluster is not healthy after %.0f s:", len(p.sites), took.Seconds())
		for _, reason := range status.Reasons {
			say("  - %s", reason)
		}
	}
	say("Data and logs: %s\n", p.dir)

	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(cells ...string) { _, _ = fmt.Fprintln(t, strings.Join(cells, "\t")) } // into memory
	row("NODE", "CITY", "API", "ADMIN", "PID")
	for i, n := range p.nodes {
		row(n.name, p.city(n.site), "http://"+loopback(n.api), "http://"+loopback(n.admin), fmt.Sprint(children.nodes[i].pid))
	}
	for i, s := range p.sims {
		row(s.site+"'s model server", p.city(s.site), "http://"+loopback(s.port)+"/v1", "", fmt.Sprint(children.sims[i].pid))
	}
	_ = t.Flush() // into memory

	first, last := p.nodes[0], len(p.nodes)-1
	say("\nThree things to try, in another terminal:")
	say("\n1. Ask a model at any site, with a plain and with a streamed answer:")
	say("   curl -i http://%s/v1/chat/completions -H 'Content-Type: application/json' \\", loopback(first.api))
	say("     -d '{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}'", p.firstModel())
	say("   curl -N http://%s/v1/chat/completions -H 'Content-Type: application/json' \\", loopback(p.nodes[last].api))
	say("     -d '{\"model\":\"%s\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}'", p.firstModel())
	if len(children.sims) > 0 {
		say("\n2. Kill a site's model server and ask that site again: X-Dsnode-Site names the site that answered.")
		say("   kill -9 %d", children.sims[0].pid)
	} else {
		say("\n2. List the model servers: %s upstream list", exe)
	}
	say("\n3. Kill a node, watch the status, and start the node again:")
	say("   kill -9 %d", children.nodes[last].pid)
	say("   %s status --watch", exe)
	say("   %s", strings.Join(children.nodes[last].command(exe), " "))
	say("\nCtrl-C ends all processes.")
	_, _ = io.WriteString(w, b.String()) // a closed stdout does not end the cluster
}

func (p *devPlan) city(site string) string {
	for _, s := range p.sites {
		if s.name == site {
			return s.city
		}
	}
	return ""
}
