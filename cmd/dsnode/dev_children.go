package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dsnode/dsnode/storage"
)

// devChild is a process of the cluster: a node or a simulated model server.
type devChild struct {
	title   string   // in messages
	args    []string // of this program
	log     string   // file with its output
	pidFile string   // of a node: has the pid of its process, also of one started by hand
	config  string   // of a node: its node.yaml

	cmd  *exec.Cmd
	pid  int
	how  string        // how it ended; set before done is closed
	done chan struct{} // closed when it has ended
}

// command is the command line that starts the child again.
func (c *devChild) command(exe string) []string { return append([]string{exe}, c.args...) }

// devChildren are all processes of the cluster. One thread starts them all and lives
// as long as they do, because Linux ends a child with the thread that started it
// (endWithParent).
type devChildren struct {
	exe   string
	nodes []*devChild
	sims  []*devChild
	ended chan *devChild // gets each child once, when it ends

	starts chan func() // executed by the thread that starts children
}

func newDevChildren(exe string, p *devPlan) *devChildren {
	c := &devChildren{exe: exe, starts: make(chan func())}
	for _, s := range p.sims {
		args := []string{"modelsim", "--listen", loopback(s.port)}
		for _, m := range simulatedModels {
			args = append(args, "--model", m)
		}
		c.sims = append(c.sims, &devChild{
			title: "The model server of " + s.site, args: args,
			log: filepath.Join(p.dir, "modelsim-"+s.site+".log"), done: make(chan struct{}),
		})
	}
	for _, n := range p.nodes {
		config := filepath.Join(p.dir, n.name, "node.yaml")
		c.nodes = append(c.nodes, &devChild{
			title: "Node " + n.name, args: []string{"run", "--config", config}, config: config,
			log:     filepath.Join(p.dir, n.name, "node.log"),
			pidFile: filepath.Join(p.dir, n.name, "data", storage.LockFile), done: make(chan struct{}),
		})
	}
	c.ended = make(chan *devChild, len(c.sims)+len(c.nodes))
	return c
}

func (c *devChildren) all() []*devChild {
	return append(append([]*devChild(nil), c.sims...), c.nodes...)
}

// startAll starts all children. After an error stopAll ends those that were started.
func (c *devChildren) startAll() error {
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the last child
		for start := range c.starts {
			start()
		}
	}()
	for _, child := range c.all() {
		failed := make(chan error, 1)
		c.starts <- func() { failed <- c.start(child) }
		if err := <-failed; err != nil {
			return fmt.Errorf("start %s: %w", strings.ToLower(child.title[:1])+child.title[1:], err)
		}
	}
	return nil
}

func (c *devChildren) start(child *devChild) error {
	out, err := os.OpenFile(child.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }() // the child has its own descriptor
	cmd := exec.Command(c.exe, child.args...)
	cmd.Stdout, cmd.Stderr = out, out
	// With its own process group a child does not get the terminal's Ctrl-C. This process
	// gets it and ends the children in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	endWithParent(cmd.SysProcAttr)
	if err := cmd.Start(); err != nil {
		return err
	}
	child.cmd, child.pid = cmd, cmd.Process.Pid
	go func() {
		err := cmd.Wait()
		child.how = "exit 0"
		if err != nil {
			child.how = err.Error()
		}
		close(child.done)
		c.ended <- child
	}()
	return nil
}

// pause waits. A child that ends meanwhile is an error, because none should end while
// the cluster starts.
func (c *devChildren) pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case child := <-c.ended:
		return failure("the complete log is "+child.log, "%s has ended by itself: %s\n%s", child.title, child.how, tail(child.log, 10))
	case <-timer.C:
		return nil
	}
}

// explain adds the last lines of the first node's log to an error.
func (c *devChildren) explain(err error) error {
	if len(c.nodes) == 0 {
		return err
	}
	first := c.nodes[0]
	return failure("the complete log is "+first.log, "%w\n%s", err, tail(first.log, 10))
}

// stopAll ends all processes and waits for them: first the nodes, also those that were
// started again by hand, then the model servers, so that running requests are still
// answered. A process that does not end in time is killed.
func (c *devChildren) stopAll(within time.Duration) error {
	defer close(c.starts)
	err := stopGroup(c.nodes, within)
	return errors.Join(err, stopGroup(c.sims, within))
}

func stopGroup(children []*devChild, within time.Duration) error {
	var wg sync.WaitGroup
	errs := make([]error, len(children))
	for i, child := range children {
		wg.Go(func() { errs[i] = child.stop(within) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (c *devChild) stop(within time.Duration) error {
	if c.cmd == nil {
		return nil
	}
	if closed(c.done) {
		return c.stopReplacement(within)
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end %s: %w", c.title, err)
	}
	if waitFor(within, func() bool { return closed(c.done) }) {
		return nil
	}
	if err := c.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", c.title, err)
	}
	<-c.done
	return nil
}

// stopReplacement ends a node that the user started again with the printed command.
// It is not a child of this process, but it runs in the cluster's data directory.
func (c *devChild) stopReplacement(within time.Duration) error {
	pid := c.replacement()
	if pid == 0 {
		return nil
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end process %d of %s: %w", pid, c.title, err)
		}
		if waitFor(within, func() bool { return c.replacement() != pid }) {
			return nil
		}
	}
	return fmt.Errorf("end process %d of %s: it is still running", pid, c.title)
}

// replacement is the pid of the process that runs the node now, 0 for none. A killed
// node leaves its pid file behind, and the pid may be another process's by now, so the
// command line must name this node's configuration.
func (c *devChild) replacement() int {
	if c.pidFile == "" {
		return 0
	}
	text, err := os.ReadFile(c.pidFile)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid == c.pid || !processLives(pid) {
		return 0
	}
	args, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil || !bytes.Contains(args, []byte(c.config)) {
		return 0
	}
	return pid
}

func closed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// waitFor polls until the condition holds or the time is over.
func waitFor(within time.Duration, condition func() bool) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	over := time.After(within)
	for !condition() {
		select {
		case <-over:
			return condition()
		case <-tick.C:
		}
	}
	return true
}

// tail returns the last lines of a log.
func tail(path string, lines int) string {
	const most = 8 << 10
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }() // only read
	if info, err := f.Stat(); err == nil && info.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return ""
		}
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return ""
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
