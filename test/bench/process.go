//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// Commands with which this program starts itself as a child.
const (
	childUpstream     = "child-upstream"
	childReverseProxy = "child-reverseproxy"
)

// sandbox is a temporary directory and the processes of one run. close ends the
// processes and removes the directory.
type sandbox struct {
	dir       string
	processes []*process
	starts    chan func() // for the thread that starts all processes
}

// newSandbox makes a sandbox. Linux kills a process with Pdeathsig when the thread that
// started it ends. So one thread starts all processes and lasts as long as the sandbox,
// and no process outlives a bench that was killed.
func newSandbox() (*sandbox, error) {
	dir, err := os.MkdirTemp("", "dsnode-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a temporary directory: %w", err)
	}
	s := &sandbox{dir: dir, starts: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for f := range s.starts {
			f()
		}
	}()
	return s, nil
}

func (s *sandbox) close() error {
	for i := len(s.processes) - 1; i >= 0; i-- {
		s.processes[i].stop()
	}
	close(s.starts)
	if err := os.RemoveAll(s.dir); err != nil {
		return fmt.Errorf("remove the temporary directory: %w", err)
	}
	return nil
}

// process is a child process; stop ends it.
type process struct {
	name string
	log  string // file with its output
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// start starts a command. Its output goes to a file in the sandbox.
func (s *sandbox) start(name string, cmd *exec.Cmd) (*process, error) {
	p := &process{name: name, log: filepath.Join(s.dir, name+".log"), cmd: cmd, done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", name, err)
	}
	defer func() { _ = log.Close() }() // the process has its own descriptor
	cmd.Stdout, cmd.Stderr = log, log
	// In another process group, so that Ctrl-C reaches only the bench, which then stops
	// its children.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	s.starts <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = cmd.Wait() // its log tells how it ended
		close(p.done)
	}()
	s.processes = append(s.processes, p)
	return p, nil
}

// startSelf starts this program as a child that serves on a listener. The listener is
// opened before the child starts, so no other process can take the port.
func (s *sandbox) startSelf(name string, args ...string) (*process, string, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, "", fmt.Errorf("find this program: %w", err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", fmt.Errorf("listen for %s: %w", name, err)
	}
	defer func() { _ = ln.Close() }() // the child has its own descriptor
	file, err := ln.(*net.TCPListener).File()
	if err != nil {
		return nil, "", fmt.Errorf("listen for %s: %w", name, err)
	}
	defer func() { _ = file.Close() }()
	cmd := exec.Command(exe, args...)
	cmd.ExtraFiles = []*os.File{file}
	p, err := s.start(name, cmd)
	return p, ln.Addr().String(), err
}

// inherited is the listener that startSelf opened.
func inherited() (net.Listener, error) {
	ln, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return nil, fmt.Errorf("only the bench itself may start this command: %w", err)
	}
	return ln, nil
}

// stop sends SIGTERM, and SIGKILL after 10 s.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

var errEnded = errors.New("the process has ended")

// alive returns an error with the end of the log if the process has ended.
func (p *process) alive() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s: %w: %s", p.name, errEnded, p.logTail())
	default:
		return nil
	}
}

// logTail returns the end of the log.
func (p *process) logTail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	const most = 2000
	if len(text) > most {
		text = text[len(text)-most:]
	}
	return string(bytes.TrimSpace(text))
}

// freePort finds a port that is free for TCP and UDP, below the kernel's range of
// ephemeral ports.
func freePort() (int, error) {
	for range 200 {
		port := 20000 + rand.IntN(12000)
		at := fmt.Sprintf("127.0.0.1:%d", port)
		tcp, err := net.Listen("tcp", at)
		if err != nil {
			continue
		}
		udp, err := net.ListenPacket("udp", at)
		_ = tcp.Close()
		if err != nil {
			continue
		}
		_ = udp.Close()
		return port, nil
	}
	return 0, errors.New("found no free port on 127.0.0.1")
}
