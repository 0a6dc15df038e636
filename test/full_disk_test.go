//go:build linux

package test

import (
	"context"
	"fmt"
	"net/http"
	"testing"

	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/test/lab"
)

// A node whose disk fills at once goes on to serve chat and refuses jobs, and so does one that
// is killed and started on the full disk. When there is room it takes jobs again. Nodes of the
// lab run as root, for whom ext4 keeps a twentieth of the disk: their own small writes succeed.
func TestChatOnAFullDisk(t *testing.T) {
	parallelIfShort(t)
	disk := lab.NewDisk(t)
	l := lab.Start(t, lab.Topology{Node: func(c *node.Config) {
		if c.Name == "beijing-1" {
			c.DataDir = disk.Dir()
		}
	}})
	wantVoters(t, l, 3)
	n := l.Sites[2].Nodes[0]
	pid := n.PID()
	request := fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"hello"}]}`, lab.FastModel)
	serves := func(when string, job int) {
		t.Helper()
		for _, ask := range []struct {
			path, body string
			want       int
		}{
			{"/v1/chat/completions", request, http.StatusOK},
			{"/v1/jobs", fmt.Sprintf(`{"endpoint":"/v1/chat/completions","body":%s}`, request), job},
		} {
			l.WaitFor(within(healsWithin), fmt.Sprintf("%s: %s to answer %d", when, ask.path, ask.want), func(ctx context.Context) error {
				status, _, answer, err := n.Post(ctx, ask.path, []byte(ask.body), nil)
				if err == nil && status != ask.want {
					err = fmt.Errorf("status %d: %s", status, answer)
				}
				return err
			})
		}
	}
	serves("before", http.StatusAccepted)
	empty := disk.Fill(0)
	serves("on a full disk", http.StatusServiceUnavailable)
	wantReasons(t, l, "the disk is full", "node beijing-1: its disk has 0 MiB left")
	if !n.Running() || n.PID() != pid {
		t.Errorf("the process ended when the disk filled")
	}
	n.Kill()
	n.Start()
	serves("after a start on the full disk", http.StatusServiceUnavailable)
	empty()
	serves("with room again", http.StatusAccepted)
	t.Logf("healthy %v after there was room", l.WaitHealthy(within(healsWithin)))
}
