package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// peerProgram is a fake node as its own process, because signals go to a process. Its
// argument says how it drains: at once, or never.
func peerProgram() {
	p := &quietPeer{forever: len(os.Args) > 1 && os.Args[1] == "never"}
	if err := runUntilSignal(context.Background(), slog.New(slog.DiscardHandler), p); err != nil {
		fmt.Println("failed:", err)
		os.Exit(exitFailed)
	}
	fmt.Println("left")
}

type quietPeer struct {
	forever bool
	reloads int
}

func (p *quietPeer) Run(ctx context.Context) error {
	fmt.Println("up")
	<-ctx.Done()
	fmt.Println("draining")
	if p.forever {
		select {}
	}
	return nil
}

func (p *quietPeer) Reload() error {
	p.reloads++
	fmt.Println("reload", p.reloads)
	if p.reloads == 1 {
		return errors.New("half a file")
	}
	return nil
}

// startPeer runs peerProgram and returns its output line by line.
func startPeer(t *testing.T, drains string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "quietpeer", drains)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := bufio.NewScanner(out)
	hear(t, said, "up")
	return cmd, said
}

func hear(t *testing.T, said *bufio.Scanner, want string) {
	t.Helper()
	if !said.Scan() || said.Text() != want {
		t.Fatalf("the program wrote %q (%v), want %q", said.Text(), said.Err(), want)
	}
}

func signalTo(t *testing.T, cmd *exec.Cmd, s os.Signal) {
	t.Helper()
	if err := cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func TestTermDrainsAndHupReloads(t *testing.T) {
	for _, end := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		cmd, said := startPeer(t, "at once")
		signalTo(t, cmd, syscall.SIGHUP)
		hear(t, said, "reload 1") // it fails, and the node keeps running
		signalTo(t, cmd, syscall.SIGHUP)
		hear(t, said, "reload 2")
		signalTo(t, cmd, end)
		hear(t, said, "draining")
		hear(t, said, "left")
		if err := cmd.Wait(); err != nil {
			t.Errorf("after %v: %v", end, err)
		}
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	cmd, said := startPeer(t, "never")
	signalTo(t, cmd, syscall.SIGTERM)
	hear(t, said, "draining")
	// The default action is restored shortly after the context has ended. A signal before
	// that has no effect, so it is sent until the process ends.
	for !ended(cmd.Process.Pid) {
		signalTo(t, cmd, syscall.SIGTERM)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !exit.Sys().(syscall.WaitStatus).Signaled() {
		t.Errorf("ended with %v, want an end by SIGTERM", err)
	}
}

// ended reports whether a process is a zombie: it has ended and was not waited for.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}
